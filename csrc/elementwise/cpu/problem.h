// What the kernels of the memory-bound operators are given. Letters: L image positions, C channels, D channels of a group.
#pragma once

#include <cstdint>

namespace dsd_fast::cpu {

// Some groups of one image, whose channels are next to each other: group norm, a shift before it, SiLU after it.
struct Norm {
  const float* x;       // (L, width) at rows of `row` numbers
  float* y;             // the same
  const float* shift;   // (width,), or null
  const float* weight;  // (width,), or null
  const float* bias;    // (width,), or null
  int64_t length, row, width, group;
  float eps;
  bool silu;
};

// `rows` rows (2N) → (N): the first half times the gelu of the second.
struct Gate {
  const float* x;
  float* y;
  int64_t rows, width;
};

}  // namespace dsd_fast::cpu
