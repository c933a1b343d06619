// What the depthwise 3x3 convolution reads and writes; strides in elements, channels have stride 1.
#pragma once
#include <cstdint>

namespace mmvssm {

template <typename T>
struct ConvArgs {
  int64_t batch, height, width, dim;
  const T *x;  // (B, H, W, D)
  int64_t x_b, x_y, x_x;
  const T *weight;    // (9, D)
  const T *bias;      // (D) or null
  const T *residual;  // (B, H, W, D), contiguous, or null: added to the result
  const T *grad_y;    // (B, H, W, D), contiguous, or null: see `silu`
  bool silu;          // y = silu(conv); with grad_y, y = grad_y * silu'(conv)
  T *y;               // (B, H, W, D)

  T *grad_weight;  // (B * row blocks, 10, D): nine taps and the bias, one partial sum per block of rows
};

constexpr int64_t kConvRowBlock = 8;

template <typename T>
struct ConvTable {
  // One row of pixels of one image, all channels.
  void (*forward)(const ConvArgs<T>&, int64_t b, int64_t row);
  // Partial sums over kConvRowBlock rows of one image, from x and grad_y.
  void (*grad_weight)(const ConvArgs<T>&, int64_t b, int64_t row_block);
};

}  // namespace mmvssm
