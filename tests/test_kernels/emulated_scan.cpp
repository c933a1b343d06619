// The CUDA kernels of selective_scan_fn on the CPU, for test_cuda_kernels.py, which has the same structures.
#include "cuda_emulator.h"
// The order matters: what follows is written for CUDA.
#include "launch.h"

namespace {

using namespace mmvssm::scan;

template <typename T>
int run(void* args_, int step, int processors) {
  auto& args = *static_cast<Args<T>*>(args_);
  if (step == 0) args.plan = plan_forward(args, processors);
  if (step == 1) args.plan = plan_backward(args, processors);
  if (step == 2) run_forward(args, nullptr);
  if (step == 3) run_backward(args, nullptr);
  if (step == 4) run_sum(*static_cast<SumArgs<T>*>(args_), nullptr);
  return 0;
}

}  // namespace

// step: 0 and 1 plan forward and backward, 2 and 3 run them, 4 adds up the parts of B or C. dtype: 0 float32, 1 bfloat16,
// 2 float16.
extern "C" void scan_step(void* args, int dtype, int step, int processors, int descending) {
  emulator::descending = descending;
  dtype == 0 ? run<float>(args, step, processors)
             : dtype == 1 ? run<bfloat16>(args, step, processors) : run<float16>(args, step, processors);
}

extern "C" int scan_sizes(int which) { return which ? sizeof(SumArgs<float>) : sizeof(Args<float>); }
