#include "kernels.h"
#include "launch.h"

namespace mmvssm {
namespace scan {

const char* why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, scan_forward<float, true, false>);
  if (status == cudaSuccess) return nullptr;
  const bool of_code = status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction ||
                       status == cudaErrorInvalidKernelImage || status == cudaErrorUnsupportedPtxVersion;
  if (!of_code) return nullptr;  // some other error, which the launch reports
  cudaGetLastError();  // else the next launch would report it
  return cudaGetErrorString(status);
}

template <typename T>
Plan forward_plan(const Args<T>& a, int processors) {
  return plan_forward(a, processors);
}

template <typename T>
void forward(const Args<T>& a, cudaStream_t stream) {
  run_forward(a, stream);
}

#define MMVSSM_FORWARD(T)                          \
  template Plan forward_plan(const Args<T>&, int); \
  template void forward(const Args<T>&, cudaStream_t);
MMVSSM_FORWARD(float)
MMVSSM_FORWARD(bfloat16)
MMVSSM_FORWARD(float16)

}  // namespace scan
}  // namespace mmvssm
