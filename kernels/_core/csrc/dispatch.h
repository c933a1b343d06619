// The kernels of every operator, one table per instruction set, and the one that this machine runs.
#pragma once
#include "../../depthwise_conv/csrc/cpu/args.h"
#include "../../norm_gate/csrc/cpu/args.h"
#include "../../quadtree/csrc/cpu/args.h"
#include "../../selective_scan/csrc/cpu/args.h"
#include "../../selective_scan_fn/csrc/cpu/args.h"
#include "../../state_fusion/csrc/cpu/args.h"

namespace mmvssm {

template <typename T>
struct Tables {
  ScanTable<T> scan;
  ScanFnTable<T> scan_fn;
  FusionTable<T> fusion;
  ConvTable<T> conv;
  NormGateTable<T> norm_gate;
  QuadtreeTable<T> quadtree;
};

struct Kernels {
  const char* name;
  Tables<float> f;
  Tables<double> d;

  template <typename T>
  const Tables<T>& of() const;
};
template <>
inline const Tables<float>& Kernels::of<float>() const {
  return f;
}
template <>
inline const Tables<double>& Kernels::of<double>() const {
  return d;
}

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// Chosen once, at the first call.
const Kernels& kernels();

}  // namespace mmvssm
