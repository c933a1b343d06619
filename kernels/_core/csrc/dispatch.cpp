#include "dispatch.h"

#include <torch/library.h>

#include <cstdlib>
#include <string>

namespace mmvssm {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    const char* limit = std::getenv("MMVSSM_CPU_ISA");
    const std::string most = limit ? limit : "avx512";
    TORCH_CHECK(most == "baseline" || most == "avx2" || most == "avx512", "MMVSSM_CPU_ISA='", most,
                "': expected baseline, avx2 or avx512");
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && most == "avx512") return kernels_avx512;
    if (avx2 && most != "baseline") return kernels_avx2;
#endif
    return kernels_baseline;
  }();
  return chosen;
}

namespace {
TORCH_LIBRARY_FRAGMENT(mmvssm_cpu, m) {
  m.def("isa() -> str", [] { return std::string(kernels().name); });
}
}  // namespace
}  // namespace mmvssm
