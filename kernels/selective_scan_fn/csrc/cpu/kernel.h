// The scan with Mamba's interface over one chunk of steps, sixteen channels (lanes) at a time. Tensors have adjacent
// steps, so that blocks of them are transposed on the way in and out. States come after one another: with one at hand,
// its B and C are rows of numbers as they lie in memory, and the recurrence stays in registers.
#pragma once

namespace mmvssm {
namespace MMVSSM_ISA {

// Steps of a tile in passes that go forward only; those of a few tensors fit the first cache.
constexpr int64_t kScanFnTile = 64;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A row of B or C at a step: one number for all lanes, or what stays as it is along the steps.
template <typename T>
struct VaryingRow {
  static constexpr bool varies = true;
  const T* data;
  vec<T> operator()(int64_t t) const { return splat<T>(data[t]); }
};
template <typename T>
struct ConstantRow {
  static constexpr bool varies = false;
  vec<T> value;
  vec<T> operator()(int64_t) const { return value; }
};

// One block of lanes of an image.
template <typename T>
struct ScanFnBlock {
  static constexpr int V = simd<T>::lanes;
  const ScanFnArgs<T>& a;
  const int64_t b, channel;
  const int count;  // channels that exist

  ScanFnBlock(const ScanFnArgs<T>& a, int64_t b, int64_t block)
      : a(a), b(b), channel(block / a.span_blocks * a.span + block % a.span_blocks * V),
        count(least(V, (block / a.span_blocks + 1) * a.span - channel)) {}

  // Steps from `t` as (steps, lanes), zero in lanes that do not exist.
  void read(const ScanFnWalked<T>& w, int64_t t, int64_t steps, T* tile) const {
    for (int64_t i = 0; count < V && i < steps; ++i) store(tile + i * V, vec<T>{});
    transpose(w.data + b * w.batch + channel * w.channel + t, w.channel, count, steps, tile, V);
  }
  void write(const T* tile, int64_t t, int64_t steps, T* out) const {
    transpose(tile, V, steps, count, out + (b * a.dim + channel) * a.length + t, a.length);
  }
  // What softplus makes of steps, or the steps as they are; `slopes` are its derivatives.
  void read_steps(int64_t t, int64_t steps, T* tile, T* slopes = nullptr) const {
    read(a.delta, t, steps, tile);
    const vec<T> bias = parameter(a.bias);
    for (int64_t i = 0; i < steps; ++i) {
      vec<T> step = load(tile + i * V) + bias, slope = splat<T>(1);
      if (a.softplus) step = softplus<T>(step, &slope);
      store(tile + i * V, step);
      if (slopes) store(slopes + i * V, slope);
    }
  }
  vec<T> parameter(const T* p) const { return p ? load(p + channel, count) : vec<T>{}; }
  // Row n of (N, D); zero in lanes that do not exist, so that they add nothing to sums over channels.
  vec<T> of_state(const T* p, int64_t n) const { return load(p + n * a.dim + channel, count); }
  vec<T> rate(int64_t n) const { return of_state(a.A, n); }
  void set(VaryingRow<T>& row, const ScanFnProjection<T>& p, int64_t n, int64_t t) const {
    row.data = p.data + b * p.batch + channel / p.span * p.group + n * p.state + t;
  }
  void set(ConstantRow<T>& row, const ScanFnProjection<T>& p, int64_t n, int64_t) const {
    row.value = of_state(p.data, n);
  }

  T* state(int64_t c, int lane) const {
    return a.states + ((b * a.dim + channel + lane) * (a.num_chunks + 1) + c) * a.d_state;
  }
  vec<T> read_state(int64_t c, int64_t n) const {
    T h[V] = {};
    for (int lane = 0; lane < count; ++lane) h[lane] = state(c, lane)[n];
    return load(h);
  }
  void write_state(int64_t c, int64_t n, vec<T> h) const {
    T lanes[V];
    store(lanes, h);
    for (int lane = 0; lane < count; ++lane) state(c, lane)[n] = lanes[lane];
  }
};

// body(row of B, row of C), of the kinds that they are.
template <typename T, typename F>
inline void with_rows(const ScanFnArgs<T>& a, F body) {
  if (a.B.constant())
    a.C.constant() ? body(ConstantRow<T>{}, ConstantRow<T>{}) : body(ConstantRow<T>{}, VaryingRow<T>{});
  else
    a.C.constant() ? body(VaryingRow<T>{}, ConstantRow<T>{}) : body(VaryingRow<T>{}, VaryingRow<T>{});
}

template <int kCount>
struct AtOnce {
  static constexpr int count = kCount;
};

// body(n, AtOnce<how many>) for the states from `n` to before `end`.
template <typename F>
inline void each_states(int64_t n, int64_t end, F body) {
  for (; n + kScanFnStates <= end; n += kScanFnStates) body(n, AtOnce<kScanFnStates>());
  for (; n < end; ++n) body(n, AtOnce<1>());
}

// With kOutput the outputs of the chunk, and its last state if asked for; else that alone.
template <typename T, bool kOutput>
void scan_fn_forward(const ScanFnArgs<T>& a, int64_t b, int64_t block, int64_t c, int64_t first, int64_t last,
                     bool keep_end) {
  constexpr int V = simd<T>::lanes;
  const ScanFnBlock<T> w(a, b, block);
  const int64_t begin = c * a.chunk, end = least(begin + a.chunk, a.length);
  alignas(64) T steps[kScanFnTile * V], u[kScanFnTile * V], drive[kScanFnTile * V], y[kScanFnTile * V];
  vec<T> h[256];
  for (int64_t n = first; n < last; ++n) h[n] = w.read_state(c, n);
  const vec<T> skip = w.parameter(a.D);
  for (int64_t t = begin; t < end; t += kScanFnTile) {
    const int64_t count = least(kScanFnTile, end - t);
    w.read_steps(t, count, steps);
    w.read(a.u, t, count, u);
    for (int64_t i = 0; i < count; ++i) {
      store(drive + i * V, load(steps + i * V) * load(u + i * V));
      if (kOutput) store(y + i * V, skip * load(u + i * V));
    }
    with_rows(a, [&](auto row_B, auto row_C) {
      each_states(first, last, [&](int64_t n, auto at_once) {
        constexpr int kStates = decltype(at_once)::count;
        decltype(row_B) B[kStates];
        decltype(row_C) C[kStates];
        vec<T> rate[kStates], now[kStates];
        for (int k = 0; k < kStates; ++k) {
          w.set(B[k], a.B, n + k, t), w.set(C[k], a.C, n + k, t);
          rate[k] = w.rate(n + k), now[k] = h[n + k];
        }
        for (int64_t i = 0; i < count; ++i) {
          const vec<T> step = load(steps + i * V), x = load(drive + i * V);
          vec<T> sum = kOutput ? load(y + i * V) : vec<T>{};
          for (int k = 0; k < kStates; ++k) {
            const vec<T> added = x * B[k](i);
            now[k] = exp<T>(step * rate[k]) * now[k] + added;
            if (kOutput) sum += C[k](i) * now[k];
          }
          if (kOutput) store(y + i * V, sum);
        }
        for (int k = 0; k < kStates; ++k) h[n + k] = now[k];
      });
    });
    if (!kOutput) continue;
    if (a.z.data) {
      T* z = u;
      w.read(a.z, t, count, z);
      for (int64_t i = 0; i < count; ++i) {
        const vec<T> gate = load(z + i * V);
        store(y + i * V, load(y + i * V) * (gate * sigmoid<T>(gate)));
      }
    }
    w.write(y, t, count, a.out);
  }
  if (keep_end)
    for (int64_t n = first; n < last; ++n) w.write_state(c + 1, n, h[n]);
}

// The gradient of what is gated; and with `slopes` that of the gate, where nothing is multiplied with it yet.
template <typename T>
void scan_fn_through_gate(const ScanFnBlock<T>& w, int64_t t, int64_t steps, T* grad, T* slopes, T* scratch) {
  constexpr int V = simd<T>::lanes;
  w.read(w.a.grad, t, steps, grad);
  if (!w.a.z.data) return;
  w.read(w.a.z, t, steps, scratch);
  for (int64_t i = 0; i < steps; ++i) {
    const vec<T> z = load(scratch + i * V), g = load(grad + i * V), open = sigmoid<T>(z);
    store(grad + i * V, g * (z * open));
    if (slopes) store(slopes + i * V, g * (open * (T(1) + z * (T(1) - open))));
  }
}

template <typename T>
void scan_fn_backward(const ScanFnArgs<T>& a, int64_t b, int64_t block, int64_t c, const T* after, T* before,
                      T* scratch) {
  constexpr int V = simd<T>::lanes, Q = kQuarter<T>;
  const ScanFnBlock<T> w(a, b, block);
  const int64_t begin = c * a.chunk, count = least(a.chunk, a.length - begin), tile = a.chunk * V;
  T *steps = scratch, *slopes = steps + tile, *u = slopes + tile, *drive = u + tile, *grad_y = drive + tile,
    *y = grad_y + tile, *grad_z = y + tile, *grad_drive = grad_z + tile, *grad_step = grad_drive + tile,
    // Of the states at hand, the decays, and the states before each step and after the last.
    *decays = grad_step + tile, *states = decays + kScanFnStates * tile;
  const bool gated = a.z.data;
  const vec<T> skip = w.parameter(a.D);
  w.read_steps(begin, count, steps, slopes);
  w.read(a.u, begin, count, u);
  scan_fn_through_gate(w, begin, count, grad_y, grad_z, y);
  for (int64_t i = 0; i < count; ++i) {
    const vec<T> x = load(u + i * V);
    store(drive + i * V, load(steps + i * V) * x);
    store(y + i * V, skip * x);
    store(grad_drive + i * V, vec<T>{});
    store(grad_step + i * V, vec<T>{});
  }
  const int64_t part = (b * a.num_chunks + c) * a.dim;  // where sums over the steps go
  with_rows(a, [&](auto row_B, auto row_C) {
    constexpr bool varying_B = decltype(row_B)::varies;
    constexpr bool varying_C = decltype(row_C)::varies;
    each_states(0, a.d_state, [&](int64_t n, auto at_once) {
      constexpr int kStates = decltype(at_once)::count;
      decltype(row_B) B[kStates];
      decltype(row_C) C[kStates];
      vec<T> rate[kStates], h[kStates], g[kStates], grad_A[kStates] = {}, grad_B[kStates] = {}, grad_C[kStates] = {};
      for (int k = 0; k < kStates; ++k) {
        w.set(B[k], a.B, n + k, begin), w.set(C[k], a.C, n + k, begin);
        rate[k] = w.rate(n + k), h[k] = w.read_state(c, n + k), g[k] = load(after + (n + k) * V);
        store(states + k * V, h[k]);
      }
      for (int64_t i = 0; i < count; ++i) {
        const vec<T> step = load(steps + i * V), x = load(drive + i * V);
        vec<T> sum{};
        for (int k = 0; k < kStates; ++k) {
          const vec<T> added = x * B[k](i), decay = exp<T>(step * rate[k]);
          h[k] = decay * h[k] + added;
          sum += C[k](i) * h[k];
          store(decays + (i * kStates + k) * V, decay);
          store(states + ((i + 1) * kStates + k) * V, h[k]);
        }
        if (gated) store(y + i * V, load(y + i * V) + sum);
      }
      for (int64_t t = (count - 1) / Q * Q; t >= 0; t -= Q) {
        const int64_t here = least(Q, count - t);
        vec<T> to_B[kStates][Q] = {}, to_C[kStates][Q] = {};
        for (int64_t q = here - 1; q >= 0; --q) {
          const int64_t i = t + q;
          const vec<T> gy = load(grad_y + i * V), step = load(steps + i * V), x = load(drive + i * V);
          vec<T> gx = load(grad_drive + i * V), gs = load(grad_step + i * V);
          for (int k = 0; k < kStates; ++k) {
            const T* around = states + (i * kStates + k) * V;
            (varying_C ? to_C[k][q] : grad_C[k]) += gy * load(around + kStates * V);
            g[k] += gy * C[k](i);
            (varying_B ? to_B[k][q] : grad_B[k]) += g[k] * x;
            gx += g[k] * B[k](i);
            g[k] *= load(decays + (i * kStates + k) * V);
            const vec<T> exponent = g[k] * load(around);
            gs += exponent * rate[k];
            grad_A[k] += exponent * step;
          }
          store(grad_drive + i * V, gx);
          store(grad_step + i * V, gs);
        }
        const auto put = [&](T* parts, const vec<T>* products, int k) {
          const quarter<T> sums = sum_each<T>(products);
          __builtin_memcpy(parts + ((b * a.blocks + block) * a.d_state + n + k) * a.length + begin + t, &sums,
                           here * sizeof(T));
        };
        for (int k = 0; k < kStates; ++k) {
          if (varying_B) put(a.grad_B, to_B[k], k);
          if (varying_C) put(a.grad_C, to_C[k], k);
        }
      }
      const auto put = [&](T* parts, vec<T> sum, int k) {
        store(parts + part * a.d_state + (n + k) * a.dim + w.channel, sum, w.count);
      };
      for (int k = 0; k < kStates; ++k) {
        store(before + (n + k) * V, g[k]);
        put(a.grad_A, grad_A[k], k);
        if (!varying_B) put(a.grad_B, grad_B[k], k);
        if (!varying_C) put(a.grad_C, grad_C[k], k);
      }
    });
  });
  vec<T> grad_D{}, grad_bias{};
  for (int64_t i = 0; i < count; ++i) {
    const vec<T> gy = load(grad_y + i * V), gx = load(grad_drive + i * V), x = load(u + i * V);
    const vec<T> grad_delta = (load(grad_step + i * V) + gx * x) * load(slopes + i * V);
    grad_D += gy * x;
    grad_bias += grad_delta;
    store(grad_step + i * V, grad_delta);
    store(grad_drive + i * V, gx * load(steps + i * V) + skip * gy);
    if (gated) store(grad_z + i * V, load(grad_z + i * V) * load(y + i * V));
  }
  store(a.grad_D + part + w.channel, grad_D, w.count);
  store(a.grad_bias + part + w.channel, grad_bias, w.count);
  w.write(grad_drive, begin, count, a.grad_u);
  w.write(grad_step, begin, count, a.grad_delta);
  if (gated) w.write(grad_z, begin, count, a.grad_z);
}

template <typename T>
void scan_fn_retreat(const ScanFnArgs<T>& a, int64_t b, int64_t block, int64_t c, int64_t first, int64_t last,
                     const T* after, T* before) {
  constexpr int V = simd<T>::lanes;
  const ScanFnBlock<T> w(a, b, block);
  const int64_t begin = c * a.chunk, end = least(begin + a.chunk, a.length);
  alignas(64) T steps[kScanFnTile * V], grad_y[kScanFnTile * V], scratch[kScanFnTile * V];
  vec<T> g[256];
  for (int64_t n = first; n < last; ++n) g[n] = load(after + n * V);
  for (int64_t t = begin + (end - begin - 1) / kScanFnTile * kScanFnTile; t >= begin; t -= kScanFnTile) {
    const int64_t count = least(kScanFnTile, end - t);
    w.read_steps(t, count, steps);
    scan_fn_through_gate<T>(w, t, count, grad_y, nullptr, scratch);
    with_rows(a, [&](auto, auto row_C) {
      each_states(first, last, [&](int64_t n, auto at_once) {
        constexpr int kStates = decltype(at_once)::count;
        decltype(row_C) C[kStates];
        vec<T> rate[kStates], now[kStates];
        for (int k = 0; k < kStates; ++k) w.set(C[k], a.C, n + k, t), rate[k] = w.rate(n + k), now[k] = g[n + k];
        for (int64_t i = count - 1; i >= 0; --i) {
          const vec<T> gy = load(grad_y + i * V), step = load(steps + i * V);
          for (int k = 0; k < kStates; ++k) {
            now[k] += gy * C[k](i);
            now[k] *= exp<T>(step * rate[k]);
          }
        }
        for (int k = 0; k < kStates; ++k) g[n + k] = now[k];
      });
    });
  }
  for (int64_t n = first; n < last; ++n) store(before + n * V, g[n]);
}

template <typename T>
constexpr ScanFnTable<T> scan_fn_table() {
  using Args = ScanFnArgs<T>;
  return {[](const Args& a, int64_t b, int64_t block, int64_t c, bool keep_end) {
            scan_fn_forward<T, true>(a, b, block, c, 0, a.d_state, keep_end);
          },
          [](const Args& a, int64_t b, int64_t block, int64_t c, int64_t n, int64_t end) {
            scan_fn_forward<T, false>(a, b, block, c, n, end, true);
          },
          scan_fn_backward<T>, scan_fn_retreat<T>};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
