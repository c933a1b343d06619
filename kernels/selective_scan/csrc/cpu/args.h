// What the scan kernels read and write. Pointers are to the first element, strides in elements; the last
// dimension of every tensor has stride 1. See ../../README.md for the maths.
#pragma once
#include <cstdint>

namespace mmvssm {

template <typename T>
struct ScanArgs {
  int64_t batch, length, dim, directions, rank, d_state, chunk, num_chunks;
  const T *x, *dt, *B, *C;  // C null: return the states
  int64_t x_b, x_l, dt_b, dt_l, dt_k, B_b, B_l, B_k, C_b, C_l, C_k;
  const T *dt_weight;  // (K, R, D)
  const T *dt_bias;    // (K, D)
  const T *A;          // (K, N, D)
  const T *D;          // (K, D) or null
  const int64_t *order;  // token of step t, or null for 0, 1, 2, ...
  int64_t order_b, order_k;
  T *y;       // (B, L, D), or (B, L, N, D) for the states
  T *states;  // (B, K, num_chunks, N, D): the state before each chunk

  // Backward only.
  const T *grad_y;
  T *grad_x;      // (B, L, D)
  T *grad_delta;  // (B, L, K, D), before the softplus
  T *grad_B;      // (lane blocks, B, L, K, N): one partial sum per block of lanes
  T *grad_C;      // likewise
  T *grad_A;      // (B, num_chunks, K, N, D): one partial sum per chunk
  T *grad_D;      // (B, num_chunks, K, D)
};

// One chunk of one block of lanes, `lane` being its first channel.
template <typename T>
struct ScanTable {
  // From states[c] through the chunk; leaves the state after it in states[c + 1] if `keep_end`.
  void (*forward)(const ScanArgs<T>&, int64_t b, int64_t k, int64_t c, int64_t lane, bool keep_end);
  // The state after the chunk from a zero state, and the chunk's decay; both (N, D) at `lane`.
  void (*summary)(const ScanArgs<T>&, int64_t b, int64_t k, int64_t c, int64_t lane, T* end, T* decay);
  // Gradients of the chunk. `carry` (N, lanes): gradient reaching the state after the chunk on entry, the
  // state before it on return. `scratch`: scan_scratch() elements.
  void (*backward)(const ScanArgs<T>&, int64_t b, int64_t k, int64_t c, int64_t lane, T* carry, T* scratch);
  // What `backward` would leave in a zero carry, and the chunk's decay; both (N, lanes).
  void (*carry)(const ScanArgs<T>&, int64_t b, int64_t k, int64_t c, int64_t lane, T* carry, T* decay);
};

template <typename T>
inline int64_t scan_scratch(const ScanArgs<T>& a) {
  return a.chunk * (2 * a.d_state + 2) * (64 / sizeof(T));
}

}  // namespace mmvssm
