// AVX-512. The target is set here and not for the file, so that no function of a header shared with others is compiled for it.
#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

namespace dsd_fast::cpu {
namespace {

constexpr int kWidth = 16;      // floats of a vector
constexpr int kColumns = 5;    // vectors of a tile of a product, side by side
constexpr int kRegisters = 24;  // vector registers that hold a tile's sums

#include "vector.h"
#include "../../cross_attention_score/cpu/kernel.h"
#include "../../elementwise/cpu/kernel.h"

}  // namespace

const Kernels kAvx512 = {"avx512", forward, backward, gather, maps, norm, gate};

}  // namespace dsd_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
