// Forward. A warp has one or two channels and walks the chunks of a segment. A thread has eight consecutive steps of a
// chunk: for each state it runs the recurrence over them from zero, the lanes exchange what they found, and it runs
// again from the right state. One exponential per step and state. B and C of a chunk are in shared memory for all
// channels of the block.
#pragma once
#include "warp.h"

namespace mmvssm {
namespace scan {

// Warps of a block, at most, and blocks of a multiprocessor: 24 warps, for which a thread has 80 registers. What these
// spill costs less than fewer warps do: on an H100, 16 warps with 121 registers took 1.2 to 1.4 times as long.
constexpr int kForwardWarps = 8, kForwardBlocks = 3;
// States whose B and C are in shared memory at a time.
constexpr int kForwardStates = 16;

// Floats of shared memory: B and C; of each row A and the state.
inline int forward_shared(const Plan& plan, int d_state) {
  return 2 * kForwardStates * kChunk + 2 * plan.warps * plan.rows * d_state;
}

// Rows: channels of a warp; with more than one neither B nor C is constant. Summary: only what a segment does to a
// state.
template <typename T, int Rows, bool Summary>
__global__ void __launch_bounds__(kForwardWarps * kLanes, kForwardBlocks) scan_forward(const Args<T> a) {
  MMVSSM_SHARED(shared);
  const Place<T> place(a, Rows);
  const int lane = place.lane, N = a.d_state;
  float* of_warp = shared + 2 * kForwardStates * kChunk + 2 * place.warp * Rows * N;
  float *rates = of_warp, *carry = of_warp + Rows * N;  // (Rows, N)
  const bool B_varies = Rows > 1 || a.B.data, C_varies = Rows > 1 || a.C.data;
  const int64_t all_rows = int64_t(a.batch) * a.dim;

  float total[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const bool here = r < place.rows;
    const int channel = here ? place.channel + r : place.channel;
    total[r] = 0.f;
    for (int n = lane; n < N; n += kLanes) {
      const float rate = a.A[int64_t(channel) * N + n];
      float state = 0.f;
      if (!Summary && here) {
        for (int s = 0; s < place.segment; ++s) {
          const int64_t row = s * all_rows + place.row(a, r);
          state = fmaf(exp2_of(rate * a.segment_steps[row]), state, a.segment_states[row * N + n]);
        }
      }
      rates[r * N + n] = rate;
      carry[r * N + n] = state;
    }
  }

  const int first = place.segment * a.plan.segment_chunks;
  const int last = min(first + a.plan.segment_chunks, a.plan.chunks);
  for (int chunk = first; chunk < last; ++chunk) {
    float step[Rows][kSteps], drive[Rows][kSteps], y[Rows][kSteps], sum[Rows];
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const bool here = r < place.rows;
      // Read again for every chunk, since registers are scarce.
      const float skip = a.D && here ? a.D[place.channel + r] : 0.f;
      load_step_sizes(a, place, r, chunk, a.bias && here ? a.bias[place.channel + r] : 0.f, step[r]);
      load_steps(place.at(a.u, r, chunk), place.steps(a, r, chunk), a.alignment, drive[r]);
      sum[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        y[r][i] = skip * drive[r][i];
        drive[r][i] *= kLn2 * step[r][i];
        sum[r] += step[r][i];
      }
      total[r] += sum[r];
      if (!Summary && here) {
        float* states = a.states + (place.row(a, r) * (a.plan.chunks + 1) + chunk) * N;
        for (int n = lane; n < N; n += kLanes) states[n] = carry[r * N + n];
      }
    }

    for (int begin = 0; begin < N; begin += kForwardStates) {
      const int states = min(kForwardStates, N - begin), steps = a.length - chunk * kChunk;
      float *B = shared, *C = shared + kForwardStates * kChunk;
      __syncthreads();
      if (B_varies)
        stage(place.projection(a.B, begin, chunk), a.B.state, states, steps, a.projection_alignment, B);
      if (C_varies && !Summary)
        stage(place.projection(a.C, begin, chunk), a.C.state, states, steps, a.projection_alignment, C);
      __syncthreads();

      for (int i_state = 0; i_state < states; ++i_state) {
        const int n = begin + i_state;
        float decay[Rows][kSteps], add[Rows][kSteps], state[Rows], product[Rows], start[Rows], b[kSteps], c[kSteps];
        if (B_varies) {
          read_chunk(B + i_state * kChunk, lane, b);
        } else {
          const float constant = a.B.constant[int64_t(place.channel) * N + n];
#pragma unroll
          for (int i = 0; i < kSteps; ++i) b[i] = constant;
        }
#pragma unroll
        for (int r = 0; r < Rows; ++r) {
          const float rate = rates[r * N + n];
          start[r] = lane == 0 ? carry[r * N + n] : 0.f;
          product[r] = exp2_of(rate * sum[r]);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            decay[r][i] = decay_of(step[r][i], rate);
            add[r][i] = drive[r][i] * b[i];
            state[r] = i == 0 ? add[r][0] : fmaf(decay[r][i], state[r], add[r][i]);
          }
          state[r] = fmaf(product[r], start[r], state[r]);
        }
        compose<true>(product, state);
        __syncwarp();  // the first lane has read what the last one replaces
        if (lane == kLanes - 1) {
#pragma unroll
          for (int r = 0; r < Rows; ++r) carry[r * N + n] = state[r];
        }
        if constexpr (!Summary) {
          if (C_varies) {
            read_chunk(C + i_state * kChunk, lane, c);
          } else {
            const float constant = a.C.constant[int64_t(place.channel) * N + n];
#pragma unroll
            for (int i = 0; i < kSteps; ++i) c[i] = constant;
          }
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            float h = __shfl_up_sync(kAll, state[r], 1);
            h = lane == 0 ? start[r] : h;
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
              h = fmaf(decay[r][i], h, add[r][i]);
              y[r][i] = fmaf(c[i], h, y[r][i]);
            }
          }
        }
      }
    }

    if constexpr (!Summary) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const int count = place.steps(a, r, chunk);
        if (a.z.data) {
          float z[kSteps];
          load_steps(place.at(a.z, r, chunk), count, a.alignment, z);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) y[r][i] *= z[i] * sigmoid(z[i]);
        }
        store_steps(a.out + place.step(a, r, chunk), count, a.alignment, y[r]);
      }
    }
  }

  __syncwarp();
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const float steps = Summary ? sum_of_lanes(total[r]) : 0.f;
    if (r >= place.rows) continue;
    const int64_t row = place.row(a, r), of_segment = place.segment * all_rows + row;
    if (Summary && lane == 0) a.segment_steps[of_segment] = steps;
    float* states = Summary ? a.segment_states + of_segment * N
                            : a.states + (row * (a.plan.chunks + 1) + a.plan.chunks) * N;
    if (Summary || last == a.plan.chunks)
      for (int n = lane; n < N; n += kLanes) states[n] = carry[r * N + n];
  }
}

}  // namespace scan
}  // namespace mmvssm
