// What the state fusion kernels read and write; strides in elements, the last dimension has stride 1.
#pragma once
#include <cstdint>

namespace mmvssm {

constexpr int kFusionTaps = 25;  // three dilated 3x3 stencils share their centre

template <typename T>
struct FusionArgs {
  int64_t batch, height, width, d_state, dim;
  const T *h, *C, *x;  // (B, H, W, N, D), (B, H, W, N), (B, H, W, D)
  int64_t h_b, h_y, h_x, h_n, C_b, C_y, C_x, x_b, x_y, x_x;
  const T *taps;  // (25, D): alpha_k * kernel_k, centres added up
  const T *D;     // (D)
  T *y;           // (B, H, W, D)

  // Backward only.
  const T *grad_y;    // (B, H, W, D)
  T *grad_h;          // (B, H, W, N, D), zero on entry
  T *grad_C;          // (lane blocks, B, H, W, N): one partial sum per block of lanes
  T *grad_x;          // (B, H, W, D)
  T *grad_taps;       // (B, 25, D)
  T *grad_D;          // (B, D)
};

template <typename T>
struct FusionTable {
  // One row of pixels of one image, all channels.
  void (*forward)(const FusionArgs<T>&, int64_t b, int64_t row);
  // One image, one block of lanes starting at channel `lane`.
  void (*backward)(const FusionArgs<T>&, int64_t b, int64_t lane);
};

// Row and column offset of each tap: the centre, then the rings of dilation 1, 3 and 5 in raster order.
struct FusionOffsets {
  int dy[kFusionTaps] = {}, dx[kFusionTaps] = {};
  constexpr FusionOffsets() {
    int i = 1;
    for (int dilation = 1; dilation <= 5; dilation += 2)
      for (int cell = 0; cell < 9; ++cell)
        if (cell != 4) dy[i] = (cell / 3 - 1) * dilation, dx[i++] = (cell % 3 - 1) * dilation;
  }
};

}  // namespace mmvssm
