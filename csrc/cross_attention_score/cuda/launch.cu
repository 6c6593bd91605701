// Chooses the launcher, and averages over positions after it.

#include "cross_attention_score/cuda/launch.h"

#include "cross_attention_score/cuda/mean.cuh"

namespace dsd_fast::cuda {

namespace {

template <class Element>
cudaError_t launch_width(const Forward& p, int head_width, cudaStream_t stream) {
  switch (head_width) {
    case 40: return launch_forward<Element, 40>(p, stream);
    case 64: return launch_forward<Element, 64>(p, stream);
    case 80: return launch_forward<Element, 80>(p, stream);
    case 128: return launch_forward<Element, 128>(p, stream);
    case 160: return launch_forward<Element, 160>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch(Forward p, int head_width, bool bfloat16, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  cut_into_blocks(p, multiprocessors);
  if (blocks(p) > INT32_MAX) return cudaErrorInvalidConfiguration;
  error = bfloat16 ? launch_width<BFloat16>(p, head_width, stream) : launch_width<Half>(p, head_width, stream);
  if (error != cudaSuccess || p.tile_sums == nullptr) return error;
  const int64_t lines = p.rows * p.heads;
  mean_kernel<<<static_cast<unsigned>((lines + kWarps - 1) / kWarps), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace dsd_fast::cuda
