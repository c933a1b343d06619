#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../../../_core/csrc/dispatch.h"

namespace mmvssm {
namespace {

using at::Tensor;

// (rows, D), a view wherever the leading dimensions are evenly spaced.
Tensor rows_of(const Tensor& t) {
  const auto rows = t.reshape({-1, t.size(-1)});
  return rows.stride(-1) == 1 ? rows : rows.contiguous();
}

template <typename T>
NormGateArgs<T> arguments(const Tensor& x, const Tensor& z, const Tensor& weight, const Tensor& bias,
                          double eps) {
  NormGateArgs<T> a{};
  a.rows = x.size(0), a.dim = x.size(1);
  a.x = x.const_data_ptr<T>(), a.x_row = x.stride(0);
  a.z = z.const_data_ptr<T>(), a.z_row = z.stride(0);
  a.weight = weight.const_data_ptr<T>(), a.bias = bias.const_data_ptr<T>();
  a.eps = eps;
  return a;
}

Tensor norm_gate(const Tensor& x_, const Tensor& z_, const Tensor& weight_, const Tensor& bias_, double eps) {
  const auto y = at::empty(x_.sizes(), x_.options());
  if (x_.numel() == 0) return y;
  const auto x = rows_of(x_), z = rows_of(z_), weight = weight_.contiguous(), bias = bias_.contiguous();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_gate", [&] {
    auto a = arguments<scalar_t>(x, z, weight, bias, eps);
    a.y = y.mutable_data_ptr<scalar_t>();
    const auto& table = kernels().of<scalar_t>().norm_gate;
    at::parallel_for(0, a.rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) table.forward(a, i);
    });
  });
  return y;
}

// Returns the gradients of x, z, weight, bias.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_gate_backward(const Tensor& grad, const Tensor& x_,
                                                              const Tensor& z_, const Tensor& weight_,
                                                              const Tensor& bias_, double eps) {
  const auto grad_x = at::empty(x_.sizes(), x_.options()), grad_z = at::empty(x_.sizes(), x_.options());
  if (x_.numel() == 0) return {grad_x, grad_z, at::zeros_like(weight_), at::zeros_like(bias_)};
  const auto x = rows_of(x_), z = rows_of(z_), weight = weight_.contiguous(), bias = bias_.contiguous();
  const auto grad_y = grad.contiguous();
  const int64_t blocks = (x.size(0) + kNormRowBlock - 1) / kNormRowBlock;
  const auto grad_affine = at::empty({blocks, 2, x.size(1)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "norm_gate_backward", [&] {
    auto a = arguments<scalar_t>(x, z, weight, bias, eps);
    a.grad_y = grad_y.const_data_ptr<scalar_t>();
    a.grad_x = grad_x.mutable_data_ptr<scalar_t>();
    a.grad_z = grad_z.mutable_data_ptr<scalar_t>();
    a.grad_affine = grad_affine.mutable_data_ptr<scalar_t>();
    const auto& table = kernels().of<scalar_t>().norm_gate;
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) table.backward(a, i);
    });
  });
  const auto affine = grad_affine.sum(0);
  return {grad_x, grad_z, affine.select(0, 0).clone(), affine.select(0, 1).clone()};
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("norm_gate", norm_gate);
  m.def("norm_gate_backward", norm_gate_backward);
}

}  // namespace
}  // namespace mmvssm
