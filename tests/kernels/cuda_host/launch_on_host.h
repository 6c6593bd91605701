// What launch.cuh and launch.cu do on a GPU: chooses the kernel, and runs its blocks one after the other.

#pragma once

#include <functional>

#include "cross_attention_score/cuda/forward.cuh"
#include "cross_attention_score/cuda/mean.cuh"

namespace dsd_fast::cuda {

inline void run_grid(int64_t blocks, size_t shared_bytes, bool reversed, const std::function<void()>& kernel) {
  for (int64_t i = 0; i < blocks; ++i) {
    host::Block::block_index.x = static_cast<unsigned>(reversed ? blocks - 1 - i : i);
    host::Block(kThreads, shared_bytes, reversed).run(kernel);
  }
}

template <class Element, int D, bool FIXED, bool OUTPUT>
void run(const Forward& p, bool reversed) {
  run_grid(blocks(p), shared_bytes(FIXED ? 80 : kMaxTokens, D, OUTPUT), reversed,
           [&] { forward_kernel<Element, D, FIXED, OUTPUT>(p); });
}

template <class Element, int D>
void run(const Forward& p, bool reversed) {
  if (is_fixed(p)) {
    p.v == nullptr ? run<Element, D, true, false>(p, reversed) : run<Element, D, true, true>(p, reversed);
  } else {
    p.v == nullptr ? run<Element, D, false, false>(p, reversed) : run<Element, D, false, true>(p, reversed);
  }
}

template <class Element>
void run(const Forward& p, int head_width, bool reversed) {
  switch (head_width) {
    case 40: return run<Element, 40>(p, reversed);
    case 64: return run<Element, 64>(p, reversed);
    case 80: return run<Element, 80>(p, reversed);
    case 128: return run<Element, 128>(p, reversed);
    case 160: return run<Element, 160>(p, reversed);
    default: host::fail("an unknown width");
  }
}

inline void launch_on_host(Forward p, int head_width, bool bfloat16, int multiprocessors, bool reversed) {
  cut_into_blocks(p, multiprocessors);
  if (bfloat16) {
    run<BFloat16>(p, head_width, reversed);
  } else {
    run<Half>(p, head_width, reversed);
  }
  if (p.tile_sums == nullptr) return;
  run_grid((p.rows * p.heads + kWarps - 1) / kWarps, 0, reversed, [&] { mean_kernel(p); });
}

}  // namespace dsd_fast::cuda
