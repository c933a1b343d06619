// The selective scan over one chunk of tokens, sixteen channels (lanes) at a time. The recurrence walks the
// tokens; everything else is elementwise over lanes, and the step projection is recomputed from its low
// rank, so that nothing of the size of `x` is stored between forward and backward.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

// `Count` is Full<T>, or int for the last, shorter block.
template <typename T, typename Count>
struct Lane {
  const ScanArgs<T>& a;
  const int64_t b, k, c, lane;
  const Count count;  // channels of this block that exist
  const int64_t begin, end;
  const T *weight, *bias, *A;

  Lane(const ScanArgs<T>& a, int64_t b, int64_t k, int64_t c, int64_t lane, Count count)
      : a(a), b(b), k(k), c(c), lane(lane), count(count),
        begin(c * a.chunk), end(begin + a.chunk < a.length ? begin + a.chunk : a.length),
        weight(a.dt_weight + k * a.rank * a.dim + lane), bias(a.dt_bias + k * a.dim + lane),
        A(a.A + k * a.d_state * a.dim + lane) {}

  int64_t token(int64_t t) const {
    return a.order ? a.order[b * a.order_b + k * a.order_k + t] : t;
  }
  vec<T> x(int64_t token) const { return load(a.x + b * a.x_b + token * a.x_l + lane, count); }
  // Zero in lanes that do not exist, so that they add nothing to sums over channels.
  vec<T> A_n(int64_t n) const { return load(A + n * a.dim, count); }
  const T* B(int64_t token) const { return a.B + b * a.B_b + token * a.B_l + k * a.B_k; }
  const T* C(int64_t token) const { return a.C + b * a.C_b + token * a.C_l + k * a.C_k; }
  T* state(int64_t chunk) const {
    return a.states + ((b * a.directions + k) * a.num_chunks + chunk) * a.d_state * a.dim + lane;
  }
  vec<T> raw_step(int64_t token) const {
    const T* dt = a.dt + b * a.dt_b + token * a.dt_l + k * a.dt_k;
    vec<T> raw = load(bias, count);
    for (int64_t r = 0; r < a.rank; ++r) raw += dt[r] * load(weight + r * a.dim, count);
    return raw;
  }
};

// States are template parameters where it matters: with one state it stays in a register.
template <typename T, int kStates, typename Count>
void scan_forward(const ScanArgs<T>& a, int64_t b, int64_t k, int64_t c, int64_t lane, Count count,
                  bool keep_end) {
  const Lane<T, Count> w(a, b, k, c, lane, count);
  const int64_t N = kStates ? kStates : a.d_state;
  vec<T> h[kStates ? kStates : 256];
  for (int64_t n = 0; n < N; ++n) h[n] = load(w.state(c) + n * a.dim, w.count);
  const vec<T> skip = a.D ? load(a.D + k * a.dim + lane, w.count) : vec<T>{};
  for (int64_t t = w.begin; t < w.end; ++t) {
    const int64_t token = w.token(t);
    const vec<T> x = w.x(token), delta = softplus<T>(w.raw_step(token)), dx = delta * x;
    const T *B = w.B(token), *C = a.C ? w.C(token) : nullptr;
    vec<T> y = skip * x;
    for (int64_t n = 0; n < N; ++n) {
      h[n] = exp<T>(delta * w.A_n(n)) * h[n] + dx * B[n];
      if (C)
        y += C[n] * h[n];
      else
        store(a.y + ((b * a.length + token) * N + n) * a.dim + lane, h[n], w.count);
    }
    if (C) {
      T* out = a.y + (b * a.length + token) * a.dim + lane;
      store(out, k ? y + load(out, w.count) : y, w.count);
    }
  }
  if (keep_end)
    for (int64_t n = 0; n < N; ++n) store(w.state(c + 1) + n * a.dim, h[n], w.count);
}

template <typename T, typename Count>
void scan_summary(const ScanArgs<T>& a, int64_t b, int64_t k, int64_t c, int64_t lane, Count count, T* end,
                  T* decay) {
  const Lane<T, Count> w(a, b, k, c, lane, count);
  vec<T> h[256] = {}, elapsed{};
  for (int64_t t = w.begin; t < w.end; ++t) {
    const int64_t token = w.token(t);
    const vec<T> delta = softplus<T>(w.raw_step(token)), dx = delta * w.x(token);
    for (int64_t n = 0; n < a.d_state; ++n)
      h[n] = exp<T>(delta * w.A_n(n)) * h[n] + dx * w.B(token)[n];
    elapsed += delta;
  }
  for (int64_t n = 0; n < a.d_state; ++n) {
    store(end + n * a.dim + lane, h[n], w.count);
    store(decay + n * a.dim + lane, exp<T>(elapsed * w.A_n(n)), w.count);
  }
}

template <typename T, int kStates, typename Count>
void scan_backward(const ScanArgs<T>& a, int64_t b, int64_t k, int64_t c, int64_t lane, Count count, T* carry,
                   T* scratch) {
  constexpr int V = simd<T>::lanes;
  const Lane<T, Count> w(a, b, k, c, lane, count);
  const int64_t N = kStates ? kStates : a.d_state, steps = w.end - w.begin;
  T *deltas = scratch, *slopes = deltas + a.chunk * V, *before = slopes + a.chunk * V,
    *decays = before + a.chunk * N * V;

  vec<T> h[kStates ? kStates : 256];
  for (int64_t n = 0; n < N; ++n) h[n] = load(w.state(c) + n * a.dim, w.count);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t token = w.token(w.begin + i);
    vec<T> slope;
    const vec<T> delta = softplus<T>(w.raw_step(token), &slope), dx = delta * w.x(token);
    store(deltas + i * V, delta);
    store(slopes + i * V, slope);
    for (int64_t n = 0; n < N; ++n) {
      const vec<T> decay = exp<T>(delta * w.A_n(n));
      store(before + (i * N + n) * V, h[n]);
      store(decays + (i * N + n) * V, decay);
      h[n] = decay * h[n] + dx * w.B(token)[n];
    }
  }

  vec<T> g[kStates ? kStates : 256], grad_A[kStates ? kStates : 256], grad_D{};
  for (int64_t n = 0; n < N; ++n) g[n] = load(carry + n * V), grad_A[n] = vec<T>{};
  const vec<T> skip = a.D ? load(a.D + k * a.dim + lane, w.count) : vec<T>{};
  const int64_t block = lane / V;
  for (int64_t i = steps - 1; i >= 0; --i) {
    const int64_t token = w.token(w.begin + i), row = b * a.length + token;
    const vec<T> x = w.x(token), delta = load(deltas + i * V), dx = delta * x;
    const vec<T> gy = a.C ? load(a.grad_y + row * a.dim + lane, w.count) : vec<T>{};
    vec<T> grad_dx{}, grad_delta{};
    T* sums = a.grad_B + ((block * a.batch * a.length + row) * a.directions + k) * N;
    for (int64_t n = 0; n < N; ++n) {
      const T B = w.B(token)[n];
      const vec<T> h_before = load(before + (i * N + n) * V), decay = load(decays + (i * N + n) * V);
      if (a.C) {
        a.grad_C[((block * a.batch * a.length + row) * a.directions + k) * N + n] =
            sum<T>(gy * (decay * h_before + dx * B));
        g[n] += gy * w.C(token)[n];
      } else {
        g[n] += load(a.grad_y + (row * N + n) * a.dim + lane, w.count);
      }
      sums[n] = sum<T>(g[n] * dx);
      grad_dx += g[n] * B;
      g[n] *= decay;
      const vec<T> grad_exponent = g[n] * h_before;
      grad_delta += grad_exponent * w.A_n(n);
      grad_A[n] += grad_exponent * delta;
    }
    grad_delta += grad_dx * x;
    store(a.grad_delta + (row * a.directions + k) * a.dim + lane, grad_delta * load(slopes + i * V),
          w.count);
    T* grad_x = a.grad_x + row * a.dim + lane;
    const vec<T> gx = grad_dx * delta + skip * gy;
    store(grad_x, k ? gx + load(grad_x, w.count) : gx, w.count);
    grad_D += gy * x;
  }
  const int64_t part = ((b * a.num_chunks + c) * a.directions + k) * a.dim + lane;
  for (int64_t n = 0; n < N; ++n) {
    store(carry + n * V, g[n]);
    store(a.grad_A + (part - lane) * N + n * a.dim + lane, grad_A[n], w.count);
  }
  if (a.D) store(a.grad_D + part, grad_D, w.count);
}

template <typename T, typename Count>
void scan_carry(const ScanArgs<T>& a, int64_t b, int64_t k, int64_t c, int64_t lane, Count count, T* carry,
                T* decay) {
  constexpr int V = simd<T>::lanes;
  const Lane<T, Count> w(a, b, k, c, lane, count);
  const int64_t N = a.d_state;
  vec<T> g[256] = {}, elapsed{};
  for (int64_t t = w.end - 1; t >= w.begin; --t) {
    const int64_t token = w.token(t), row = b * a.length + token;
    const vec<T> delta = softplus<T>(w.raw_step(token));
    for (int64_t n = 0; n < N; ++n) {
      g[n] += a.C ? load(a.grad_y + row * a.dim + lane, w.count) * w.C(token)[n]
                  : load(a.grad_y + (row * N + n) * a.dim + lane, w.count);
      g[n] *= exp<T>(delta * w.A_n(n));
    }
    elapsed += delta;
  }
  for (int64_t n = 0; n < N; ++n) {
    store(carry + n * V, g[n]);
    store(decay + n * V, exp<T>(elapsed * w.A_n(n)));
  }
}

template <typename T>
constexpr ScanTable<T> scan_table() {
  using Args = ScanArgs<T>;
  return {[](const Args& a, int64_t b, int64_t k, int64_t c, int64_t lane, bool keep_end) {
            one_block<T>(a.dim, lane, [&](auto count) {
              if (a.d_state == 1)
                scan_forward<T, 1>(a, b, k, c, lane, count, keep_end);
              else
                scan_forward<T, 0>(a, b, k, c, lane, count, keep_end);
            });
          },
          [](const Args& a, int64_t b, int64_t k, int64_t c, int64_t lane, T* end, T* decay) {
            one_block<T>(a.dim, lane, [&](auto count) { scan_summary<T>(a, b, k, c, lane, count, end, decay); });
          },
          [](const Args& a, int64_t b, int64_t k, int64_t c, int64_t lane, T* carry, T* scratch) {
            one_block<T>(a.dim, lane, [&](auto count) {
              if (a.d_state == 1)
                scan_backward<T, 1>(a, b, k, c, lane, count, carry, scratch);
              else
                scan_backward<T, 0>(a, b, k, c, lane, count, carry, scratch);
            });
          },
          [](const Args& a, int64_t b, int64_t k, int64_t c, int64_t lane, T* carry, T* decay) {
            one_block<T>(a.dim, lane, [&](auto count) { scan_carry<T>(a, b, k, c, lane, count, carry, decay); });
          }};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
