// Whatever the compiler's own baseline has: SSE2 on x86, NEON on ARM, scalar code where there are no vectors.
#include "kernels.h"

namespace dsd_fast::cpu {
namespace {

constexpr int kWidth = 4;      // floats of a vector
constexpr int kColumns = 3;    // vectors of a tile of a product, side by side
constexpr int kRegisters = 12;  // vector registers that hold a tile's sums

#include "vector.h"
#include "../../cross_attention_score/cpu/kernel.h"
#include "../../elementwise/cpu/kernel.h"

}  // namespace

const Kernels kBaseline = {"baseline", forward, backward, gather, maps, norm, gate};

}  // namespace dsd_fast::cpu
