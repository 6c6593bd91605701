// The few names of CUDA's runtime that the operator's source uses, where there may be no CUDA.

#pragma once

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
