// Included last by each isa_*.cpp, under that file's `target`.
#include "simd.h"

#include "../../depthwise_conv/csrc/cpu/kernel.h"
#include "../../norm_gate/csrc/cpu/kernel.h"
#include "../../quadtree/csrc/cpu/kernel.h"
#include "../../selective_scan/csrc/cpu/kernel.h"
#include "../../selective_scan_fn/csrc/cpu/kernel.h"
#include "../../state_fusion/csrc/cpu/kernel.h"

namespace mmvssm {
namespace MMVSSM_ISA {

template <typename T>
constexpr Tables<T> tables() {
  return {scan_table<T>(), scan_fn_table<T>(), fusion_table<T>(), conv_table<T>(), norm_gate_table<T>(),
          quadtree_table<T>()};
}

}  // namespace MMVSSM_ISA
}  // namespace mmvssm
