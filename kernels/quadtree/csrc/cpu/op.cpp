#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../../../_core/csrc/dispatch.h"

namespace mmvssm {
namespace {

using at::Tensor;

Tensor unit_stride(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// work(b, first row, last row)
template <typename F>
void each_range(int64_t batch, int64_t length, F work) {
  at::parallel_for(0, batch * length, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t b = i / length, stop = std::min(end, (b + 1) * length);
      work(b, i - b * length, stop - b * length);
      i = stop;
    }
  });
}

Tensor quadtree(const Tensor& x_, const Tensor& selected_, const Tensor& coarse, const Tensor& fine,
                const Tensor& coarse_window, const Tensor& fine_window) {
  const auto y = at::empty(x_.sizes(), x_.options());
  if (x_.numel() == 0) return y;
  const auto x = unit_stride(x_), selected = selected_.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "quadtree", [&] {
    QuadtreeArgs<scalar_t> a{};
    a.length = x.size(1), a.dim = x.size(2);
    a.x = x.const_data_ptr<scalar_t>(), a.x_b = x.stride(0), a.x_l = x.stride(1);
    a.selected = selected.const_data_ptr<scalar_t>();
    a.coarse = coarse.const_data_ptr<int64_t>(), a.fine = fine.const_data_ptr<int64_t>();
    a.coarse_window = coarse_window.const_data_ptr<int64_t>();
    a.fine_window = fine_window.const_data_ptr<int64_t>();
    a.y = y.mutable_data_ptr<scalar_t>();
    const auto& table = kernels().of<scalar_t>().quadtree;
    each_range(x.size(0), a.length,
               [&](int64_t b, int64_t begin, int64_t end) { table.reorder(a, b, begin, end); });
  });
  return y;
}

// (B, L)
Tensor quadtree_dots(const Tensor& tokens_, const Tensor& sequence_, const Tensor& coarse, const Tensor& fine) {
  const auto dots = at::empty({tokens_.size(0), tokens_.size(1)}, tokens_.options());
  const auto tokens = unit_stride(tokens_), sequence = unit_stride(sequence_);
  AT_DISPATCH_FLOATING_TYPES(tokens.scalar_type(), "quadtree_dots", [&] {
    QuadtreeDotsArgs<scalar_t> a{};
    a.length = tokens.size(1), a.dim = tokens.size(2);
    a.tokens = tokens.const_data_ptr<scalar_t>(), a.sequence = sequence.const_data_ptr<scalar_t>();
    a.tokens_b = tokens.stride(0), a.tokens_l = tokens.stride(1);
    a.sequence_b = sequence.stride(0), a.sequence_l = sequence.stride(1);
    a.coarse = coarse.const_data_ptr<int64_t>(), a.fine = fine.const_data_ptr<int64_t>();
    a.dots = dots.mutable_data_ptr<scalar_t>();
    const auto& table = kernels().of<scalar_t>().quadtree;
    each_range(tokens.size(0), a.length,
               [&](int64_t b, int64_t begin, int64_t end) { table.dots(a, b, begin, end); });
  });
  return dots;
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("quadtree", quadtree);
  m.def("quadtree_dots", quadtree_dots);
}

}  // namespace
}  // namespace mmvssm
