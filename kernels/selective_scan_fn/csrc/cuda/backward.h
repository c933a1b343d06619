// Backward. With a_t the decay of step t and g the gradient that reaches the state, from the last step to the first:
//   g_t = C_t dy_t + q_{t+1},  q_t = a_t g_t
// A warp has one channel, or several in turns, and walks the chunks of a segment from the last to the first. For each
// state of a chunk it runs the recurrence again from the state that forward saved, and this one against it, both as
// forward does: over the eight steps of a thread from zero, then, after an exchange between lanes, from the right start.
// What the channels of a block give to B and C is added up in shared memory, in the order of the warps, and goes to
// memory block by block.
#pragma once
#include "warp.h"

namespace mmvssm {
namespace scan {

constexpr int kSteps = kChunk / kWarp;
constexpr int kStates = 8;  // states whose B and C are in shared memory at a time
// What a warp gives to B or C of one state and chunk; the halves begin 16 banks apart.
constexpr int kHalf = kChunk / 2 + 16, kPart = kHalf + kChunk / 2;

// Warps of a block, at most. There is room for as many parts, of zeros where there are fewer.
constexpr int kBackwardWarps = 8;

// Floats of shared memory: B and C; twice the parts of all warps; what OfChannel has.
inline int backward_shared(const Plan& plan, int d_state) {
  return 2 * kStates * kChunk + 2 * kBackwardWarps * 2 * kPart + plan.warps * plan.turns * (6 * d_state + 2);
}

// What a warp keeps of a channel, in shared memory behind the parts: A, the state before the chunk, q behind it, and
// sums for A, B, C, D and the bias.
struct OfChannel {
  float *rates, *before, *adjoint, *grad_A, *grad_B, *grad_C, *grad_D, *grad_bias;

  __device__ __forceinline__ OfChannel(const Plan& plan, int N, float* parts, int turn) {
    rates = parts + 2 * kBackwardWarps * 2 * kPart + (turn * plan.warps + threadIdx.x / kWarp) * (6 * N + 2);
    before = rates + N, adjoint = before + N, grad_A = adjoint + N, grad_B = grad_A + N, grad_C = grad_B + N;
    grad_D = grad_C + N, grad_bias = grad_D + 1;
  }
};

// Adds up the parts of all warps for B and C of one state and chunk, two steps a thread; `more`: to what the same
// thread found in earlier turns.
__device__ __forceinline__ void add_parts(const float* parts, float* grad_B, float* grad_C, bool more) {
  for (int i = threadIdx.x; i < kChunk; i += blockDim.x) {
    const bool of_C = i >= kChunk / 2;
    const int t = 2 * i % kChunk;
    float* to = of_C ? grad_C : grad_B;
    if (!to) continue;
    const float* from = parts + of_C * kPart + (t >> 2 & 1) * kHalf + (t >> 3) * 4 + (t & 3);
    float2 total = more ? *reinterpret_cast<const float2*>(to + t) : float2{0.f, 0.f};
#pragma unroll
    for (int w = 0; w < kBackwardWarps; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(from + w * 2 * kPart);
      total.x += part.x, total.y += part.y;
    }
    *reinterpret_cast<float2*>(to + t) = total;
  }
}

// Varying: neither B nor C is constant. Summary: only what a segment does to the gradient of the state.
template <typename T, bool Varying, bool Summary>
__global__ void __launch_bounds__(kBackwardWarps* kWarp, 2) scan_backward(const Args<T> a) {
  MMVSSM_SHARED(shared);
  const int lane = threadIdx.x % kWarp, N = a.d_state, chunks = a.plan.chunks;
  float *B = shared, *C = shared + kStates * kChunk, *parts = shared + 2 * kStates * kChunk;
  const bool B_varies = Varying || a.B.data, C_varies = Varying || a.C.data, gated = a.z.data;
  const int64_t all_rows = int64_t(a.batch) * a.dim;

  for (int turn = 0; turn < a.plan.turns; ++turn) {
    const Place<T, kWarp> place(a, turn);
    const OfChannel of(a.plan, N, parts, turn);
    for (int n = lane; n < N; n += kWarp) {
      const float rate = a.A[int64_t(place.channel) * N + n];
      float q = 0.f;
      if (!Summary && place.here) {
        for (int s = a.plan.segments - 1; s > place.segment; --s) {
          const int64_t later = s * all_rows + place.row(a);
          q = fmaf(exp2_of(rate * a.segment_steps[later]), q, a.segment_states[later * N + n]);
        }
      }
      of.rates[n] = rate, of.adjoint[n] = q, of.grad_A[n] = of.grad_B[n] = of.grad_C[n] = 0.f;
    }
    if (lane == 0) of.grad_D[0] = of.grad_bias[0] = 0.f;
  }
  if (!Summary)
    for (int i = threadIdx.x; i < 2 * kBackwardWarps * 2 * kPart; i += blockDim.x) parts[i] = 0.f;

  const int first = blockIdx.z * a.plan.segment_chunks, last = min(first + a.plan.segment_chunks, chunks);
  for (int chunk = last - 1; chunk >= first; --chunk) {
    for (int turn = 0; turn < a.plan.turns; ++turn) {
      const Place<T, kWarp> place(a, turn);
      const OfChannel of(a.plan, N, parts, turn);
      const bool here = place.here;
      const int count = place.steps(a, chunk);
      float step[kSteps], drive[kSteps], dy[kSteps], through_B[kSteps], through_A[kSteps], y[kSteps], sum = 0.f;
      load_step_sizes(a, place, chunk, a.bias && here ? a.bias[place.channel] : 0.f, step);
      load_steps(place.at(a.grad, chunk), count, a.alignment, dy);
      if (gated) {
        float z[kSteps];
        load_steps(place.at(a.z, chunk), count, a.alignment, z);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) dy[i] *= z[i] * sigmoid(z[i]);
      }
      if (!Summary) load_steps(place.at(a.u, chunk), count, a.alignment, drive);
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (!Summary) drive[i] *= kLn2 * step[i];
        through_B[i] = through_A[i] = y[i] = 0.f;
        sum += step[i];
      }
      __syncwarp();
      if (Summary) {
        const float steps = sum_of_lanes<kWarp>(sum);
        if (lane == 0) of.grad_D[0] += steps;  // there is no gradient of D here
      } else {
        const float* states = a.states + (place.row(a) * (chunks + 1) + chunk) * N;
        for (int n = lane; n < N; n += kWarp) of.before[n] = here ? states[n] : 0.f;
      }

      for (int begin = 0; begin < N; begin += kStates) {
        const int states = min(kStates, N - begin), steps = a.length - chunk * kChunk;
        __syncthreads();
        if (B_varies && !Summary)
          stage<kWarp, kChunk / 2>(place.projection(a.B, begin, chunk), a.B.state, states, steps, a.projection_alignment, B);
        if (C_varies)
          stage<kWarp, kChunk / 2>(place.projection(a.C, begin, chunk), a.C.state, states, steps, a.projection_alignment, C);
        __syncthreads();

        for (int i_state = 0; i_state < states; ++i_state) {
          const int n = begin + i_state;
          const float rate = of.rates[n], start = lane == 0 ? of.before[n] : 0.f;
          const float after = lane == kWarp - 1 ? of.adjoint[n] : 0.f;
          float decay[kSteps], b[kSteps], c[kSteps];
          if (C_varies) {
            read_chunk<kChunk / 2>(C + i_state * kChunk, lane, c);
          } else {
            const float constant = a.C.constant[int64_t(place.channel) * N + n];
#pragma unroll
            for (int i = 0; i < kSteps; ++i) c[i] = constant;
          }
#pragma unroll
          for (int i = 0; i < kSteps; ++i) decay[i] = decay_of(step[i], rate);
          const float product = exp2_of(rate * sum);
          float q = 0.f;
#pragma unroll
          for (int i = kSteps - 1; i >= 0; --i) q = decay[i] * fmaf(c[i], dy[i], q);
          q = fmaf(product, after, q);
          compose<false, kWarp>(product, q);
          __syncwarp();  // the last lane has read what the first one replaces
          if (lane == 0) of.adjoint[n] = q;
          if constexpr (!Summary) {
            float behind = __shfl_down_sync(kAll, q, 1);
            behind = lane == kWarp - 1 ? after : behind;

            if (B_varies) {
              read_chunk<kChunk / 2>(B + i_state * kChunk, lane, b);
            } else {
              const float constant = a.B.constant[int64_t(place.channel) * N + n];
#pragma unroll
              for (int i = 0; i < kSteps; ++i) b[i] = constant;
            }
            float h = drive[0] * b[0];
#pragma unroll
            for (int i = 1; i < kSteps; ++i) h = fmaf(decay[i], h, drive[i] * b[i]);
            h = fmaf(product, start, h);
            compose<true, kWarp>(product, h);
            float state = __shfl_up_sync(kAll, h, 1), kept[kSteps], part[kSteps], of_A = 0.f;
            state = lane == 0 ? start : state;

            float* parts_n = parts + (n & 1) * kBackwardWarps * 2 * kPart;
            float* mine = parts_n + (threadIdx.x / kWarp) * 2 * kPart;
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
              kept[i] = decay[i] * state;
              state = fmaf(drive[i], b[i], kept[i]);
              part[i] = dy[i] * state;
            }
            if (gated) {
#pragma unroll
              for (int i = 0; i < kSteps; ++i) y[i] = fmaf(c[i], fmaf(drive[i], b[i], kept[i]), y[i]);
            }
            if (C_varies) {
              write_chunk<kHalf>(mine + kPart, 0, lane, part);
            } else {
              float of_C = 0.f;
#pragma unroll
              for (int i = 0; i < kSteps; ++i) of_C += part[i];
              of_C = sum_of_lanes<kWarp>(of_C);
              if (lane == 0) of.grad_C[n] += of_C;
            }
#pragma unroll
            for (int i = kSteps - 1; i >= 0; --i) {
              const float g = fmaf(c[i], dy[i], behind), w = g * kept[i];
              behind = decay[i] * g;
              through_B[i] = fmaf(g, b[i], through_B[i]);
              through_A[i] = fmaf(rate, w, through_A[i]);
              of_A = fmaf(step[i], w, of_A);
              part[i] = drive[i] * g;
            }
            if (B_varies) {
              write_chunk<kHalf>(mine, 0, lane, part);
            } else {
              float of_B = 0.f;
#pragma unroll
              for (int i = 0; i < kSteps; ++i) of_B += part[i];
              of_B = sum_of_lanes<kWarp>(of_B);
              if (lane == 0) of.grad_B[n] += of_B;
            }
            of_A = sum_of_lanes<kWarp>(of_A);
            if (lane == 0) of.grad_A[n] = fmaf(kLn2, of_A, of.grad_A[n]);
            if (B_varies || C_varies) {
              const int64_t block = int64_t(blockIdx.x) * a.plan.blocks + blockIdx.y;
              const int64_t at = ((block * N + n) * chunks + chunk) * kChunk;
              __syncthreads();
              add_parts(parts_n, B_varies ? a.grad_B + at : nullptr, C_varies ? a.grad_C + at : nullptr, turn > 0);
            }
          }
        }
      }

      if constexpr (!Summary) {
        // Read again, since registers are scarce.
        const float bias = a.bias && here ? a.bias[place.channel] : 0.f, skip = a.D && here ? a.D[place.channel] : 0.f;
        float u[kSteps], x[kSteps];
        load_steps(place.at(a.u, chunk), count, a.alignment, u);
        load_steps(place.at(a.delta, chunk), count, a.alignment, x);
        float grad_u[kSteps], grad_delta[kSteps], of_D = 0.f, of_bias = 0.f;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          grad_u[i] = fmaf(kLn2 * step[i], through_B[i], skip * dy[i]);
          grad_delta[i] = fmaf(u[i], through_B[i], through_A[i]);
          if (a.softplus) grad_delta[i] *= sigmoid(x[i] + bias);
          if (i < count) of_bias += grad_delta[i];
          of_D = fmaf(dy[i], u[i], of_D);
        }
        of_D = sum_of_lanes<kWarp>(of_D), of_bias = sum_of_lanes<kWarp>(of_bias);
        if (lane == 0) of.grad_D[0] += of_D, of.grad_bias[0] += of_bias;
        store_steps(a.grad_u + place.step(a, chunk), count, a.alignment, grad_u);
        store_steps(a.grad_delta + place.step(a, chunk), count, a.alignment, grad_delta);
        if (gated) {
          float z[kSteps], grad[kSteps];
          load_steps(place.at(a.z, chunk), count, a.alignment, z);
          load_steps(place.at(a.grad, chunk), count, a.alignment, grad);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            const float gate = sigmoid(z[i]);
            grad[i] *= fmaf(skip, u[i], y[i]) * gate * fmaf(z[i], 1.f - gate, 1.f);
          }
          store_steps(a.grad_z + place.step(a, chunk), count, a.alignment, grad);
        }
      }
    }
  }

  __syncwarp();
  for (int turn = 0; turn < a.plan.turns; ++turn) {
    const Place<T, kWarp> place(a, turn);
    const OfChannel of(a.plan, N, parts, turn);
    if (!place.here) break;
    const int64_t row = place.segment * all_rows + place.row(a);
    if (Summary) {
      if (lane == 0) a.segment_steps[row] = of.grad_D[0];
      for (int n = lane; n < N; n += kWarp) a.segment_states[row * N + n] = of.adjoint[n];
    } else {
      if (lane == 0) a.grad_D[row] = of.grad_D[0], a.grad_bias[row] = of.grad_bias[0];
      for (int n = lane; n < N; n += kWarp) {
        a.grad_A[row * N + n] = of.grad_A[n];
        if (!B_varies) a.grad_B[row * N + n] = of.grad_B[n];
        if (!C_varies) a.grad_C[row * N + n] = of.grad_C[n];
      }
    }
  }
}

// Four steps a thread.
template <typename T>
__global__ void __launch_bounds__(256) sum_of_blocks(const SumArgs<T> a) {
  const int64_t rows = int64_t(a.outer) * a.d_state, pieces = a.pitch / 4;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * pieces) return;
  const int64_t row = i / pieces, outer = row / a.d_state, n = row % a.d_state;
  const int t = int(i % pieces) * 4;
  const float* from = a.parts + (outer * a.count * a.d_state + n) * a.pitch + t;
  float total[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int k = 0; k < a.count; ++k) {
    const float4 part = *reinterpret_cast<const float4*>(from + int64_t(k) * a.d_state * a.pitch);
    total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (t + j < a.length) narrow(total[j], a.total[row * a.length + t + j]);
}

}  // namespace scan
}  // namespace mmvssm
