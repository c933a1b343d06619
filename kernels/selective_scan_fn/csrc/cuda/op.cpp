#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <string>

#include "kernels.h"

namespace mmvssm {
namespace {

using at::Tensor;
using scan::kChunk;
using MaybeTensor = std::optional<Tensor>;

// The tensors of a call as the kernels read them: u, delta, z and varying B and C in one precision with adjacent steps,
// the others dense in float32.
struct Inputs {
  Tensor u, delta, A, B, C, D, z, bias, grad;  // undefined where there is none
  bool softplus;

  Inputs(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
         const MaybeTensor& D_, const MaybeTensor& z_, const MaybeTensor& bias_, bool softplus_)
      : u(u_), delta(delta_), A(parameter(A_)), B(B_), C(C_), softplus(softplus_) {
    if (D_) D = parameter(*D_);
    if (z_) z = *z_;
    if (bias_) bias = parameter(*bias_);
    auto type = u.scalar_type();
    for (const Tensor* t : {&delta, &B, &C, &z})
      if (t->defined() && t->dim() > 2 && t->scalar_type() != type) type = at::kFloat;
    for (Tensor* t : {&u, &delta, &B, &C, &z})
      if (t->defined()) *t = t->dim() > 2 ? walked(t->to(type)) : parameter(*t);
    TORCH_CHECK(u.size(2) <= std::numeric_limits<int32_t>::max() - kChunk, "selective_scan_fn: u has ", u.size(2),
                " steps, more than 32-bit numbers count");
  }

  static Tensor parameter(const Tensor& t) { return t.to(at::kFloat).contiguous(); }
  static Tensor walked(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }
};

// Bytes to which the eight steps of a thread are aligned in all tensors, as far as it matters.
int32_t alignment_of(std::initializer_list<const Tensor*> tensors) {
  for (const int64_t bytes : {16, 8}) {
    bool fits = true;
    for (const Tensor* t : tensors) {
      if (!t->defined() || t->dim() < 3) continue;
      fits &= reinterpret_cast<uintptr_t>(t->const_data_ptr()) % bytes == 0;
      for (int64_t d = 0; d + 1 < t->dim(); ++d) fits &= t->stride(d) * t->element_size() % bytes == 0;
    }
    if (fits) return bytes;
  }
  return 1;
}

const float* floats(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

template <typename T>
T* writable(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

template <typename T>
scan::Walked<T> walked(const Tensor& t) {
  if (!t.defined()) return {};
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

template <typename T>
scan::Projection<T> projection(const Tensor& t, int64_t dim) {
  if (t.dim() == 2) return {nullptr, 0, 0, 0, t.const_data_ptr<float>(), int32_t(dim)};
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), nullptr,
          int32_t(dim / t.size(1))};
}

template <typename T>
scan::Args<T> arguments(const Inputs& in) {
  scan::Args<T> a{};
  a.batch = in.u.size(0), a.dim = in.u.size(1), a.length = in.u.size(2), a.d_state = in.A.size(1);
  a.softplus = in.softplus;
  a.u = walked<T>(in.u), a.delta = walked<T>(in.delta), a.z = walked<T>(in.z), a.grad = walked<T>(in.grad);
  a.A = floats(in.A), a.D = floats(in.D), a.bias = floats(in.bias);
  a.B = projection<T>(in.B, a.dim), a.C = projection<T>(in.C, a.dim);
  a.projection_alignment = alignment_of({&in.B, &in.C});
  return a;
}

// f(T{}) for the type of half precision that the kernels have for `type`, or float.
template <typename F>
void with_type(at::ScalarType type, F f) {
  if (type == at::kBFloat16)
    f(scan::bfloat16{});
  else if (type == at::kHalf)
    f(scan::float16{});
  else
    f(float{});
}

int processors() {
  int device = 0, count = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

template <typename T>
std::pair<Tensor, Tensor> segments(scan::Args<T>& a, const Tensor& A) {
  const auto steps = at::empty({a.plan.segments, a.batch, a.dim}, A.options());
  const auto states = at::empty({a.plan.segments, a.batch, a.dim, a.d_state}, A.options());
  a.segment_steps = writable<float>(steps), a.segment_states = writable<float>(states);
  return {steps, states};
}

// Returns the output and the states before each chunk and after the last.
std::tuple<Tensor, Tensor> selective_scan_fn(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                             const Tensor& C, const MaybeTensor& D, const MaybeTensor& z,
                                             const MaybeTensor& bias, bool softplus, int64_t chunk) {
  TORCH_INTERNAL_ASSERT(chunk == kChunk);
  const c10::cuda::CUDAGuard guard(u.device());
  const Inputs in(u, delta, A, B, C, D, z, bias, softplus);
  const auto out = at::empty(u.sizes(), in.u.options());
  const int64_t chunks = (u.size(2) + chunk - 1) / chunk;
  const auto states = at::empty({u.size(0), u.size(1), chunks + 1, A.size(1)}, in.A.options());
  if (states.numel() == 0) return {out, states};
  with_type(in.u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto a = arguments<T>(in);
    a.alignment = alignment_of({&in.u, &in.delta, &in.z, &out});
    a.out = writable<T>(out), a.states = writable<float>(states);
    a.plan = scan::forward_plan(a, processors());
    const auto scratch = segments(a, in.A);
    scan::forward(a, c10::cuda::getCurrentCUDAStream());
  });
  return {out, states};
}

// Returns the gradients of u, delta, A, B, C, D, z, bias; anything for what is absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_fn_backward(
    const Tensor& grad, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const MaybeTensor& D, const MaybeTensor& z, const MaybeTensor& bias, bool softplus, const Tensor& states,
    int64_t chunk) {
  TORCH_INTERNAL_ASSERT(chunk == kChunk && states.is_contiguous());
  const c10::cuda::CUDAGuard guard(u.device());
  Inputs in(u, delta, A, B, C, D, z, bias, softplus);
  in.grad = Inputs::walked(grad.to(in.u.scalar_type()));
  const auto grad_u = at::empty(u.sizes(), in.u.options()), grad_delta = at::empty(u.sizes(), in.u.options());
  const auto grad_z = z ? at::empty(u.sizes(), in.u.options()) : Tensor();
  if (u.numel() == 0) {
    const auto none = [](const Tensor& t) { return t.defined() ? at::zeros_like(t) : t; };
    return {grad_u, grad_delta, none(in.A), none(in.B), none(in.C), none(in.D), grad_z, none(in.bias)};
  }
  Tensor grad_A, grad_B, grad_C, grad_D, grad_bias;
  with_type(in.u.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    auto a = arguments<T>(in);
    a.alignment = alignment_of({&in.u, &in.delta, &in.z, &in.grad, &grad_u});
    a.states = writable<float>(states);
    a.grad_u = writable<T>(grad_u), a.grad_delta = writable<T>(grad_delta), a.grad_z = writable<T>(grad_z);
    a.plan = scan::backward_plan(a, processors());
    const auto scratch = segments(a, in.A);
    const int64_t rows = int64_t(a.plan.segments) * a.batch, pitch = int64_t(a.plan.chunks) * kChunk;
    const auto parts_of = [&](const Tensor& t) {
      return t.dim() == 2 ? at::empty({rows, a.dim, a.d_state}, in.A.options())
                          : at::empty({a.batch, a.plan.blocks, a.d_state, pitch}, in.A.options());
    };
    const auto parts_B = parts_of(in.B), parts_C = parts_of(in.C), parts_A = at::empty({rows, a.dim, a.d_state},
                                                                                       in.A.options());
    const auto parts_D = at::empty({rows, a.dim}, in.A.options()), parts_bias = at::empty_like(parts_D);
    a.grad_A = writable<float>(parts_A), a.grad_B = writable<float>(parts_B), a.grad_C = writable<float>(parts_C);
    a.grad_D = writable<float>(parts_D), a.grad_bias = writable<float>(parts_bias);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    scan::backward(a, stream);
    const auto total = [&](const Tensor& t, const Tensor& parts) {
      if (t.dim() == 2) return parts.sum(0);
      const auto sum = at::empty(t.sizes(), t.options());
      const int32_t groups = t.size(1);
      scan::sum_parts(scan::SumArgs<T>{floats(parts), writable<T>(sum), a.batch * groups, a.plan.blocks / groups,
                                       a.d_state, a.length, int32_t(pitch)},
                      stream);
      return sum;
    };
    grad_A = parts_A.sum(0), grad_B = total(in.B, parts_B), grad_C = total(in.C, parts_C);
    if (D) grad_D = parts_D.sum(0);
    if (bias) grad_bias = parts_bias.sum(0);
  });
  return {grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias};
}

// See scan::why_not; empty where the device can.
std::string why_not(int64_t device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  const char* reason = scan::why_not();
  return reason ? reason : "";
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cuda, m) {
  m.def("why_not", why_not);
  m.def("selective_scan_fn", selective_scan_fn);
  m.def("selective_scan_fn_backward", selective_scan_fn_backward);
}

}  // namespace
}  // namespace mmvssm
