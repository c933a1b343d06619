// How the work is cut, and the launches. `launch(kernel, blocks, threads, floats of shared memory, stream, args)` starts
// a kernel: below on a GPU, in the tests on the CPU.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

#include "backward.h"
#include "forward.h"

namespace mmvssm {
namespace scan {

#ifdef __CUDACC__
using Stream = cudaStream_t;

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("selective_scan_fn: ") + cudaGetErrorString(status));
}

template <typename A>
void launch(void (*kernel)(A), dim3 blocks, int threads, int shared, Stream stream, const A& args) {
  const int bytes = shared * int(sizeof(float));
  if (bytes > 48 << 10) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<blocks, threads, bytes, stream>>>(args);
  check(cudaGetLastError());
}
#endif

inline int quotient_up(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// More states than this take the shared memory of fewer warps.
constexpr int kManyStates = 64;
// Warps that one multiprocessor should have before the sequence is cut no further.
constexpr int kEnoughWarps = 8;

// Turns in which a block of backward takes its channels, at most; fewer of many states.
constexpr int kMostTurns = 4;

// Spans of channels over warps and blocks; the sequence over segments where that makes few warps, which costs a pass
// over all but the last (in backward: the first) of them.
template <typename T>
Plan plan_for(const Args<T>& a, int most_warps, int rows, int processors) {
  Plan plan{};
  plan.span = std::gcd(a.B.span, a.C.span);
  plan.turns = 1;
  const int needed = quotient_up(plan.span, rows);
  plan.warps = std::min(needed, a.d_state > kManyStates ? std::min(most_warps, 4) : most_warps);
  plan.span_blocks = quotient_up(needed, plan.warps);
  plan.blocks = plan.span_blocks * (a.dim / plan.span);
  plan.chunks = quotient_up(a.length, kChunk);
  const int64_t warps = int64_t(a.batch) * plan.blocks * plan.warps, enough = int64_t(processors) * kEnoughWarps;
  const int segments = warps >= enough ? 1 : std::max(1, std::min(plan.chunks, quotient_up(enough, warps)));
  plan.segment_chunks = std::max(1, quotient_up(plan.chunks, segments));
  plan.segments = std::max(1, quotient_up(plan.chunks, plan.segment_chunks));
  return plan;
}

template <typename T>
Plan plan_forward(const Args<T>& a, int processors) {
  return plan_for(a, kForwardWarps, kWarp / kForwardLanes, processors);
}

// Blocks leave one sum each for B and C in memory. As many turns as cost no time: a GPU takes two blocks per
// multiprocessor at once, and waits for the last.
template <typename T>
Plan plan_backward(const Args<T>& a, int processors) {
  Plan plan = plan_for(a, kBackwardWarps, 1, processors);
  if (plan.segments > 1) return plan;
  const int spans = a.dim / plan.span, blocks = plan.span_blocks, at_once = std::max(1, 2 * processors);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int turns = 1; turns <= kMostTurns && (turns == 1 || turns * a.d_state <= kManyStates); ++turns) {
    const int span_blocks = quotient_up(blocks, turns);
    const int64_t time = int64_t(quotient_up(int64_t(a.batch) * spans * span_blocks, at_once)) * turns;
    if (time > least) continue;
    least = time;
    plan.turns = turns, plan.span_blocks = span_blocks, plan.blocks = spans * span_blocks;
  }
  return plan;
}

template <typename T, bool Varying>
void forward_with(const Args<T>& a, Stream stream) {
  const int threads = a.plan.warps * kWarp, shared = forward_shared(a.plan, a.d_state);
  if (a.plan.segments > 1)
    launch(scan_forward<T, Varying, true>, dim3(a.batch, a.plan.blocks, a.plan.segments - 1), threads, shared, stream, a);
  launch(scan_forward<T, Varying, false>, dim3(a.batch, a.plan.blocks, a.plan.segments), threads, shared, stream, a);
}

template <typename T>
void run_forward(const Args<T>& a, Stream stream) {
  a.B.data && a.C.data ? forward_with<T, true>(a, stream) : forward_with<T, false>(a, stream);
}

template <typename T, bool Varying>
void backward_with(const Args<T>& a, Stream stream) {
  const int threads = a.plan.warps * kWarp, shared = backward_shared(a.plan, a.d_state);
  if (a.plan.segments > 1)
    launch(scan_backward<T, Varying, true>, dim3(a.batch, a.plan.blocks, a.plan.segments), threads, shared, stream, a);
  launch(scan_backward<T, Varying, false>, dim3(a.batch, a.plan.blocks, a.plan.segments), threads, shared, stream, a);
}

template <typename T>
void run_backward(const Args<T>& a, Stream stream) {
  a.B.data && a.C.data ? backward_with<T, true>(a, stream) : backward_with<T, false>(a, stream);
}

template <typename T>
void run_sum(const SumArgs<T>& a, Stream stream) {
  const int64_t pieces = int64_t(a.outer) * a.d_state * (a.pitch / 4);
  if (pieces > 0) launch(sum_of_blocks<T>, dim3(quotient_up(pieces, 256)), 256, 0, stream, a);
}

}  // namespace scan
}  // namespace mmvssm
