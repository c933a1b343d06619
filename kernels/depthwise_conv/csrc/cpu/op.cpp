#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>

#include "../../../_core/csrc/dispatch.h"

namespace mmvssm {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Tensor unit_stride(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

template <typename T>
ConvArgs<T> arguments(const Tensor& x) {
  ConvArgs<T> a{};
  a.batch = x.size(0), a.height = x.size(1), a.width = x.size(2), a.dim = x.size(3);
  a.x = x.const_data_ptr<T>(), a.x_b = x.stride(0), a.x_y = x.stride(1), a.x_x = x.stride(2);
  return a;
}

template <typename T>
void rows(const ConvArgs<T>& a) {
  const auto& table = kernels().of<T>().conv;
  at::parallel_for(0, a.batch * a.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) table.forward(a, i / a.height, i % a.height);
  });
}

// weight: (D, 9)
Tensor depthwise_conv(const Tensor& x_, const Tensor& weight, const OptTensor& bias, bool residual,
                      bool silu) {
  const auto x = unit_stride(x_), taps = weight.t().contiguous();
  const auto shift = bias ? bias->contiguous() : Tensor();
  const auto added = residual ? x.contiguous() : Tensor();
  const auto y = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_conv", [&] {
    auto a = arguments<scalar_t>(x);
    a.weight = taps.const_data_ptr<scalar_t>();
    a.bias = bias ? shift.const_data_ptr<scalar_t>() : nullptr;
    a.residual = residual ? added.const_data_ptr<scalar_t>() : nullptr;
    a.silu = silu;
    a.y = y.mutable_data_ptr<scalar_t>();
    rows(a);
  });
  return y;
}

// Returns the gradients of x, weight, bias.
std::tuple<Tensor, Tensor, Tensor> depthwise_conv_backward(const Tensor& grad, const Tensor& x_,
                                                           const Tensor& weight, const OptTensor& bias,
                                                           bool residual, bool silu) {
  const auto x = unit_stride(x_), taps = weight.t().contiguous(), flipped = taps.flip(0);
  const auto shift = bias ? bias->contiguous() : Tensor();
  const auto grad_x = at::empty(x.sizes(), x.options());
  const auto grad_y = grad.contiguous();
  const auto grad_conv = silu ? at::empty(x.sizes(), x.options()) : grad_y;
  const int64_t blocks = (x.size(1) + kConvRowBlock - 1) / kConvRowBlock;
  const auto partial = at::empty({x.size(0) * blocks, 10, x.size(3)}, x.options());
  if (x.numel())
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_conv_backward", [&] {
      if (silu) {  // recompute the convolution, multiply by the slope of the activation
        auto a = arguments<scalar_t>(x);
        a.weight = taps.const_data_ptr<scalar_t>();
        a.bias = bias ? shift.const_data_ptr<scalar_t>() : nullptr;
        a.grad_y = grad_y.const_data_ptr<scalar_t>();
        a.silu = true;
        a.y = grad_conv.mutable_data_ptr<scalar_t>();
        rows(a);
      }
      auto a = arguments<scalar_t>(grad_conv);
      a.weight = flipped.const_data_ptr<scalar_t>();
      a.residual = residual ? grad_y.const_data_ptr<scalar_t>() : nullptr;
      a.y = grad_x.mutable_data_ptr<scalar_t>();
      rows(a);

      auto sums = arguments<scalar_t>(x);
      sums.grad_y = grad_conv.const_data_ptr<scalar_t>();
      sums.grad_weight = partial.mutable_data_ptr<scalar_t>();
      const auto& table = kernels().of<scalar_t>().conv;
      at::parallel_for(0, sums.batch * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) table.grad_weight(sums, i / blocks, i % blocks);
      });
    });
  const auto total = partial.sum(0);
  return {grad_x, total.narrow(0, 0, 9).t().contiguous(), total.select(0, 9).clone()};
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("depthwise_conv", depthwise_conv);
  m.def("depthwise_conv_backward", depthwise_conv_backward);
}

}  // namespace
}  // namespace mmvssm
