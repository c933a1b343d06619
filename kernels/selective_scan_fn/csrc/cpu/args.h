// What the kernels of the scan with Mamba's interface read and write. Pointers are to the first element, strides in
// elements; steps have stride 1. See ../../README.md for the maths.
#pragma once
#include <cstdint>

namespace mmvssm {

// (B, D, L)
template <typename T>
struct ScanFnWalked {
  const T* data;
  int64_t batch, channel;
};

// B or C: (B, G, N, L), or constant (N, D), where a group has no channels.
template <typename T>
struct ScanFnProjection {
  const T* data;
  int64_t batch, group, state;
  int64_t span;  // channels of a group

  bool constant() const { return span == 0; }
};

template <typename T>
struct ScanFnArgs {
  int64_t batch, dim, length, d_state, chunk, num_chunks;
  // Channels of `span` share B and C. `span_blocks` blocks of lanes have them, the last of which may be shorter;
  // `blocks` have all channels.
  int64_t span, span_blocks, blocks;
  bool softplus;
  ScanFnWalked<T> u, delta, z;  // z.data may be null
  const T* A;                   // (N, D)
  ScanFnProjection<T> B, C;
  const T *D, *bias;  // (D), or null
  T* out;             // (B, D, L)
  T* states;          // (B, D, num_chunks + 1, N): the state before each chunk, and after the last

  // Backward only.
  ScanFnWalked<T> grad;
  T *grad_u, *grad_delta, *grad_z;  // (B, D, L); grad_z null without z
  T* grad_A;                        // (B, num_chunks, N, D): one partial sum per chunk
  T *grad_B, *grad_C;               // (B, blocks, N, L): one per block of lanes; where constant as grad_A
  T *grad_D, *grad_bias;            // (B, num_chunks, D)
};

// One chunk of one block of lanes of image `b`. States are those from `n` to before `end`.
template <typename T>
struct ScanFnTable {
  // The outputs of the chunk; leaves the state after it in `states` if `keep_end`.
  void (*forward)(const ScanFnArgs<T>&, int64_t b, int64_t block, int64_t c, bool keep_end);
  // Only the state after the chunk.
  void (*advance)(const ScanFnArgs<T>&, int64_t b, int64_t block, int64_t c, int64_t n, int64_t end);
  // Gradients of the chunk. `after` (N, lanes): what reaches the state after the chunk; `before`, which may be the same
  // memory, gets what reaches the one before it. `scratch`: scan_fn_scratch() elements.
  void (*backward)(const ScanFnArgs<T>&, int64_t b, int64_t block, int64_t c, const T* after, T* before, T* scratch);
  // Only `before`.
  void (*retreat)(const ScanFnArgs<T>&, int64_t b, int64_t block, int64_t c, int64_t n, int64_t end, const T* after,
                  T* before);
};

// States that share a pass over the steps: more of them load less, and hold more registers.
constexpr int kScanFnStates = 2;

template <typename T>
inline int64_t scan_fn_scratch(const ScanFnArgs<T>& a) {
  return ((9 + 2 * kScanFnStates) * a.chunk + kScanFnStates) * (64 / sizeof(T));
}

}  // namespace mmvssm
