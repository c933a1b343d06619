// Depthwise 3x3 convolution, stride 1, zero padding, channels last: nine weights stay in registers while
// the window slides along a row. A neighbour outside the map reads the centre with weight zero.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

template <typename T>
struct Window {
  const T* row[3];
  bool inside[3];
  int64_t stride, width;

  Window(const ConvArgs<T>& a, int64_t b, int64_t y, int64_t lane) : stride(a.x_x), width(a.width) {
    for (int i = 0; i < 3; ++i) {
      inside[i] = y + i - 1 >= 0 && y + i - 1 < a.height;
      row[i] = a.x + b * a.x_b + (inside[i] ? y + i - 1 : y) * a.x_y + lane;
    }
  }
  template <typename Count>
  vec<T> at(int i, int64_t column, Count count) const {
    const int64_t c = column < 0 ? 0 : column < width ? column : width - 1;
    return load(row[i] + c * stride, count);
  }
};

template <typename T>
void conv_forward(const ConvArgs<T>& a, int64_t b, int64_t y) {
  each_block<T>(a.dim, [&](int64_t lane, auto count) {
    const Window<T> window(a, b, y, lane);
    vec<T> w[9];
    for (int i = 0; i < 9; ++i)
      w[i] = window.inside[i / 3] ? load(a.weight + i * a.dim + lane, count) : vec<T>{};
    const vec<T> bias = a.bias ? load(a.bias + lane, count) : vec<T>{};
    vec<T> left[3] = {}, centre[3];
    for (int i = 0; i < 3; ++i) centre[i] = window.at(i, 0, count);
    for (int64_t column = 0; column < a.width; ++column) {
      vec<T> sum = bias;
      for (int i = 0; i < 3; ++i) {
        const vec<T> right = column + 1 < a.width ? window.at(i, column + 1, count) : vec<T>{};
        sum += w[3 * i] * left[i] + w[3 * i + 1] * centre[i] + w[3 * i + 2] * right;
        left[i] = centre[i], centre[i] = right;
      }
      const int64_t out = ((b * a.height + y) * a.width + column) * a.dim + lane;
      if (a.silu) {
        const vec<T> s = sigmoid<T>(sum);
        sum = a.grad_y ? load(a.grad_y + out, count) * s * (T(1) + sum * (T(1) - s)) : sum * s;
      }
      if (a.residual) sum += load(a.residual + out, count);
      store(a.y + out, sum, count);
    }
  });
}

template <typename T>
void conv_grad_weight(const ConvArgs<T>& a, int64_t b, int64_t block) {
  const int64_t begin = block * kConvRowBlock;
  const int64_t end = begin + kConvRowBlock < a.height ? begin + kConvRowBlock : a.height;
  const int64_t blocks = (a.height + kConvRowBlock - 1) / kConvRowBlock;
  each_block<T>(a.dim, [&](int64_t lane, auto count) {
    vec<T> grad[10] = {};
    for (int64_t y = begin; y < end; ++y) {
      const Window<T> window(a, b, y, lane);
      const T* gy = a.grad_y + (b * a.height + y) * a.width * a.dim + lane;
      for (int i = 0; i < 3; ++i) {
        if (!window.inside[i]) continue;
        vec<T> left{}, centre = window.at(i, 0, count);
        for (int64_t column = 0; column < a.width; ++column) {
          const vec<T> right = column + 1 < a.width ? window.at(i, column + 1, count) : vec<T>{};
          const vec<T> g = load(gy + column * a.dim, count);
          grad[3 * i] += g * left;
          grad[3 * i + 1] += g * centre;
          grad[3 * i + 2] += g * right;
          if (i == 1) grad[9] += g;
          left = centre, centre = right;
        }
      }
    }
    for (int i = 0; i < 10; ++i)
      store(a.grad_weight + ((b * blocks + block) * 10 + i) * a.dim + lane, grad[i], count);
  });
}

template <typename T>
constexpr ConvTable<T> conv_table() {
  return {conv_forward<T>, conv_grad_weight<T>};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
