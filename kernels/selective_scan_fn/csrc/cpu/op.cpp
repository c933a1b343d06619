// Tensors in, tensors out: checks nothing (the interface has), prepares strides, runs the kernels of this machine's
// instruction set in PyTorch's threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>
#include <optional>
#include <vector>

#include "../../../_core/csrc/dispatch.h"

namespace mmvssm {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Tensor adjacent(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// Keeps the tensors that the arguments point into.
template <typename T>
struct ScanFnCall {
  static constexpr int64_t lanes = 64 / sizeof(T);
  ScanFnArgs<T> a{};
  Tensor u, delta, A, B, C, D, z, bias, grad;  // undefined where there is none
  int64_t rows;                                // blocks of lanes of all images

  ScanFnCall(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
             const OptTensor& D_, const OptTensor& z_, const OptTensor& bias_, bool softplus, int64_t chunk)
      : u(adjacent(u_)), delta(adjacent(delta_)), A(A_.t().contiguous()), B(of_states(B_)), C(of_states(C_)) {
    if (D_) D = D_->contiguous();
    if (z_) z = adjacent(*z_);
    if (bias_) bias = bias_->contiguous();
    a.batch = u.size(0), a.dim = u.size(1), a.length = u.size(2), a.d_state = A.size(0);
    a.chunk = chunk, a.num_chunks = (a.length + chunk - 1) / chunk;
    a.softplus = softplus;
    a.u = walked(u), a.delta = walked(delta), a.z = walked(z);
    a.A = data(A), a.D = data(D), a.bias = data(bias);
    a.B = projection(B), a.C = projection(C);
    a.span = std::gcd(a.dim, std::gcd(a.B.span, a.C.span));
    a.span_blocks = (a.span + lanes - 1) / lanes;
    a.blocks = a.dim / a.span * a.span_blocks;
    rows = a.batch * a.blocks;
  }

  static Tensor of_states(const Tensor& t) { return t.dim() == 2 ? t.t().contiguous() : adjacent(t); }
  static const T* data(const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; }
  static ScanFnWalked<T> walked(const Tensor& t) {
    return t.defined() ? ScanFnWalked<T>{data(t), t.stride(0), t.stride(1)} : ScanFnWalked<T>{};
  }
  ScanFnProjection<T> projection(const Tensor& t) const {
    if (t.dim() == 2) return {data(t), 0, 0, 0, 0};
    return {data(t), t.stride(0), t.stride(1), t.stride(2), a.dim / t.size(1)};
  }

  // Rows enough for the threads: each is walked from end to end. Far fewer: a first pass over the sequence, shared out
  // by states, finds the state before each chunk, and the chunks are shared out. The numbers are the same.
  bool split() const { return a.num_chunks > 1 && 2 * rows < at::get_num_threads(); }
  // work(image, block)
  template <typename F>
  void each_row(F work) const {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work(i / a.blocks, i % a.blocks);
    });
  }
  // work(image, block, first state, end of states)
  template <typename F>
  void each_states(F work) const {
    const int64_t parts = std::min(a.d_state, (at::get_num_threads() + rows - 1) / rows);
    at::parallel_for(0, rows * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / parts, part = i % parts;
        work(row / a.blocks, row % a.blocks, a.d_state * part / parts, a.d_state * (part + 1) / parts);
      }
    });
  }
  // work(image, block, chunk, scratch)
  template <typename F>
  void each_chunk(int64_t scratch, F work) const {
    at::parallel_for(0, rows * a.num_chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> memory(scratch);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / a.num_chunks;
        work(row / a.blocks, row % a.blocks, i % a.num_chunks, memory.data());
      }
    });
  }
};

template <typename T>
void forward(const ScanFnCall<T>& call) {
  const auto& a = call.a;
  const auto& table = kernels().of<T>().scan_fn;
  if (!call.split()) {
    call.each_row([&](int64_t b, int64_t block) {
      for (int64_t c = 0; c < a.num_chunks; ++c) table.forward(a, b, block, c, true);
    });
    return;
  }
  call.each_states([&](int64_t b, int64_t block, int64_t n, int64_t end) {
    for (int64_t c = 0; c < a.num_chunks; ++c) table.advance(a, b, block, c, n, end);
  });
  call.each_chunk(0, [&](int64_t b, int64_t block, int64_t c, T*) { table.forward(a, b, block, c, false); });
}

template <typename T>
void backward(const ScanFnCall<T>& call) {
  const auto& a = call.a;
  const auto& table = kernels().of<T>().scan_fn;
  const int64_t size = a.d_state * call.lanes, scratch = scan_fn_scratch(a);
  if (!call.split()) {
    call.each_row([&](int64_t b, int64_t block) {
      std::vector<T> carry(size), memory(scratch);
      for (int64_t c = a.num_chunks - 1; c >= 0; --c)
        table.backward(a, b, block, c, carry.data(), carry.data(), memory.data());
    });
    return;
  }
  // What reaches the state after each chunk.
  std::vector<T> carries(call.rows * a.num_chunks * size);
  const auto carry = [&](int64_t b, int64_t block, int64_t c) {
    return carries.data() + ((b * a.blocks + block) * a.num_chunks + c) * size;
  };
  call.each_states([&](int64_t b, int64_t block, int64_t n, int64_t end) {
    for (int64_t c = a.num_chunks - 1; c > 0; --c)
      table.retreat(a, b, block, c, n, end, carry(b, block, c), carry(b, block, c - 1));
  });
  call.each_chunk(scratch + size, [&](int64_t b, int64_t block, int64_t c, T* memory) {
    table.backward(a, b, block, c, carry(b, block, c), memory + scratch, memory);
  });
}

// Returns the output and the states before each chunk and after the last.
std::tuple<Tensor, Tensor> selective_scan_fn(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                             const Tensor& C, const OptTensor& D, const OptTensor& z,
                                             const OptTensor& bias, bool softplus, int64_t chunk) {
  const int64_t chunks = (u.size(2) + chunk - 1) / chunk;
  const auto out = at::empty(u.sizes(), u.options());
  const auto states = at::empty({u.size(0), u.size(1), chunks + 1, A.size(1)}, u.options());
  states.select(2, 0).zero_();
  if (u.numel())
    AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "selective_scan_fn", [&] {
      ScanFnCall<scalar_t> call(u, delta, A, B, C, D, z, bias, softplus, chunk);
      call.a.out = out.mutable_data_ptr<scalar_t>();
      call.a.states = states.mutable_data_ptr<scalar_t>();
      forward(call);
    });
  return {out, states};
}

// Returns the gradients of u, delta, A, B, C, D, z, bias; anything for what is absent.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_fn_backward(
    const Tensor& grad, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
    const OptTensor& D, const OptTensor& z, const OptTensor& bias, bool softplus, const Tensor& states,
    int64_t chunk) {
  const auto opt = u.options();
  const auto grad_u = at::empty(u.sizes(), opt), grad_delta = at::empty(u.sizes(), opt);
  const auto grad_z = z ? at::empty(u.sizes(), opt) : Tensor();
  const int64_t batch = u.size(0), dim = u.size(1), length = u.size(2), d_state = A.size(1);
  const int64_t sums = batch * (states.size(2) - 1);
  const auto parts_A = at::empty({sums, d_state, dim}, opt);
  const auto parts_D = at::empty({sums, dim}, opt), parts_bias = at::empty({sums, dim}, opt);
  Tensor parts_B, parts_C;
  AT_DISPATCH_FLOATING_TYPES(u.scalar_type(), "selective_scan_fn_backward", [&] {
    ScanFnCall<scalar_t> call(u, delta, A, B, C, D, z, bias, softplus, chunk);
    const auto kept = states.contiguous();
    call.grad = adjacent(grad);
    auto& a = call.a;
    const auto parts_of = [&](const Tensor& t) {
      return t.dim() == 2 ? at::empty_like(parts_A) : at::empty({batch, a.blocks, d_state, length}, opt);
    };
    parts_B = parts_of(B), parts_C = parts_of(C);
    const auto writable = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr; };
    a.states = writable(kept), a.grad = call.walked(call.grad);
    a.grad_u = writable(grad_u), a.grad_delta = writable(grad_delta), a.grad_z = writable(grad_z);
    a.grad_A = writable(parts_A), a.grad_B = writable(parts_B), a.grad_C = writable(parts_C);
    a.grad_D = writable(parts_D), a.grad_bias = writable(parts_bias);
    if (u.numel()) backward(call);
  });
  const auto total = [&](const Tensor& t, const Tensor& parts) {
    return t.dim() == 2 ? parts.sum(0).t() : parts.unflatten(1, {t.size(1), -1}).sum(2);
  };
  return {grad_u, grad_delta, total(A, parts_A), total(B, parts_B), total(C, parts_C), parts_D.sum(0), grad_z,
          parts_bias.sum(0)};
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("selective_scan_fn", selective_scan_fn);
  m.def("selective_scan_fn_backward", selective_scan_fn_backward);
}

}  // namespace
}  // namespace mmvssm
