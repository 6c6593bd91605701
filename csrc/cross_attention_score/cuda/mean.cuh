// The mean of the score over positions, from what the forward kernel leaves for each tile.

#pragma once

#include <cstdint>

#include "common/cuda/primitives.cuh"
#include "cross_attention_score/cuda/forward.h"

namespace dsd_fast::cuda {

// score[b, h] = mean over positions, from the sums of the tiles: one warp a line, always in the same order, so that a
// line's bits depend neither on the other lines nor on how the work was cut.
__global__ void __launch_bounds__(kThreads) mean_kernel(const Forward p) {
  const int lane = threadIdx.x % 32;
  const int64_t line = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (line >= p.rows * p.heads) return;
  const float* sums = p.tile_sums + line * p.tiles;
  float total = 0.0f;
  for (int64_t i = lane; i < p.tiles; i += 32) total += sums[i];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) total += shuffle_xor(total, lanes);
  if (lane == 0) p.score[line] = total / static_cast<float>(p.length);
}

}  // namespace dsd_fast::cuda
