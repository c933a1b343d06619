// What op.cpp calls, for T float, bfloat16, float16: the one is compiled without nvcc, the others without PyTorch.
#pragma once
#include <cuda_runtime_api.h>

#include "args.h"

namespace mmvssm {
namespace scan {

// Why the current device cannot run the kernels, or nullptr: they may have been compiled for others.
const char* why_not();

template <typename T>
Plan forward_plan(const Args<T>& a, int processors);
template <typename T>
Plan backward_plan(const Args<T>& a, int processors);

template <typename T>
void forward(const Args<T>& a, cudaStream_t stream);
template <typename T>
void backward(const Args<T>& a, cudaStream_t stream);
template <typename T>
void sum_parts(const SumArgs<T>& a, cudaStream_t stream);

}  // namespace scan
}  // namespace mmvssm
