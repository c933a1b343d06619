// What the gated LayerNorm reads and writes; row strides in elements, channels have stride 1.
#pragma once
#include <cstdint>

namespace mmvssm {

template <typename T>
struct NormGateArgs {
  int64_t rows, dim;
  const T *x, *z;  // (rows, D)
  int64_t x_row, z_row;
  const T *weight, *bias;  // (D)
  T eps;
  T *y;  // (rows, D)

  // Backward only.
  const T *grad_y;      // (rows, D)
  T *grad_x, *grad_z;   // (rows, D)
  T *grad_affine;       // (row blocks, 2, D): weight and bias, one partial sum per block of rows
};

constexpr int64_t kNormRowBlock = 64;

template <typename T>
struct NormGateTable {
  void (*forward)(const NormGateArgs<T>&, int64_t row);
  // kNormRowBlock rows.
  void (*backward)(const NormGateArgs<T>&, int64_t row_block);
};

}  // namespace mmvssm
