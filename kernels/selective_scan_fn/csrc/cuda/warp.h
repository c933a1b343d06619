// What the kernels of the scan share: numbers, loads and stores of eight steps, and scans over the lanes of a warp.
#pragma once
#include "args.h"

namespace mmvssm {
namespace scan {

#ifdef __CUDACC__
#define MMVSSM_SHARED(name)                 \
  extern __shared__ float4 shared_memory[]; \
  float* name = reinterpret_cast<float*>(shared_memory)
#endif

constexpr unsigned kAll = 0xffffffffu;
constexpr int kStates = 8;  // states whose B and C are in shared memory at a time in backward
constexpr float kLn2 = 0.693147180559945f, kLog2E = 1.442695040888963f;

// One instruction of the special function unit; relative error 2e-7.
__device__ __forceinline__ float exp2_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// 2^(step * rate). An H100's exponential is too small in the mean, by about 2e-8, which a recurrence adds up over
// hundreds of steps; 2.4e-8 more in the exponent takes no instruction more.
__device__ __forceinline__ float decay_of(float step, float rate) {
#ifdef __CUDA_ARCH__
  return exp2_of(fmaf(step, rate, 2.4e-8f));
#else
  return exp2_of(step * rate);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_of(-kLog2E * x)); }

// softplus(x) / log(2), good to 5e-7 of its value, however small it is.
__device__ __forceinline__ float softplus2(float x) {
  const float v = kLog2E * x, e = exp2_of(-fabsf(v));
  // log2(1 + e) / e on [0, 1], by least relative error
  float p = fmaf(-0.0123194744810462f, e, 0.06360790133476257f);
  p = fmaf(p, e, -0.1553519070148468f);
  p = fmaf(p, e, 0.2560097575187683f);
  p = fmaf(p, e, -0.35339483618736267f);
  p = fmaf(p, e, 0.48006370663642883f);
  p = fmaf(p, e, -0.7213100790977478f);
  p = fmaf(p, e, 1.4426947832107544f);
  return fmaf(p, e, fmaxf(v, 0.f));
}

__device__ __forceinline__ float bits_as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return bits_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  _Float16 y;
  __builtin_memcpy(&y, &x.bits, 2);
  return y;
#endif
}

__device__ __forceinline__ void narrow(float x, float& y) { y = x; }
__device__ __forceinline__ void narrow(float x, bfloat16& y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}
__device__ __forceinline__ void narrow(float x, float16& y) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const _Float16 half = x;
  __builtin_memcpy(&y.bits, &half, 2);
#endif
}

template <typename Piece, typename T>
__device__ __forceinline__ void copy_steps(const T* from, T* to) {
#pragma unroll
  for (int i = 0; i < int(kSteps * sizeof(T) / sizeof(Piece)); ++i)
    reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
}

// Eight steps from `p` on, of which `count` are there; the others are zero.
template <typename T>
__device__ __forceinline__ void load_steps(const T* p, int count, int alignment, float (&v)[kSteps]) {
  alignas(16) T raw[kSteps];
  if (count >= kSteps && alignment >= 8) {
    if (alignment == 16)
      copy_steps<uint4>(p, raw);
    else
      copy_steps<uint2>(p, raw);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) v[i] = widen(raw[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) v[i] = i < count ? widen(p[i]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void store_steps(T* p, int count, int alignment, const float (&v)[kSteps]) {
  alignas(16) T raw[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) narrow(v[i], raw[i]);
  if (count >= kSteps && alignment >= 8) {
    if (alignment == 16)
      copy_steps<uint4>(raw, p);
    else
      copy_steps<uint2>(raw, p);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (i < count) p[i] = raw[i];
  }
}

// A chunk of numbers in shared memory: the first four steps of all lanes, then, `Half` floats on, the other four, so
// that 16-byte accesses of neighbouring lanes touch neighbouring bytes.
template <int Half = kChunk / 2>
__device__ __forceinline__ void read_chunk(const float* chunk, int lane, float (&v)[kSteps]) {
  const float4 low = *reinterpret_cast<const float4*>(chunk + 4 * lane);
  const float4 high = *reinterpret_cast<const float4*>(chunk + Half + 4 * lane);
  v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
  v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
}

template <int Half = kChunk / 2>
__device__ __forceinline__ void write_chunk(float* chunk, int lane, const float (&v)[kSteps]) {
  *reinterpret_cast<float4*>(chunk + 4 * lane) = float4{v[0], v[1], v[2], v[3]};
  *reinterpret_cast<float4*>(chunk + Half + 4 * lane) = float4{v[4], v[5], v[6], v[7]};
}

// B or C of `states` states and of one chunk, into shared memory, by all threads of the block.
template <typename T>
__device__ __forceinline__ void stage(const T* from, int64_t stride, int states, int steps, int alignment, float* to) {
  for (int i = threadIdx.x; i < states * kLanes; i += blockDim.x) {
    const int state = i / kLanes, lane = i % kLanes;
    float v[kSteps];
    load_steps(from + state * stride + lane * kSteps, steps - lane * kSteps, alignment, v);
    write_chunk(to + state * kChunk, lane, v);
  }
}

// The sum over the lanes, in all of them.
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int k = 1; k < kLanes; k *= 2) x += __shfl_xor_sync(kAll, x, k);
  return x;
}

// One round of a scan over the lanes, up or down: the map h -> decay h + state of this lane after that of the lane K
// before it, or past it, if there is one. The shuffle says whether, which saves comparisons.
template <int K, bool Up>
__device__ __forceinline__ void compose_round(float& decay, float& state) {
#ifdef __CUDA_ARCH__
  if constexpr (Up) {
    asm volatile(
        "{ .reg .pred here; .reg .f32 d, s;"
        " shfl.sync.up.b32 s|here, %1, %2, 0, -1; shfl.sync.up.b32 d, %0, %2, 0, -1;"
        " @here fma.rn.ftz.f32 %1, %0, s, %1; @here mul.rn.ftz.f32 %0, %0, d; }"
        : "+f"(decay), "+f"(state) : "n"(K));
  } else {
    asm volatile(
        "{ .reg .pred here; .reg .f32 d, s;"
        " shfl.sync.down.b32 s|here, %1, %2, 31, -1; shfl.sync.down.b32 d, %0, %2, 31, -1;"
        " @here fma.rn.ftz.f32 %1, %0, s, %1; @here mul.rn.ftz.f32 %0, %0, d; }"
        : "+f"(decay), "+f"(state) : "n"(K));
  }
#else
  const float s = Up ? __shfl_up_sync(kAll, state, K) : __shfl_down_sync(kAll, state, K);
  const float d = Up ? __shfl_up_sync(kAll, decay, K) : __shfl_down_sync(kAll, decay, K);
  const int lane = threadIdx.x % kLanes;
  if (Up ? lane >= K : lane + K < kLanes) {
    state = fmaf(decay, s, state);
    decay *= d;
  }
#endif
}

// Composes the maps of all lanes up to and including this one, or from this one on, for each of R channels; after it
// `state` is what they make of zero.
template <bool Up, int R>
__device__ __forceinline__ void compose(float (&decay)[R], float (&state)[R]) {
#pragma unroll
  for (int r = 0; r < R; ++r) compose_round<1, Up>(decay[r], state[r]);
#pragma unroll
  for (int r = 0; r < R; ++r) compose_round<2, Up>(decay[r], state[r]);
#pragma unroll
  for (int r = 0; r < R; ++r) compose_round<4, Up>(decay[r], state[r]);
#pragma unroll
  for (int r = 0; r < R; ++r) compose_round<8, Up>(decay[r], state[r]);
#pragma unroll
  for (int r = 0; r < R; ++r) compose_round<16, Up>(decay[r], state[r]);
}

// The channels of this warp, and where its numbers are.
template <typename T>
struct Place {
  int lane, warp, image, block, channel, rows, segment;

  // turn: of those in which the block takes its channels.
  __device__ __forceinline__ Place(const Args<T>& a, int rows_of_warp, int turn = 0) {
    const Plan& plan = a.plan;
    lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    image = blockIdx.x, block = blockIdx.y, segment = blockIdx.z;
    // Within the span:
    const int first = ((block % plan.span_blocks * plan.turns + turn) * plan.warps + warp) * rows_of_warp;
    rows = plan.span - first;  // those of the warp that are there; the others count as channels without steps
    channel = block / plan.span_blocks * plan.span + (rows > 0 ? first : 0);
  }

  // Steps of row r from those of `lane` on in chunk `chunk`, none in a row that is not there.
  __device__ __forceinline__ int steps(const Args<T>& a, int r, int chunk) const {
    return r < rows ? a.length - chunk * kChunk - lane * kSteps : 0;
  }

  __device__ __forceinline__ const T* at(const Walked<T>& t, int r, int chunk) const {
    return t.data + image * t.batch + (channel + r) * t.channel + int64_t(chunk) * kChunk + lane * kSteps;
  }

  // Of a row in (B, D).
  __device__ __forceinline__ int64_t row(const Args<T>& a, int r) const {
    return int64_t(image) * a.dim + channel + r;
  }

  __device__ __forceinline__ int64_t step(const Args<T>& a, int r, int chunk) const {
    return row(a, r) * a.length + int64_t(chunk) * kChunk + lane * kSteps;
  }

  __device__ __forceinline__ const T* projection(const Projection<T>& p, int state, int chunk) const {
    return p.data + image * p.batch + channel / p.span * p.group + state * p.state + int64_t(chunk) * kChunk;
  }
};

// The steps in units of log(2), so that exponentials are to base 2.
template <typename T>
__device__ __forceinline__ void load_step_sizes(const Args<T>& a, const Place<T>& place, int r, int chunk, float bias,
                                                float (&step)[kSteps]) {
  const int count = place.steps(a, r, chunk);
  load_steps(place.at(a.delta, r, chunk), count, a.alignment, step);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const float x = step[i] + bias;
    step[i] = i < count ? (a.softplus ? softplus2(x) : kLog2E * x) : 0.f;
  }
}

}  // namespace scan
}  // namespace mmvssm
