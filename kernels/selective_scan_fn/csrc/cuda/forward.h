// Forward. A warp has two channels side by side, of sixteen lanes each, and walks the chunks of a segment. A thread has
// sixteen consecutive steps of a chunk: for each state it runs the recurrence over them from zero, the lanes exchange
// what they found, and it runs again from the right state. One exponential per step and state. B and C of a chunk are in
// shared memory for all channels of the block.
#pragma once
#include "warp.h"

namespace mmvssm {
namespace scan {

constexpr int kForwardLanes = 16;
// Warps of a block, at most, and blocks of a multiprocessor: 24 warps, for which a thread has 80 registers.
constexpr int kForwardWarps = 8, kForwardBlocks = 3;
// States whose B and C are in shared memory at a time; floats between pieces, which begin 8 banks apart, and of a state.
constexpr int kForwardStates = 16, kForwardPitch = 4 * kForwardLanes + 8;
constexpr int kForwardState = kChunk / kForwardLanes / 4 * kForwardPitch;

// Floats of shared memory: B and C; of each channel A and the state.
inline int forward_shared(const Plan& plan, int d_state) {
  return 2 * kForwardStates * kForwardState + 2 * plan.warps * (kWarp / kForwardLanes) * d_state;
}

// Varying: neither B nor C is constant. Summary: only what a segment does to a state.
template <typename T, bool Varying, bool Summary>
__global__ void __launch_bounds__(kForwardWarps * kWarp, kForwardBlocks) scan_forward(const Args<T> a) {
  MMVSSM_SHARED(shared);
  const Place<T, kForwardLanes> place(a);
  constexpr int kSteps = place.kSteps;
  const int lane = place.lane, N = a.d_state;
  float *B = shared, *C = shared + kForwardStates * kForwardState;
  // Of this channel:
  float *rates = C + kForwardStates * kForwardState + threadIdx.x / kForwardLanes * 2 * N, *carry = rates + N;
  const bool B_varies = Varying || a.B.data, C_varies = Varying || a.C.data, here = place.here;
  const int64_t all_rows = int64_t(a.batch) * a.dim;

  for (int n = lane; n < N; n += kForwardLanes) {
    const float rate = a.A[int64_t(place.channel) * N + n];
    float state = 0.f;
    if (!Summary && here) {
      for (int s = 0; s < place.segment; ++s) {
        const int64_t row = s * all_rows + place.row(a);
        state = fmaf(exp2_of(rate * a.segment_steps[row]), state, a.segment_states[row * N + n]);
      }
    }
    rates[n] = rate;
    carry[n] = state;
  }

  float total = 0.f;
  const int first = place.segment * a.plan.segment_chunks;
  const int last = min(first + a.plan.segment_chunks, a.plan.chunks);
  for (int chunk = first; chunk < last; ++chunk) {
    float step[kSteps], drive[kSteps], y[kSteps], sum = 0.f;
    // Read again for every chunk, since registers are scarce.
    const float skip = a.D && here ? a.D[place.channel] : 0.f;
    load_step_sizes(a, place, chunk, a.bias && here ? a.bias[place.channel] : 0.f, step);
    load_steps(place.at(a.u, chunk), place.steps(a, chunk), a.alignment, drive);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      y[i] = skip * drive[i];
      drive[i] *= kLn2 * step[i];
      sum += step[i];
    }
    total += sum;
    __syncwarp();
    if (!Summary && here) {
      float* states = a.states + (place.row(a) * (a.plan.chunks + 1) + chunk) * N;
      for (int n = lane; n < N; n += kForwardLanes) states[n] = carry[n];
    }

    for (int begin = 0; begin < N; begin += kForwardStates) {
      const int states = min(kForwardStates, N - begin), steps = a.length - chunk * kChunk;
      __syncthreads();
      if (B_varies)
        stage<kForwardLanes, kForwardPitch>(place.projection(a.B, begin, chunk), a.B.state, states, steps,
                                            a.projection_alignment, B);
      if (C_varies && !Summary)
        stage<kForwardLanes, kForwardPitch>(place.projection(a.C, begin, chunk), a.C.state, states, steps,
                                            a.projection_alignment, C);
      __syncthreads();

      for (int i_state = 0; i_state < states; ++i_state) {
        const int n = begin + i_state;
        const float rate = rates[n], start = lane == 0 ? carry[n] : 0.f, product = exp2_of(rate * sum);
        const float *B_n = B + i_state * kForwardState, *C_n = C + i_state * kForwardState;
        const float B_constant = B_varies ? 0.f : a.B.constant[int64_t(place.channel) * N + n];
        const float C_constant = C_varies || Summary ? 0.f : a.C.constant[int64_t(place.channel) * N + n];
        float decay[kSteps], state = 0.f;
#pragma unroll
        for (int piece = 0; piece < kSteps / 4; ++piece) {
          float b[4] = {B_constant, B_constant, B_constant, B_constant};
          if (B_varies) read_piece<kForwardPitch>(B_n, piece, lane, b);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int i = 4 * piece + k;
            decay[i] = decay_of(step[i], rate);
            state = fmaf(decay[i], state, drive[i] * b[k]);
          }
        }
        state = fmaf(product, start, state);
        compose<true, kForwardLanes>(product, state);
        __syncwarp();  // the first lane has read what the last one replaces
        if (lane == kForwardLanes - 1) carry[n] = state;
        if constexpr (!Summary) {
          float h = __shfl_up_sync(kAll, state, 1, kForwardLanes);
          h = lane == 0 ? start : h;
#pragma unroll
          for (int piece = 0; piece < kSteps / 4; ++piece) {
            float b[4] = {B_constant, B_constant, B_constant, B_constant};
            float c[4] = {C_constant, C_constant, C_constant, C_constant};
            if (B_varies) read_piece<kForwardPitch>(B_n, piece, lane, b);
            if (C_varies) read_piece<kForwardPitch>(C_n, piece, lane, c);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const int i = 4 * piece + k;
              h = fmaf(decay[i], h, drive[i] * b[k]);
              y[i] = fmaf(c[k], h, y[i]);
            }
          }
        }
      }
    }

    if constexpr (!Summary) {
      const int count = place.steps(a, chunk);
      if (a.z.data) {
        float z[kSteps];
        load_steps(place.at(a.z, chunk), count, a.alignment, z);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) y[i] *= z[i] * sigmoid(z[i]);
      }
      store_steps(a.out + place.step(a, chunk), count, a.alignment, y);
    }
  }

  __syncwarp();
  const float steps = Summary ? sum_of_lanes<kForwardLanes>(total) : 0.f;
  if (!here) return;
  const int64_t row = place.row(a), of_segment = place.segment * all_rows + row;
  if (Summary && lane == 0) a.segment_steps[of_segment] = steps;
  float* states = Summary ? a.segment_states + of_segment * N : a.states + (row * (a.plan.chunks + 1) + a.plan.chunks) * N;
  if (Summary || last == a.plan.chunks)
    for (int n = lane; n < N; n += kForwardLanes) states[n] = carry[n];
}

}  // namespace scan
}  // namespace mmvssm
