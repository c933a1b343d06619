// The CPU kernels for AVX2 and FMA (Haswell, Zen and later).
// Standard headers come before the pragma: their inline functions are shared with the rest of the
// library and must not use instructions that another machine lacks.
#include "dispatch.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define MMVSSM_ISA avx2
#define MMVSSM_VECTOR 32
#include "tables.h"

namespace mmvssm {
const Kernels kernels_avx2 = {"avx2", avx2::tables<float>(), avx2::tables<double>()};
}  // namespace mmvssm
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
