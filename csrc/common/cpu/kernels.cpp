// The choice of the instruction set.

#include "kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace dsd_fast::cpu {

const Kernels& kernels() {
  const char* wanted = std::getenv("DSD_FAST_CPU_CAPABILITY");
  std::vector<const Kernels*> usable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    usable.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    usable.push_back(&kAvx2);
#endif
  usable.push_back(&kBaseline);
  if (!wanted || !*wanted) return *usable.front();
  std::string names;
  for (const Kernels* each : usable) {
    if (!std::strcmp(each->name, wanted)) return *each;
    names += (names.empty() ? "" : ", ") + std::string(each->name);
  }
  STD_TORCH_CHECK(false, "DSD_FAST_CPU_CAPABILITY: got ", wanted, ", expected one that this processor has: ", names);
  return kBaseline;
}

namespace {

std::string capability() { return kernels().name; }

}  // namespace
}  // namespace dsd_fast::cpu

STABLE_TORCH_LIBRARY(dsd_fast_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(dsd_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&dsd_fast::cpu::capability));
}
