// dsd_fast_cuda::cross_attention_score: arguments, allocations, device and stream. The arithmetic is in forward.cuh.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "cross_attention_score/cuda/forward.h"
#include "cross_attention_score/cuda/launch.h"

namespace dsd_fast::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Whether 16 bytes can be copied at a time from every row of (·, ·, H·D), whose width is a multiple of 16 bytes.
bool is_aligned(const Tensor& x) {
  const auto fits = [&](int dim) { return x.size(dim) == 1 || x.stride(dim) % 8 == 0; };
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(2) == 1 && fits(0) && fits(1);
}

// The tensor itself, or a copy of one that lies askew, such as a slice that begins at an odd element.
Tensor aligned(const Tensor& x) {
  if (is_aligned(x)) return x;
  const Tensor y = torch::stable::contiguous(x);
  return is_aligned(y) ? y : torch::stable::clone(y);
}

void check_type(const char* name, const Tensor& x, const Tensor& like, ScalarType type) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, ": not on q's device");
  STD_TORCH_CHECK(x.scalar_type() == type, name, ": wrong type");
}

// (M, T) with a last stride of 1.
std::optional<Tensor> table(const char* name, const std::optional<Tensor>& x, const Tensor& k, ScalarType type) {
  if (!x) return std::nullopt;
  check_type(name, *x, k, type);
  STD_TORCH_CHECK(x->dim() == 2 && x->size(0) == k.size(0) && x->size(1) == k.size(1), name, ": expected (M, T) = (",
                  k.size(0), ", ", k.size(1), ")");
  return x->stride(1) == 1 ? *x : torch::stable::contiguous(*x);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

Tensor floats(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, std::optional<Tensor> v, Tensor text_index,
                                           std::optional<Tensor> text_length, std::optional<Tensor> key_bias,
                                           std::optional<Tensor> score_mask, int64_t heads, double scale, bool mean,
                                           bool save) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(q.is_cuda(), "q: not on a CUDA device");
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "q: expected float16 or bfloat16");
  STD_TORCH_CHECK(q.dim() == 3 && heads > 0 && q.size(2) % heads == 0, "q: expected (B, L, H·D) with H = ", heads);
  const int64_t rows = q.size(0), length = q.size(1), head_width = q.size(2) / heads;
  STD_TORCH_CHECK(is_width(head_width), "q: heads of width ", head_width, ", expected 40, 64, 80, 128 or 160");
  STD_TORCH_CHECK(length <= kMaxLength && q.size(2) <= INT32_MAX, "q: ", length, " positions of width ", q.size(2),
                  " are too many");
  check_type("k", k, q, type);
  STD_TORCH_CHECK(k.dim() == 3 && k.size(2) == q.size(2), "k: expected (M, T, ", q.size(2), ")");
  STD_TORCH_CHECK(k.size(1) >= 1 && k.size(1) <= kMaxTokens, "k: ", k.size(1), " keys, expected 1 to ", kMaxTokens);
  if (v) {
    check_type("v", *v, q, type);
    STD_TORCH_CHECK(v->dim() == 3 && v->size(0) == k.size(0) && v->size(1) == k.size(1) && v->size(2) == k.size(2),
                    "v: expected k's shape");
  }
  check_type("text_index", text_index, q, ScalarType::Long);
  STD_TORCH_CHECK(text_index.dim() == 1 && text_index.size(0) == rows, "text_index: expected (B,) = (", rows, ",)");
  STD_TORCH_CHECK(rows == 0 || k.size(0) > 0, "k: no text for ", rows, " rows");
  if (text_length) {
    check_type("text_length", *text_length, q, ScalarType::Long);
    STD_TORCH_CHECK(text_length->dim() == 1 && text_length->size(0) == k.size(0), "text_length: expected (M,) = (",
                    k.size(0), ",)");
    text_length = torch::stable::contiguous(*text_length);
  }
  text_index = torch::stable::contiguous(text_index);
  key_bias = table("key_bias", key_bias, k, ScalarType::Float);
  score_mask = table("score_mask", score_mask, k, ScalarType::Bool);

  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const std::vector<int64_t> none = {0}, whole = {rows, length, q.size(2)};
  Tensor out = torch::stable::new_empty(q, v ? torch::headeronly::IntHeaderOnlyArrayRef(whole) : none);
  Tensor score = mean ? floats(q, {rows, heads}) : floats(q, {rows, heads, length});
  Tensor saved = floats(q, {save ? (score_mask ? 2 : 1) : 0, rows, heads, length});
  if (rows == 0 || length == 0) {
    if (mean) torch::stable::zero_(score);
    return {out, score, saved};
  }
  q = aligned(q);
  k = aligned(k);
  if (v) v = aligned(*v);
  Forward p{};
  p.q = data<uint16_t>(q), p.q_row = q.stride(0), p.q_position = q.stride(1);
  p.k = data<uint16_t>(k), p.k_text = k.stride(0), p.k_token = k.stride(1);
  if (v) p.v = data<uint16_t>(*v), p.v_text = v->stride(0), p.v_token = v->stride(1), p.out = data<uint16_t>(out);
  p.text_index = data<int64_t>(text_index);
  if (text_length) p.text_length = data<int64_t>(*text_length);
  if (key_bias) p.key_bias = data<float>(*key_bias), p.bias_text = key_bias->stride(0);
  if (score_mask) p.score_mask = data<bool>(*score_mask), p.mask_text = score_mask->stride(0);
  p.score = data<float>(score);
  if (save) p.saved_all = data<float>(saved);
  if (save && score_mask) p.saved_scored = data<float>(saved) + rows * heads * length;
  p.rows = rows, p.length = length, p.tokens = static_cast<int>(k.size(1));
  p.heads = static_cast<int>(heads), p.width = static_cast<int>(q.size(2)), p.scale = static_cast<float>(scale);
  const Tensor tile_sums = floats(q, {mean ? rows * heads * tiles(length) : 0});
  if (mean) p.tile_sums = data<float>(tile_sums);

  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  const bool bfloat16 = type == ScalarType::BFloat16;
  STD_CUDA_CHECK(launch(p, static_cast<int>(head_width), bfloat16, static_cast<cudaStream_t>(stream)));
  return {out, score, saved};
}

}  // namespace
}  // namespace dsd_fast::cuda

STABLE_TORCH_LIBRARY(dsd_fast_cuda, m) {
  m.def(
      "cross_attention_score(Tensor q, Tensor k, Tensor? v, Tensor text_index, Tensor? text_length, Tensor? key_bias, "
      "Tensor? score_mask, int heads, float scale, bool mean, bool save) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dsd_fast_cuda, CUDA, m) {
  m.impl("cross_attention_score", TORCH_BOX(&dsd_fast::cuda::forward));
}
