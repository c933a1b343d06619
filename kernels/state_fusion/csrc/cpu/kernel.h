// Structure-aware state fusion: a 25-tap stencil on the map of states, times C, plus D x, in one pass.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

constexpr FusionOffsets kOffsets{};

inline int64_t clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// Where each tap of a pixel reads, relative to the image: replicate padding is a clamp. Away from the left and
// right edges the places move along with the pixel.
class Neighbours {
 public:
  template <typename T>
  Neighbours(const FusionArgs<T>& a, int64_t row, int64_t stride_y, int64_t stride_x)
      : width_(a.width), stride_(stride_x) {
    for (int i = 0; i < kFusionTaps; ++i) row_[i] = clamp(row + kOffsets.dy[i], a.height) * stride_y;
  }
  void move_to(int64_t column) {
    if (column > kReach && column < width_ - kReach) {
      for (int i = 0; i < kFusionTaps; ++i) at[i] += stride_;
    } else {
      for (int i = 0; i < kFusionTaps; ++i)
        at[i] = row_[i] + clamp(column + kOffsets.dx[i], width_) * stride_;
    }
  }
  int64_t at[kFusionTaps];

 private:
  static constexpr int kReach = 5;
  int64_t row_[kFusionTaps], width_, stride_;
};

template <typename T>
void fusion_forward(const FusionArgs<T>& a, int64_t b, int64_t row) {
  each_block<T>(a.dim, [&](int64_t lane, auto count) {
    vec<T> taps[kFusionTaps];
    for (int i = 0; i < kFusionTaps; ++i) taps[i] = load(a.taps + i * a.dim + lane, count);
    const vec<T> skip = load(a.D + lane, count);
    Neighbours near(a, row, a.h_y, a.h_x);
    for (int64_t column = 0; column < a.width; ++column) {
      near.move_to(column);
      const T* C = a.C + b * a.C_b + row * a.C_y + column * a.C_x;
      vec<T> y = skip * load(a.x + b * a.x_b + row * a.x_y + column * a.x_x + lane, count);
      for (int64_t n = 0; n < a.d_state; ++n) {
        const T* h = a.h + b * a.h_b + n * a.h_n + lane;
        vec<T> fused[5] = {};  // five short chains of additions instead of a long one
#pragma GCC unroll 25
        for (int i = 0; i < kFusionTaps; ++i) fused[i % 5] += taps[i] * load(h + near.at[i], count);
        y += C[n] * (((fused[0] + fused[1]) + (fused[2] + fused[3])) + fused[4]);
      }
      store(a.y + ((b * a.height + row) * a.width + column) * a.dim + lane, y, count);
    }
  });
}

// The adjoint of a clamped read is a scatter to the clamped place. One thread owns the whole plane of its
// channels, so the order of additions is fixed.
template <typename T, typename Count>
void fusion_backward_block(const FusionArgs<T>& a, int64_t b, int64_t lane, Count count) {
  constexpr int V = simd<T>::lanes;
  vec<T> taps[kFusionTaps], grad_taps[kFusionTaps] = {}, grad_D{};
  for (int i = 0; i < kFusionTaps; ++i) taps[i] = load(a.taps + i * a.dim + lane, count);
  const vec<T> skip = load(a.D + lane, count);
  for (int64_t row = 0; row < a.height; ++row) {
    Neighbours near(a, row, a.h_y, a.h_x), dense(a, row, a.width * a.d_state * a.dim, a.d_state * a.dim);
    for (int64_t column = 0; column < a.width; ++column) {
      const int64_t pixel = (b * a.height + row) * a.width + column;
      const vec<T> gy = load(a.grad_y + pixel * a.dim + lane, count);
      grad_D += gy * load(a.x + b * a.x_b + row * a.x_y + column * a.x_x + lane, count);
      store(a.grad_x + pixel * a.dim + lane, gy * skip, count);
      const T* C = a.C + b * a.C_b + row * a.C_y + column * a.C_x;
      near.move_to(column);
      dense.move_to(column);
      for (int64_t n = 0; n < a.d_state; ++n) {
        const T* h = a.h + b * a.h_b + n * a.h_n + lane;
        T* grad_h = a.grad_h + (b * a.height * a.width * a.d_state + n) * a.dim + lane;
        const vec<T> grad_fused = gy * C[n];
        vec<T> fused{};
#pragma GCC unroll 25
        for (int i = 0; i < kFusionTaps; ++i) {
          const vec<T> value = load(h + near.at[i], count);
          T* target = grad_h + dense.at[i];
          fused += taps[i] * value;
          grad_taps[i] += grad_fused * value;
          store(target, load(target, count) + taps[i] * grad_fused, count);
        }
        a.grad_C[((lane / V * a.batch * a.height * a.width) + pixel) * a.d_state + n] = sum<T>(gy * fused);
      }
    }
  }
  for (int i = 0; i < kFusionTaps; ++i)
    store(a.grad_taps + (b * kFusionTaps + i) * a.dim + lane, grad_taps[i], count);
  store(a.grad_D + b * a.dim + lane, grad_D, count);
}

template <typename T>
void fusion_backward(const FusionArgs<T>& a, int64_t b, int64_t lane) {
  one_block<T>(a.dim, lane, [&](auto count) { fusion_backward_block<T>(a, b, lane, count); });
}

template <typename T>
constexpr FusionTable<T> fusion_table() {
  return {fusion_forward<T>, fusion_backward<T>};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
