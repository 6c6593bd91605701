// The launchers: one for each width and type, in translation units of their own so that they compile side by side.

#pragma once

#include <cuda_runtime.h>

#include "cross_attention_score/cuda/forward.h"

namespace dsd_fast::cuda {

template <class Element, int D>
cudaError_t launch_forward(const Forward& p, cudaStream_t stream);

// Launches on the current device. p's sizes and pointers were checked, and L, B and H are at least 1; `tiles`, `rounds`
// and `chunks` are set here.
cudaError_t launch(Forward p, int head_width, bool bfloat16, cudaStream_t stream);

}  // namespace dsd_fast::cuda
