// What the kernels of the scan share: numbers, loads and stores of a thread's steps, and scans over lanes.
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
// Older GPUs, which never run this, may be on the list of those to compile for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
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

// Eight of them.
template <typename Piece, typename T>
__device__ __forceinline__ void copy_steps(const T* from, T* to) {
#pragma unroll
  for (int i = 0; i < int(8 * sizeof(T) / sizeof(Piece)); ++i)
    reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
}

// Steps from `p` on, of which `count` are there; the others are zero. Eight at a time are aligned.
template <typename T, int Steps>
__device__ __forceinline__ void load_steps(const T* p, int count, int alignment, float (&v)[Steps]) {
#pragma unroll
  for (int at = 0; at < Steps; at += 8) {
    alignas(16) T raw[8];
    if (count - at >= 8 && alignment >= 8) {
      if (alignment == 16)
        copy_steps<uint4>(p + at, raw);
      else
        copy_steps<uint2>(p + at, raw);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[at + i] = widen(raw[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[at + i] = at + i < count ? widen(p[at + i]) : 0.f;
    }
  }
}

template <typename T, int Steps>
__device__ __forceinline__ void store_steps(T* p, int count, int alignment, const float (&v)[Steps]) {
#pragma unroll
  for (int at = 0; at < Steps; at += 8) {
    alignas(16) T raw[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) narrow(v[at + i], raw[i]);
    if (count - at >= 8 && alignment >= 8) {
      if (alignment == 16)
        copy_steps<uint4>(raw, p + at);
      else
        copy_steps<uint2>(raw, p + at);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (at + i < count) p[at + i] = raw[i];
    }
  }
}

// Numbers of a chunk in shared memory: the first four steps of all lanes, then, `Pitch` floats on, the next four, so that
// 16-byte accesses of neighbouring lanes touch neighbouring bytes. Steps from 4 `piece` on of this lane:
template <int Pitch>
__device__ __forceinline__ void read_piece(const float* chunk, int piece, int lane, float (&v)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(chunk + piece * Pitch + 4 * lane);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}

template <int Pitch, int Steps>
__device__ __forceinline__ void read_chunk(const float* chunk, int lane, float (&v)[Steps]) {
#pragma unroll
  for (int piece = 0; piece < Steps / 4; ++piece) {
    float four[4];
    read_piece<Pitch>(chunk, piece, lane, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[4 * piece + i] = four[i];
  }
}

template <int Pitch, int Steps>
__device__ __forceinline__ void write_chunk(float* chunk, int piece, int lane, const float (&v)[Steps]) {
#pragma unroll
  for (int k = 0; k < Steps / 4; ++k)
    *reinterpret_cast<float4*>(chunk + (piece + k) * Pitch + 4 * lane) =
        float4{v[4 * k], v[4 * k + 1], v[4 * k + 2], v[4 * k + 3]};
}

// B or C of `states` states and of one chunk, into shared memory, by all threads of the block, for channels of `Lanes`
// lanes.
template <int Lanes, int Pitch, typename T>
__device__ __forceinline__ void stage(const T* from, int64_t stride, int states, int steps, int alignment, float* to) {
  constexpr int kEights = kChunk / 8, kOfLane = kEights / Lanes;
  for (int i = threadIdx.x; i < states * kEights; i += blockDim.x) {
    const int state = i / kEights, at = i % kEights;
    float v[8];
    load_steps(from + state * stride + at * 8, steps - at * 8, alignment, v);
    write_chunk<Pitch>(to + state * (2 * kOfLane * Pitch), at % kOfLane * 2, at / kOfLane, v);
  }
}

// Below a channel has `Lanes` neighbouring lanes of a warp.

// The sum over the lanes of a channel, in all of them.
template <int Lanes>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int k = 1; k < Lanes; k *= 2) x += __shfl_xor_sync(kAll, x, k);
  return x;
}

// One round of a scan over the lanes, up or down: the map h -> decay h + state of this lane after that of the lane K
// before it, or past it, if there is one. The shuffle says whether, which saves comparisons.
template <int K, bool Up, int Lanes>
__device__ __forceinline__ void compose_round(float& decay, float& state) {
#ifdef __CUDA_ARCH__
  constexpr int kOthers = (kWarp - Lanes) << 8;
  if constexpr (Up) {
    asm volatile(
        "{ .reg .pred here; .reg .f32 d, s;"
        " shfl.sync.up.b32 s|here, %1, %2, %3, -1; shfl.sync.up.b32 d, %0, %2, %3, -1;"
        " @here fma.rn.ftz.f32 %1, %0, s, %1; @here mul.rn.ftz.f32 %0, %0, d; }"
        : "+f"(decay), "+f"(state) : "n"(K), "n"(kOthers));
  } else {
    asm volatile(
        "{ .reg .pred here; .reg .f32 d, s;"
        " shfl.sync.down.b32 s|here, %1, %2, %3, -1; shfl.sync.down.b32 d, %0, %2, %3, -1;"
        " @here fma.rn.ftz.f32 %1, %0, s, %1; @here mul.rn.ftz.f32 %0, %0, d; }"
        : "+f"(decay), "+f"(state) : "n"(K), "n"(kOthers | (kWarp - 1)));
  }
#else
  const float s = Up ? __shfl_up_sync(kAll, state, K, Lanes) : __shfl_down_sync(kAll, state, K, Lanes);
  const float d = Up ? __shfl_up_sync(kAll, decay, K, Lanes) : __shfl_down_sync(kAll, decay, K, Lanes);
  const int lane = threadIdx.x % Lanes;
  if (Up ? lane >= K : lane + K < Lanes) {
    state = fmaf(decay, s, state);
    decay *= d;
  }
#endif
}

// Composes the maps of all lanes of a channel up to and including this one, or from this one on; after it `state` is
// what they make of zero.
template <bool Up, int Lanes>
__device__ __forceinline__ void compose(float decay, float& state) {
  compose_round<1, Up, Lanes>(decay, state);
  compose_round<2, Up, Lanes>(decay, state);
  compose_round<4, Up, Lanes>(decay, state);
  compose_round<8, Up, Lanes>(decay, state);
  if constexpr (Lanes == 32) compose_round<16, Up, Lanes>(decay, state);
}

// The channel of this lane, and where its numbers are.
template <typename T, int Lanes>
struct Place {
  static constexpr int kSteps = kChunk / Lanes, kRows = kWarp / Lanes;

  int lane, image, block, channel, segment;  // lane: of those of the channel
  bool here;  // else there is none, which counts as a channel without steps

  // turn: of those in which the block takes its channels.
  __device__ __forceinline__ explicit Place(const Args<T>& a, int turn = 0) {
    const Plan& plan = a.plan;
    lane = threadIdx.x % Lanes;
    image = blockIdx.x, block = blockIdx.y, segment = blockIdx.z;
    // Within the span:
    const int first = (block % plan.span_blocks * plan.turns + turn) * plan.warps * kRows + threadIdx.x / Lanes;
    here = first < plan.span;
    channel = block / plan.span_blocks * plan.span + (here ? first : 0);
  }

  // Steps from those of `lane` on in chunk `chunk`.
  __device__ __forceinline__ int steps(const Args<T>& a, int chunk) const {
    return here ? a.length - chunk * kChunk - lane * kSteps : 0;
  }

  __device__ __forceinline__ const T* at(const Walked<T>& t, int chunk) const {
    return t.data + image * t.batch + channel * t.channel + int64_t(chunk) * kChunk + lane * kSteps;
  }

  // Of a row in (B, D).
  __device__ __forceinline__ int64_t row(const Args<T>& a) const { return int64_t(image) * a.dim + channel; }

  __device__ __forceinline__ int64_t step(const Args<T>& a, int chunk) const {
    return row(a) * a.length + int64_t(chunk) * kChunk + lane * kSteps;
  }

  __device__ __forceinline__ const T* projection(const Projection<T>& p, int state, int chunk) const {
    return p.data + image * p.batch + channel / p.span * p.group + state * p.state + int64_t(chunk) * kChunk;
  }
};

// The steps in units of log(2), so that exponentials are to base 2.
template <typename T, int Lanes>
__device__ __forceinline__ void load_step_sizes(const Args<T>& a, const Place<T, Lanes>& place, int chunk, float bias,
                                                float (&step)[kChunk / Lanes]) {
  const int count = place.steps(a, chunk);
  load_steps(place.at(a.delta, chunk), count, a.alignment, step);
#pragma unroll
  for (int i = 0; i < kChunk / Lanes; ++i) {
    const float x = step[i] + bias;
    step[i] = i < count ? (a.softplus ? softplus2(x) : kLog2E * x) : 0.f;
  }
}

}  // namespace scan
}  // namespace mmvssm
