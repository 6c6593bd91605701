// operator.cpp as an operator of CPU tensors, `dsd_fast_cuda_on_host::…`, with the kernels run on the CPU: what is
// exchanged is the device alone. The headers come first, so that the names changed below are changed in the operator.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cross_attention_score/cuda/launch.h"
#include "launch_on_host.h"

namespace dsd_fast::cuda {

struct NoGuard {
  explicit NoGuard(int) {}
};

inline AOTITorchError no_stream(int, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

cudaError_t launch(Forward p, int head_width, bool bfloat16, cudaStream_t) {
  launch_on_host(p, head_width, bfloat16, 1, false);
  return cudaSuccess;
}

}  // namespace dsd_fast::cuda

#define dsd_fast_cuda dsd_fast_cuda_on_host
#define CUDA CPU
#define is_cuda is_cpu
#define aoti_torch_get_current_cuda_stream no_stream
#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) (void)(call)
namespace torch::stable::accelerator {
using NoGuard = dsd_fast::cuda::NoGuard;
}
#define DeviceGuard NoGuard

#include "cross_attention_score/cuda/operator.cpp"
