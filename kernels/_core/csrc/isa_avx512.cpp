// The CPU kernels for AVX-512 (Skylake-X, Zen 4 and later).
// Standard headers come before the pragma: their inline functions are shared with the rest of the
// library and must not use instructions that another machine lacks.
#include "dispatch.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define MMVSSM_ISA avx512
#define MMVSSM_VECTOR 64
#include "tables.h"

namespace mmvssm {
const Kernels kernels_avx512 = {"avx512", avx512::tables<float>(), avx512::tables<double>()};
}  // namespace mmvssm
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
