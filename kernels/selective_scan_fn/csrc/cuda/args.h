// What the CUDA kernels of the scan read and write. Strides are in elements, steps have stride 1.
#pragma once
#include <cstdint>

namespace mmvssm {
namespace scan {

// Half precision as it lies in memory.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

constexpr int kWarp = 32;    // threads of a warp
constexpr int kChunk = 256;  // steps that a channel's threads take at a time; CHUNK in ops.py

// (B, D, L)
template <typename T>
struct Walked {
  const T* data;
  int64_t batch, channel;
};

// B or C: (B, G, N, L), or where `data` is null constant, (D, N).
template <typename T>
struct Projection {
  const T* data;
  int64_t batch, group, state;
  const float* constant;
  int32_t span;  // channels of a group
};

// How the work is cut, by launch.h.
struct Plan {
  int32_t warps;       // of a block of threads
  int32_t turns;       // in which a warp takes as many, in backward
  int32_t span;        // consecutive channels that share B and C
  int32_t span_blocks; // blocks of threads that share out a span
  int32_t blocks;      // those of an image
  int32_t chunks;      // of the sequence
  int32_t segments, segment_chunks;
};

template <typename T>
struct Args {
  int32_t batch, dim, length, d_state;
  bool softplus;
  int32_t alignment;  // in bytes, of every 8 steps of u, delta, z, grad and the outputs like them
  int32_t projection_alignment;
  Plan plan;
  Walked<T> u, delta, z;  // z.data may be null
  const float *A;         // (D, N)
  const float *D, *bias;  // (D) or null
  Projection<T> B, C;
  float* states;          // (B, D, chunks + 1, N): before each chunk, and after the last
  float* segment_steps;   // (segments, B, D): sums of the steps, in units of log(2)
  float* segment_states;  // (segments, B, D, N): what a segment makes of a state of zeros, or of no gradient
  T* out;                 // (B, D, L)

  // Backward only.
  Walked<T> grad;
  T *grad_u, *grad_delta, *grad_z;  // (B, D, L)
  float* grad_A;                    // (segments, B, D, N)
  float *grad_D, *grad_bias;        // (segments, B, D)
  float *grad_B, *grad_C;           // (B, blocks, N, chunks * kChunk), or (segments, B, D, N) where constant
};

// Partial sums over `count` blocks of an image, one after the other: (B, G, count, N, pitch) to (B, G, N, L).
template <typename T>
struct SumArgs {
  const float* parts;
  T* total;
  int32_t outer, count, d_state, length, pitch;
};

}  // namespace scan
}  // namespace mmvssm
