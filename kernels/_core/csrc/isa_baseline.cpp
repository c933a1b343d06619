// The CPU kernels for whatever the compiler assumes by default (SSE2 on x86-64, NEON on AArch64).
// Standard headers come before the pragma: their inline functions are shared with the rest of the
// library and must not use instructions that another machine lacks.
#include "dispatch.h"

#define MMVSSM_ISA baseline
#define MMVSSM_VECTOR 16
#include "tables.h"

namespace mmvssm {
const Kernels kernels_baseline = {"baseline", baseline::tables<float>(), baseline::tables<double>()};
}  // namespace mmvssm
