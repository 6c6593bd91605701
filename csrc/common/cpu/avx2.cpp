// AVX2 with FMA.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dsd_fast::cpu {
namespace {

constexpr int kWidth = 8;      // floats of a vector
constexpr int kColumns = 3;    // vectors of a tile of a product, side by side
constexpr int kRegisters = 12;  // vector registers that hold a tile's sums

#include "vector.h"
#include "../../cross_attention_score/cpu/kernel.h"
#include "../../elementwise/cpu/kernel.h"

}  // namespace

const Kernels kAvx2 = {"avx2", forward, backward, gather, maps, norm, gate};

}  // namespace dsd_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
