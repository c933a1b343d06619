// Structure-aware state fusion: a 25-tap stencil on the map of states, times C, plus D x, in one pass.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

constexpr FusionOffsets kOffsets{};

inline int64_t clamp(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// Where each tap of pixel (row, column) reads, relative to the image: replicate padding is a clamp.
struct Neighbours {
  int64_t at[kFusionTaps];
  template <typename T>
  Neighbours(const FusionArgs<T>& a, int64_t row, int64_t column, int64_t stride_y, int64_t stride_x) {
    for (int i = 0; i < kFusionTaps; ++i)
      at[i] = clamp(row + kOffsets.dy[i], a.height) * stride_y +
              clamp(column + kOffsets.dx[i], a.width) * stride_x;
  }
};

template <typename T>
void fusion_forward(const FusionArgs<T>& a, int64_t b, int64_t row) {
  constexpr int V = simd<T>::lanes;
  for (int64_t lane = 0; lane < a.dim; lane += V) {
    const int count = a.dim - lane < V ? a.dim - lane : V;
    vec<T> taps[kFusionTaps];
    for (int i = 0; i < kFusionTaps; ++i) taps[i] = load(a.taps + i * a.dim + lane, count);
    const vec<T> skip = load(a.D + lane, count);
    for (int64_t column = 0; column < a.width; ++column) {
      const Neighbours near(a, row, column, a.h_y, a.h_x);
      const T* C = a.C + b * a.C_b + row * a.C_y + column * a.C_x;
      vec<T> y = skip * load(a.x + b * a.x_b + row * a.x_y + column * a.x_x + lane, count);
      for (int64_t n = 0; n < a.d_state; ++n) {
        const T* h = a.h + b * a.h_b + n * a.h_n + lane;
        vec<T> fused{};
        for (int i = 0; i < kFusionTaps; ++i) fused += taps[i] * load(h + near.at[i], count);
        y += C[n] * fused;
      }
      store(a.y + ((b * a.height + row) * a.width + column) * a.dim + lane, y, count);
    }
  }
}

// The adjoint of a clamped read is a scatter to the clamped place. One thread owns the whole plane of its
// channels, so the order of additions is fixed.
template <typename T>
void fusion_backward(const FusionArgs<T>& a, int64_t b, int64_t lane) {
  constexpr int V = simd<T>::lanes;
  const int count = a.dim - lane < V ? a.dim - lane : V;
  vec<T> taps[kFusionTaps], grad_taps[kFusionTaps] = {}, grad_D{};
  for (int i = 0; i < kFusionTaps; ++i) taps[i] = load(a.taps + i * a.dim + lane, count);
  const vec<T> skip = load(a.D + lane, count);
  for (int64_t row = 0; row < a.height; ++row) {
    for (int64_t column = 0; column < a.width; ++column) {
      const int64_t pixel = (b * a.height + row) * a.width + column;
      const vec<T> gy = load(a.grad_y + pixel * a.dim + lane, count);
      grad_D += gy * load(a.x + b * a.x_b + row * a.x_y + column * a.x_x + lane, count);
      store(a.grad_x + pixel * a.dim + lane, gy * skip, count);
      const T* C = a.C + b * a.C_b + row * a.C_y + column * a.C_x;
      const Neighbours near(a, row, column, a.h_y, a.h_x);
      const Neighbours dense(a, row, column, a.width * a.d_state * a.dim, a.d_state * a.dim);
      for (int64_t n = 0; n < a.d_state; ++n) {
        const T* h = a.h + b * a.h_b + n * a.h_n + lane;
        T* grad_h = a.grad_h + (b * a.height * a.width * a.d_state + n) * a.dim + lane;
        const vec<T> grad_fused = gy * C[n];
        vec<T> fused{};
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
constexpr FusionTable<T> fusion_table() {
  return {fusion_forward<T>, fusion_backward<T>};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
