// dsd_fast_cpu::group_norm_silu and geglu, into memory that is given: arguments, tasks, threads. The arithmetic is in kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../../common/cpu/kernels.h"

namespace dsd_fast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Numbers for which a thread of its own is worth its start.
constexpr int64_t kGrain = 32768;

float* floats(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected float32");
  return static_cast<float*>(x.data_ptr());
}

const float* vector(const char* name, const std::optional<Tensor>& x, int64_t numbers) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->numel() == numbers && x->is_contiguous(), name, ": expected ", numbers, " numbers next to each other");
  return floats(name, *x);
}

// (B, C, h, w) whose memory is (B, h, w, C) without gaps.
bool channels_last(const Tensor& x) {
  int64_t dense = 1;
  for (const int64_t at : {1, 3, 2, 0}) {
    if (x.size(at) != 1 && x.stride(at) != dense) return false;
    dense *= x.size(at);
  }
  return true;
}

void group_norm_silu(Tensor x, Tensor y, std::optional<Tensor> weight, std::optional<Tensor> bias,
                     std::optional<Tensor> shift, int64_t groups, double eps, bool silu) {
  STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 4 && channels_last(x) && channels_last(y), "x, y: expected channels-last");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(x.size(i) == y.size(i), "y: expected the shape of x");
  const int64_t rows = x.size(0), channels = x.size(1), length = x.size(2) * x.size(3);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups: ", groups, " is no divisor of ", channels);
  if (!x.numel()) return;
  // As many groups together as fill whole vectors.
  const int64_t group = channels / groups, together = std::min(groups, std::lcm(group, kPad) / group);
  const int64_t parts = (groups + together - 1) / together, width = together * group;
  const float *from = floats("x", x), *w = vector("weight", weight, channels), *b = vector("bias", bias, channels);
  const float* s = vector("shift", shift, rows * channels);
  float* to = floats("y", y);
  const Kernels& kernel = kernels();
  const int64_t grain = std::max<int64_t>(1, kGrain / (width * length));
  torch::stable::parallel_for(0, rows * parts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(4 * padded(width));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / parts, g = i % parts * together, c = g * group, at = r * length * channels + c;
      const auto part = [](auto* p, int64_t offset) { return p ? p + offset : p; };
      kernel.norm({from + at, to + at, part(s, r * channels + c), part(w, c), part(b, c), length, channels,
                   std::min(together, groups - g) * group, group, static_cast<float>(eps), silu},
                  scratch.data());
    }
  });
}

void geglu(Tensor x, Tensor y) {
  STD_TORCH_CHECK(x.dim() > 0 && x.numel() == 2 * y.numel() && x.is_contiguous() && y.is_contiguous(),
                  "x, y: expected numbers next to each other, twice as many in x");
  if (!y.numel()) return;
  const int64_t width = x.size(x.dim() - 1) / 2, rows = y.numel() / width;
  STD_TORCH_CHECK(y.dim() == x.dim() && y.size(y.dim() - 1) == width, "y: expected half of the last dimension of x");
  const float* from = floats("x", x);
  float* to = floats("y", y);
  const Kernels& kernel = kernels();
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (2 * width)), [&](int64_t begin, int64_t end) {
    kernel.gate({from + 2 * begin * width, to + begin * width, end - begin, width});
  });
}

}  // namespace
}  // namespace dsd_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dsd_fast_cpu, m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor(a!) y, Tensor? weight, Tensor? bias, Tensor? shift, int groups, float eps, bool silu) "
      "-> ()");
  m.def("geglu(Tensor x, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dsd_fast_cpu, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&dsd_fast::cpu::group_norm_silu));
  m.impl("geglu", TORCH_BOX(&dsd_fast::cpu::geglu));
}
