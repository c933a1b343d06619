// Rows of the quadtree re-orderings. The selection is nearly always one-hot, so that of the two rows that meet in
// one, a weight of zero leaves a row unread.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

template <typename T>
void quadtree_reorder(const QuadtreeArgs<T>& a, int64_t b, int64_t begin, int64_t end) {
  const T *x = a.x + b * a.x_b, *selected = a.selected + b * 4;
  for (int64_t i = begin; i < end; ++i) {
    const T outside = T(1) - selected[a.coarse_window[i]], inside = selected[a.fine_window[i]];
    const T *first = x + a.coarse[i] * a.x_l, *second = x + a.fine[i] * a.x_l;
    T* y = a.y + (b * a.length + i) * a.dim;
    each_block<T>(a.dim, [&](int64_t d, auto count) {
      vec<T> sum{};
      if (outside != 0) sum = outside * load(first + d, count);
      if (inside != 0) sum += inside * load(second + d, count);
      store(y + d, sum, count);
    });
  }
}

template <typename T>
void quadtree_dots(const QuadtreeDotsArgs<T>& a, int64_t b, int64_t begin, int64_t end) {
  const T* sequence = a.sequence + b * a.sequence_b;
  for (int64_t i = begin; i < end; ++i) {
    const T* token = a.tokens + b * a.tokens_b + i * a.tokens_l;
    const T *coarse = sequence + a.coarse[i] * a.sequence_l, *fine = sequence + a.fine[i] * a.sequence_l;
    vec<T> total{};
    each_block<T>(a.dim, [&](int64_t d, auto count) {
      total += load(token + d, count) * (load(fine + d, count) - load(coarse + d, count));
    });
    a.dots[b * a.length + i] = sum<T>(total);
  }
}

template <typename T>
constexpr QuadtreeTable<T> quadtree_table() {
  return {quadtree_reorder<T>, quadtree_dots<T>};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
