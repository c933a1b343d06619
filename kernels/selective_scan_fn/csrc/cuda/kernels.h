// What op.cpp calls, for T float, bfloat16, float16. It is compiled without CUDA's compiler, and launch.h without PyTorch.
#pragma once
#include <cuda_runtime_api.h>

#include "args.h"

namespace mmvssm {
namespace scan {

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
