#include "kernels.h"
#include "launch.h"

namespace mmvssm {
namespace scan {

template <typename T>
Plan backward_plan(const Args<T>& a, int processors) {
  return plan_backward(a, processors);
}

template <typename T>
void backward(const Args<T>& a, cudaStream_t stream) {
  run_backward(a, stream);
}

template <typename T>
void sum_parts(const SumArgs<T>& a, cudaStream_t stream) {
  run_sum(a, stream);
}

#define MMVSSM_BACKWARD(T)                              \
  template Plan backward_plan(const Args<T>&, int);     \
  template void backward(const Args<T>&, cudaStream_t); \
  template void sum_parts(const SumArgs<T>&, cudaStream_t);
MMVSSM_BACKWARD(float)
MMVSSM_BACKWARD(bfloat16)
MMVSSM_BACKWARD(float16)

}  // namespace scan
}  // namespace mmvssm
