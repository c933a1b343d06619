#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../../../_core/csrc/dispatch.h"

namespace mmvssm {
namespace {

using at::Tensor;

Tensor unit_stride(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// (25, D): alpha_k * kernel_k laid out by FusionOffsets, the three centres added up.
Tensor fold(const Tensor& kernels, const Tensor& alpha) {
  const auto weighted = (kernels * alpha.view({3, 1, 1})).transpose(1, 2);  // (3, 9, D)
  const auto rings = at::cat({weighted.narrow(1, 0, 4), weighted.narrow(1, 5, 4)}, 1);
  return at::cat({weighted.select(1, 4).sum(0, true), rings.flatten(0, 1)}).contiguous();
}

template <typename T>
struct FusionCall {
  FusionArgs<T> a{};
  Tensor h, C, x, taps, D;

  FusionCall(const Tensor& h_, const Tensor& C_, const Tensor& x_, const Tensor& D_, const Tensor& kernels,
             const Tensor& alpha)
      : h(unit_stride(h_)), C(unit_stride(C_)), x(unit_stride(x_)), taps(fold(kernels, alpha)),
        D(D_.contiguous()) {
    a.batch = h.size(0), a.height = h.size(1), a.width = h.size(2), a.d_state = h.size(3);
    a.dim = h.size(4);
    a.h = h.const_data_ptr<T>(), a.C = C.const_data_ptr<T>(), a.x = x.const_data_ptr<T>();
    a.h_b = h.stride(0), a.h_y = h.stride(1), a.h_x = h.stride(2), a.h_n = h.stride(3);
    a.C_b = C.stride(0), a.C_y = C.stride(1), a.C_x = C.stride(2);
    a.x_b = x.stride(0), a.x_y = x.stride(1), a.x_x = x.stride(2);
    a.taps = taps.const_data_ptr<T>(), a.D = D.const_data_ptr<T>();
  }
};

// kernels: (3, D, 9) for dilations 1, 3, 5.
Tensor state_fusion(const Tensor& h, const Tensor& C, const Tensor& x, const Tensor& D,
                    const Tensor& kernels_, const Tensor& alpha) {
  const auto y = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "state_fusion", [&] {
    FusionCall<scalar_t> call(h, C, x, D, kernels_, alpha);
    call.a.y = y.mutable_data_ptr<scalar_t>();
    const auto& a = call.a;
    const auto& table = kernels().of<scalar_t>().fusion;
    at::parallel_for(0, a.batch * a.height, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) table.forward(a, i / a.height, i % a.height);
    });
  });
  return y;
}

// Returns the gradients of h, C, x, D, kernels, alpha.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> state_fusion_backward(
    const Tensor& grad, const Tensor& h, const Tensor& C, const Tensor& x, const Tensor& D,
    const Tensor& kernels_, const Tensor& alpha) {
  const auto opt = x.options();
  const int64_t batch = x.size(0), dim = x.size(3), V = 64 / x.element_size(), blocks = (dim + V - 1) / V;
  const auto grad_y = grad.contiguous();
  const auto grad_h = at::zeros(h.sizes(), opt), grad_x = at::empty(x.sizes(), opt);
  const auto grad_C = at::empty({blocks, batch, x.size(1), x.size(2), h.size(3)}, opt);
  const auto grad_taps = at::empty({batch, kFusionTaps, dim}, opt), grad_D = at::empty({batch, dim}, opt);
  if (x.numel())
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "state_fusion_backward", [&] {
      FusionCall<scalar_t> call(h, C, x, D, kernels_, alpha);
      auto& a = call.a;
      a.grad_y = grad_y.const_data_ptr<scalar_t>();
      a.grad_h = grad_h.mutable_data_ptr<scalar_t>();
      a.grad_C = grad_C.mutable_data_ptr<scalar_t>();
      a.grad_x = grad_x.mutable_data_ptr<scalar_t>();
      a.grad_taps = grad_taps.mutable_data_ptr<scalar_t>();
      a.grad_D = grad_D.mutable_data_ptr<scalar_t>();
      const auto& table = kernels().of<scalar_t>().fusion;
      at::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) table.backward(a, i / blocks, i % blocks * V);
      });
    });
  const auto by_tap = grad_taps.sum(0);                               // (25, D)
  const auto rings = by_tap.narrow(0, 1, 24).view({3, 8, dim});
  const auto centre = by_tap.narrow(0, 0, 1).expand({3, 1, dim});
  const auto weighted =
      at::cat({rings.narrow(1, 0, 4), centre, rings.narrow(1, 4, 4)}, 1).transpose(1, 2);  // (3, D, 9)
  return {grad_h,
          grad_C.sum(0),
          grad_x,
          grad_D.sum(0),
          weighted * alpha.view({3, 1, 1}),
          (weighted * kernels_).sum(at::IntArrayRef({1, 2}))};
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("state_fusion", state_fusion);
  m.def("state_fusion_backward", state_fusion_backward);
}

}  // namespace
}  // namespace mmvssm
