// Enough of CUDA C++ to run kernels on the CPU, one thread of a block after the other: each is a fiber that runs until it
// waits for others. A shuffle waits for its warp, a barrier for the block; a warp runs until all of its threads wait at a
// barrier. Shared memory begins as NaN and has a guard behind it. What a kernel does must not depend on the order of
// threads: `descending` runs them from the last.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define MMVSSM_SHARED(name) float* name = emulator::shared.data()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using std::max;
using std::min;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
constexpr float kGuard = 12345.f;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = true;
};

// What threads that wait for each other share: how many have come, and how often all of them had.
struct Meeting {
  int arrived = 0, rounds = 0;
  float values[2][kWarp];
};

inline bool descending = false;
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting everyone;
inline std::vector<float> shared;
inline ucontext_t scheduler;
inline int current, threads;
inline bool progress;
inline void (*body)();

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s\n", message);
  std::abort();
}

inline void meet(Meeting& meeting, int size) {
  const int round = meeting.rounds;
  progress = true;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.rounds;
    return;
  }
  while (meeting.rounds == round) swapcontext(&fibers[current].context, &scheduler);
  progress = true;
}

// The value of lane `source`. A warp's next exchange uses other memory than this one, so that no lane is too late.
inline float exchange(float value, int source) {
  Meeting& warp = warps[current / kWarp];
  float* values = warp.values[warp.rounds % 2];
  values[current % kWarp] = value;
  meet(warp, kWarp);
  return values[source];
}

inline void enter() {
  body();
  progress = fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void run_block() {
  fibers.resize(std::max<size_t>(fibers.size(), threads));
  warps.assign(threads / kWarp, Meeting());
  everyone = Meeting();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr, fiber.done = false;
    makecontext(&fiber.context, enter, 0);
  }
  // A warp goes as far as it can before the others do, so that they miss a barrier that is not there.
  const int count = threads / kWarp;
  for (int left = threads; left > 0;) {
    bool moved = false;
    left = 0;
    for (int w = 0; w < count; ++w) {
      int waiting;
      do {
        progress = false, waiting = 0;
        for (int lane = 0; lane < kWarp; ++lane) {
          current = descending ? threads - 1 - w * kWarp - lane : w * kWarp + lane;
          if (fibers[current].done) continue;
          swapcontext(&scheduler, &fibers[current].context);
          waiting += !fibers[current].done;
        }
        moved |= progress;
      } while (progress);
      left += waiting;
    }
    if (!moved) fail("threads wait for each other forever");
  }
}

}  // namespace emulator

// As in CUDA, where they are variables.
inline dim3 blockIdx, blockDim;
struct ThreadIdx {
  struct {
    operator int() const { return emulator::current; }
  } x;
};
inline ThreadIdx threadIdx;

inline void __syncthreads() { emulator::meet(emulator::everyone, emulator::threads); }
inline void __syncwarp() { emulator::exchange(0.f, 0); }
// Within `width` neighbouring lanes.
inline float __shfl_up_sync(unsigned, float value, int distance, int width = emulator::kWarp) {
  const int lane = emulator::current % emulator::kWarp;
  return emulator::exchange(value, lane % width < distance ? lane : lane - distance);
}
inline float __shfl_down_sync(unsigned, float value, int distance, int width = emulator::kWarp) {
  const int lane = emulator::current % emulator::kWarp;
  return emulator::exchange(value, lane % width + distance < width ? lane + distance : lane);
}
inline float __shfl_xor_sync(unsigned, float value, int bits) {
  return emulator::exchange(value, emulator::current % emulator::kWarp ^ bits);
}

namespace mmvssm {
namespace scan {

using Stream = void*;

template <typename A>
void launch(void (*kernel)(A), dim3 blocks, int threads, int shared, Stream, const A& args) {
  static void (*running)(A);
  static const A* with;
  running = kernel, with = &args;
  emulator::body = [] { running(*with); };
  emulator::threads = threads, blockDim = dim3(threads);
  const unsigned count = blocks.x * blocks.y * blocks.z;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned block = emulator::descending ? count - 1 - i : i;
    blockIdx = dim3(block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y);
    emulator::shared.assign(shared + emulator::kWarp, emulator::kGuard);
    std::fill_n(emulator::shared.begin(), shared, std::numeric_limits<float>::quiet_NaN());
    emulator::run_block();
    for (int k = 0; k < emulator::kWarp; ++k)
      if (emulator::shared[shared + k] != emulator::kGuard) emulator::fail("a write behind the shared memory");
  }
}

}  // namespace scan
}  // namespace mmvssm
