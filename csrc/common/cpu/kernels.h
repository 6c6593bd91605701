// The kernels of all operators by instruction set, and the set that runs.
#pragma once

#include "../../cross_attention_score/cpu/problem.h"
#include "../../elementwise/cpu/problem.h"

namespace dsd_fast::cpu {

// All kernels, a set for each instruction set. The attention's `scratch` holds scratch_floats() floats, aligned to 64 bytes.
struct Kernels {
  const char* name;
  void (*forward)(const Forward&, const Task&, float* scratch);
  void (*backward)(const Backward&, const Task&, const Sums&, float* scratch);
  // dk and dv of a text at a head: the sums of its `n` tasks, in their order.
  void (*gather)(const Shape&, const Sums*, int64_t n, int64_t text, int64_t head, const Array& dk, const Array& dv);
  void (*maps)(const Maps&, int64_t row, int64_t first, int64_t last, float* scratch);
  void (*norm)(const Norm&, float* scratch);
  void (*gate)(const Gate&);
};

extern const Kernels kAvx512, kAvx2, kBaseline;

// The best instruction set of this processor, or the one that DSD_FAST_CPU_CAPABILITY names.
const Kernels& kernels();

}  // namespace dsd_fast::cpu
