// Tensors in, tensors out: checks nothing (the interface has), prepares strides, runs the kernels of this
// machine's instruction set in PyTorch's threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "../../../_core/csrc/dispatch.h"

namespace mmvssm {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

Tensor unit_stride(const Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

template <typename T>
const T* data(const OptTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Keeps the tensors that the arguments point into.
template <typename T>
struct ScanCall {
  ScanArgs<T> a{};
  Tensor x, dt, B, weight, bias, A;
  OptTensor C, D, order;
  int64_t lane_blocks;

  ScanCall(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const OptTensor& C_,
           const Tensor& dt_weight, const Tensor& dt_bias, const OptTensor& D_, const OptTensor& order_,
           int64_t chunk)
      : x(unit_stride(x_)), dt(unit_stride(dt_)), B(unit_stride(B_)),
        weight(dt_weight.transpose(1, 2).contiguous()), bias(dt_bias.contiguous()),
        A(A_.transpose(1, 2).contiguous()) {
    if (C_) C = unit_stride(*C_);
    if (D_) D = D_->contiguous();
    if (order_) order = order_->expand({x.size(0), dt.size(2), x.size(1)}).to(at::kLong);
    if (order && order->stride(2) != 1) order = order->contiguous();
    a.batch = x.size(0), a.length = x.size(1), a.dim = x.size(2);
    a.directions = dt.size(2), a.rank = dt.size(3), a.d_state = B.size(3);
    a.chunk = chunk, a.num_chunks = (a.length + chunk - 1) / chunk;
    a.x = x.const_data_ptr<T>(), a.x_b = x.stride(0), a.x_l = x.stride(1);
    a.dt = dt.const_data_ptr<T>(), a.dt_b = dt.stride(0), a.dt_l = dt.stride(1), a.dt_k = dt.stride(2);
    a.B = B.const_data_ptr<T>(), a.B_b = B.stride(0), a.B_l = B.stride(1), a.B_k = B.stride(2);
    a.C = data<T>(C);
    if (C) a.C_b = C->stride(0), a.C_l = C->stride(1), a.C_k = C->stride(2);
    a.dt_weight = weight.const_data_ptr<T>(), a.dt_bias = bias.const_data_ptr<T>();
    a.A = A.const_data_ptr<T>(), a.D = data<T>(D);
    a.order = data<int64_t>(order);
    if (order) a.order_b = order->stride(0), a.order_k = order->stride(1);
    lane_blocks = (a.dim + lanes() - 1) / lanes();
  }

  static int64_t lanes() { return 64 / sizeof(T); }

  // Rows enough for every thread: walk each from end to end. Fewer (small batch, long sequence): split
  // the sequence as well, at the price of reading it twice.
  bool split_length() const {
    return a.batch * lane_blocks < at::get_num_threads() && a.num_chunks > 1;
  }

  // work(b, first block, last block): a thread's neighbouring blocks of lanes walk the tokens together,
  // chunk by chunk, so that they share cache lines and pages.
  template <typename F>
  void each_row(F work) const {
    at::parallel_for(0, a.batch * lane_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t b = i / lane_blocks, stop = std::min(end, (b + 1) * lane_blocks);
        work(b, i - b * lane_blocks, stop - b * lane_blocks);
        i = stop;
      }
    });
  }
  // work(b, chunk, block)
  template <typename F>
  void each_chunk(F work) const {
    at::parallel_for(0, a.batch * a.num_chunks * lane_blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        work(i / lane_blocks / a.num_chunks, i / lane_blocks % a.num_chunks, i % lane_blocks);
    });
  }
};

template <typename T>
void forward(ScanCall<T>& call) {
  const auto& a = call.a;
  const auto& table = kernels().of<T>().scan;
  const int64_t V = call.lanes(), state = a.d_state * a.dim;
  for (int64_t k = 0; k < a.directions; ++k) {
    if (!call.split_length()) {
      call.each_row([&](int64_t b, int64_t first, int64_t last) {
        for (int64_t c = 0; c < a.num_chunks; ++c)
          for (int64_t block = first; block < last; ++block)
            table.forward(a, b, k, c, block * V, c + 1 < a.num_chunks);
      });
      continue;
    }
    const auto decay = at::empty({a.batch, a.num_chunks, state}, call.x.options());
    T* decays = decay.template mutable_data_ptr<T>();
    T* states = a.states;
    const auto at_chunk = [&](int64_t b, int64_t c) {
      return states + ((b * a.directions + k) * a.num_chunks + c) * state;
    };
    call.each_chunk([&](int64_t b, int64_t c, int64_t block) {
      if (c + 1 < a.num_chunks)
        table.summary(a, b, k, c, block * V, at_chunk(b, c + 1), decays + (b * a.num_chunks + c) * state);
    });
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t c = 0; c + 1 < a.num_chunks; ++c)
        for (int64_t i = 0; i < state; ++i)
          at_chunk(b, c + 1)[i] += decays[(b * a.num_chunks + c) * state + i] * at_chunk(b, c)[i];
    call.each_chunk([&](int64_t b, int64_t c, int64_t block) {
      table.forward(a, b, k, c, block * V, false);
    });
  }
}

template <typename T>
void backward(ScanCall<T>& call) {
  const auto& a = call.a;
  const auto& table = kernels().of<T>().scan;
  const int64_t V = call.lanes(), carry_size = a.d_state * V;
  for (int64_t k = 0; k < a.directions; ++k) {
    if (!call.split_length()) {
      call.each_row([&](int64_t b, int64_t first, int64_t last) {
        std::vector<T> carry((last - first) * carry_size), scratch(scan_scratch(a));
        for (int64_t c = a.num_chunks - 1; c >= 0; --c)
          for (int64_t block = first; block < last; ++block)
            table.backward(a, b, k, c, block * V, &carry[(block - first) * carry_size], scratch.data());
      });
      continue;
    }
    const int64_t items = a.batch * a.num_chunks * call.lane_blocks;
    std::vector<T> carry(items * carry_size), decay(items * carry_size);
    const auto item = [&](int64_t b, int64_t c, int64_t block) {
      return ((b * a.num_chunks + c) * call.lane_blocks + block) * carry_size;
    };
    // carry[c] becomes what enters chunk c: what chunk c + 1 makes of its own entry.
    std::vector<T> made(items * carry_size);
    call.each_chunk([&](int64_t b, int64_t c, int64_t block) {
      table.carry(a, b, k, c, block * V, &made[item(b, c, block)], &decay[item(b, c, block)]);
    });
    const int64_t row = call.lane_blocks * carry_size;
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t c = a.num_chunks - 2; c >= 0; --c)
        for (int64_t i = item(b, c, 0), j = i + row; i < item(b, c, 0) + row; ++i, ++j)
          carry[i] = made[j] + decay[j] * carry[j];
    at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(scan_scratch(a));
      for (int64_t i = begin; i < end; ++i)
        table.backward(a, i / call.lane_blocks / a.num_chunks, k, i / call.lane_blocks % a.num_chunks,
                       i % call.lane_blocks * V, &carry[i * carry_size], scratch.data());
    });
  }
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& dt, const Tensor& A,
                                          const Tensor& B, const OptTensor& C, const Tensor& dt_weight,
                                          const Tensor& dt_bias, const OptTensor& D,
                                          const OptTensor& order, int64_t chunk) {
  const int64_t N = B.size(3), chunks = (x.size(1) + chunk - 1) / chunk;
  const auto y = C ? at::empty({x.size(0), x.size(1), x.size(2)}, x.options())
                   : at::empty({x.size(0), x.size(1), N, x.size(2)}, x.options());
  const auto states = at::empty({x.size(0), dt.size(2), chunks, N, x.size(2)}, x.options());
  if (chunks) states.select(2, 0).zero_();
  if (x.numel() == 0) return {y, states};
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "selective_scan", [&] {
    ScanCall<scalar_t> call(x, dt, A, B, C, dt_weight, dt_bias, D, order, chunk);
    call.a.y = y.mutable_data_ptr<scalar_t>();
    call.a.states = states.mutable_data_ptr<scalar_t>();
    forward(call);
  });
  return {y, states};
}

// Returns the gradients of x, the step before its softplus (B, L, K, D), A, B, C, D.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& grad, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
    const OptTensor& C, const Tensor& dt_weight, const Tensor& dt_bias, const OptTensor& D,
    const OptTensor& order, const Tensor& states, int64_t chunk) {
  const int64_t K = dt.size(2), N = B.size(3), chunks = states.size(2);
  const auto batch = x.size(0), length = x.size(1), dim = x.size(2);
  const auto opt = x.options();
  const auto grad_y = grad.contiguous(), kept = states.contiguous();
  const auto grad_x = at::empty({batch, length, dim}, opt);
  const auto grad_delta = at::empty({batch, length, K, dim}, opt);
  const int64_t blocks = (dim * x.element_size() + 63) / 64;
  const auto grad_B = at::empty({blocks, batch, length, K, N}, opt);
  const auto grad_C = C ? at::empty({blocks, batch, length, K, N}, opt) : at::empty({0}, opt);
  const auto grad_A = at::empty({batch, chunks, K, N, dim}, opt);
  const auto grad_D = D ? at::empty({batch, chunks, K, dim}, opt) : at::empty({0}, opt);
  if (x.numel())
    AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "selective_scan_backward", [&] {
      ScanCall<scalar_t> call(x, dt, A, B, C, dt_weight, dt_bias, D, order, chunk);
      auto& a = call.a;
      a.states = kept.mutable_data_ptr<scalar_t>();
      a.grad_y = grad_y.const_data_ptr<scalar_t>();
      a.grad_x = grad_x.mutable_data_ptr<scalar_t>();
      a.grad_delta = grad_delta.mutable_data_ptr<scalar_t>();
      a.grad_B = grad_B.mutable_data_ptr<scalar_t>();
      a.grad_C = grad_C.mutable_data_ptr<scalar_t>();
      a.grad_A = grad_A.mutable_data_ptr<scalar_t>();
      a.grad_D = grad_D.mutable_data_ptr<scalar_t>();
      backward(call);
    });
  return {grad_x,
          grad_delta,
          grad_A.sum(at::IntArrayRef({0, 1})).transpose(1, 2).contiguous(),
          grad_B.sum(0),
          C ? grad_C.sum(0) : grad_C,
          D ? grad_D.sum(at::IntArrayRef({0, 1})) : grad_D};
}

TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("selective_scan", selective_scan);
  m.def("selective_scan_backward", selective_scan_backward);
}

}  // namespace
}  // namespace mmvssm
