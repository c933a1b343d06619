// What the quadtree kernels read and write; strides in elements, channels have stride 1.
#pragma once
#include <cstdint>

namespace mmvssm {

template <typename T>
struct QuadtreeArgs {
  int64_t length, dim;
  const T* x;  // (B, L, D)
  int64_t x_b, x_l;
  // Row i of the result is (1 - selected[coarse_window[i]]) x[coarse[i]] + selected[fine_window[i]] x[fine[i]].
  const T* selected;  // (B, 4)
  const int64_t *coarse, *fine, *coarse_window, *fine_window;  // (L)
  T* y;  // (B, L, D)
};

// dots[i] = tokens[i] . (sequence[fine[i]] - sequence[coarse[i]])
template <typename T>
struct QuadtreeDotsArgs {
  int64_t length, dim;
  const T *tokens, *sequence;  // (B, L, D)
  int64_t tokens_b, tokens_l, sequence_b, sequence_l;
  const int64_t *coarse, *fine;  // (L)
  T* dots;                       // (B, L)
};

template <typename T>
struct QuadtreeTable {
  // Rows begin to end of image b.
  void (*reorder)(const QuadtreeArgs<T>&, int64_t b, int64_t begin, int64_t end);
  void (*dots)(const QuadtreeDotsArgs<T>&, int64_t b, int64_t begin, int64_t end);
};

}  // namespace mmvssm
