#include "cross_attention_score/cuda/launch.cuh"

template cudaError_t dsd_fast::cuda::launch_forward<dsd_fast::cuda::BFloat16, 80>(const Forward&, cudaStream_t);
