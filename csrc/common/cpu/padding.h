// Scratch memory.
#pragma once

#include <cstdint>

namespace dsd_fast::cpu {

// Rows of all scratch are padded to multiples of the widest vector, 16 floats.
constexpr int64_t kPad = 16;

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

}  // namespace dsd_fast::cpu
