// Defines launch_forward; included by the translation unit of each (type, width).

#pragma once

#include "cross_attention_score/cuda/forward.cuh"
#include "cross_attention_score/cuda/launch.h"

namespace dsd_fast::cuda {

template <class Element, int D, bool FIXED, bool OUTPUT>
cudaError_t launch_kernel(const Forward& p, cudaStream_t stream) {
  const auto kernel = forward_kernel<Element, D, FIXED, OUTPUT>;
  constexpr int bytes = shared_bytes(FIXED ? 80 : kMaxTokens, D, OUTPUT);
  // More than 48 KiB must be asked for, once for each device; asking again costs less than remembering safely.
  if constexpr (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks(p)), kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
}

template <class Element, int D>
cudaError_t launch_forward(const Forward& p, cudaStream_t stream) {
  if (p.v == nullptr) {
    return is_fixed(p) ? launch_kernel<Element, D, true, false>(p, stream)
                       : launch_kernel<Element, D, false, false>(p, stream);
  }
  return is_fixed(p) ? launch_kernel<Element, D, true, true>(p, stream)
                     : launch_kernel<Element, D, false, true>(p, stream);
}

}  // namespace dsd_fast::cuda
