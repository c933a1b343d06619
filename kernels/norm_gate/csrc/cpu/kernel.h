// LayerNorm(x) * SiLU(z), row by row; a row stays in the first-level cache between its passes.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

template <typename T>
struct Moments {
  T mean, rstd;
  Moments(const T* x, int64_t dim, T eps) {
    constexpr int V = simd<T>::lanes;
    vec<T> total{};
    each_block<T>(dim, [&](int64_t d, auto count) { total += load(x + d, count); });
    mean = sum<T>(total) / dim;
    vec<T> squares{};
    int64_t d = 0;
    for (; d + V <= dim; d += V) {
      const vec<T> centred = load(x + d) - mean;
      squares += centred * centred;
    }
    T rest = 0;
    for (; d < dim; ++d) rest += (x[d] - mean) * (x[d] - mean);
    rstd = T(1) / __builtin_sqrt((sum<T>(squares) + rest) / dim + eps);
  }
};

template <typename T>
void norm_gate_forward(const NormGateArgs<T>& a, int64_t row) {
  const T *x = a.x + row * a.x_row, *z = a.z + row * a.z_row;
  const Moments<T> m(x, a.dim, a.eps);
  each_block<T>(a.dim, [&](int64_t d, auto count) {
    const vec<T> gate = load(z + d, count);
    const vec<T> normed = (load(x + d, count) - m.mean) * m.rstd * load(a.weight + d, count) +
                          load(a.bias + d, count);
    store(a.y + row * a.dim + d, normed * gate * sigmoid<T>(gate), count);
  });
}

template <typename T>
void norm_gate_backward(const NormGateArgs<T>& a, int64_t block) {
  const int64_t begin = block * kNormRowBlock;
  const int64_t end = begin + kNormRowBlock < a.rows ? begin + kNormRowBlock : a.rows;
  T *grad_weight = a.grad_affine + block * 2 * a.dim, *grad_bias = grad_weight + a.dim;
  for (int64_t d = 0; d < 2 * a.dim; ++d) grad_weight[d] = 0;
  for (int64_t row = begin; row < end; ++row) {
    const T *x = a.x + row * a.x_row, *z = a.z + row * a.z_row, *gy = a.grad_y + row * a.dim;
    T *grad_x = a.grad_x + row * a.dim, *grad_z = a.grad_z + row * a.dim;
    const Moments<T> m(x, a.dim, a.eps);
    vec<T> sum_g{}, sum_gx{};
    each_block<T>(a.dim, [&](int64_t d, auto count) {
      const vec<T> gate = load(z + d, count), s = sigmoid<T>(gate), g = load(gy + d, count);
      const vec<T> unit = (load(x + d, count) - m.mean) * m.rstd, weight = load(a.weight + d, count);
      store(grad_z + d, g * (unit * weight + load(a.bias + d, count)) * s * (T(1) + gate * (T(1) - s)), count);
      const vec<T> grad_normed = g * gate * s;
      store(grad_weight + d, load(grad_weight + d, count) + grad_normed * unit, count);
      store(grad_bias + d, load(grad_bias + d, count) + grad_normed, count);
      const vec<T> grad_unit = grad_normed * weight;  // zero past the end, as weight is
      sum_g += grad_unit;
      sum_gx += grad_unit * unit;
      store(grad_x + d, grad_unit, count);
    });
    const T mean_g = sum<T>(sum_g) / a.dim, mean_gx = sum<T>(sum_gx) / a.dim;
    each_block<T>(a.dim, [&](int64_t d, auto count) {
      const vec<T> unit = (load(x + d, count) - m.mean) * m.rstd;
      store(grad_x + d, (load(grad_x + d, count) - mean_g - unit * mean_gx) * m.rstd, count);
    });
  }
}

template <typename T>
constexpr NormGateTable<T> norm_gate_table() {
  return {norm_gate_forward<T>, norm_gate_backward<T>};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
