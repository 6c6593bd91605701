// dsd_fast_cpu::cross_attention_score, its gradient, and token_maps: arguments, tasks, threads. The arithmetic is in kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../../common/cpu/kernels.h"

namespace dsd_fast::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Blocks of a task of the backward pass. Fixed, so that its sums do not depend on the number of threads.
constexpr int64_t kBackwardBlocks = 128;
// Blocks for which packing a text's keys once is a small part of a task.
constexpr int64_t kLeastBlocks = 16;
constexpr int64_t kTasksPerThread = 4;

std::optional<Scalar> scalar(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Scalar::float32;
    case ScalarType::BFloat16: return Scalar::bfloat16;
    case ScalarType::Half: return Scalar::float16;
    default: return std::nullopt;
  }
}

Array array(const char* name, const Tensor& x) {
  const auto type = scalar(x);
  STD_TORCH_CHECK(type && x.dim() == 3, name, ": expected three dimensions of float32, bfloat16 or float16");
  return {x.data_ptr(), *type, x.stride(0), x.stride(1), x.stride(2)};
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

std::unique_ptr<float, Free> scratch(const Shape& shape) {
  const size_t bytes = (scratch_floats(shape) * sizeof(float) + 63) / 64 * 64;
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory, "out of memory: ", bytes, " bytes of scratch");
  return std::unique_ptr<float, Free>(memory);
}

std::optional<Tensor> table(const char* name, const std::optional<Tensor>& x, const Shape& s, ScalarType type) {
  if (!x) return std::nullopt;
  STD_TORCH_CHECK(x->scalar_type() == type && x->dim() == 2 && x->size(0) == s.texts && x->size(1) == s.tokens, name,
                  ": wrong shape or type");
  return torch::stable::contiguous(*x);
}

// Null stands for an operand that is not given; one without elements has no address of its own.
template <class T>
const T* pointer(const std::optional<Tensor>& x) {
  static const T empty = {};
  if (!x) return nullptr;
  return x->numel() ? static_cast<const T*>(x->data_ptr()) : &empty;
}

// The operands checked and, where the kernels walk them without strides, made contiguous; rows grouped by text.
struct Operands {
  Shape shape;
  std::optional<Tensor> index, length, bias, mask;
  std::vector<int64_t> order, start;
  Inputs in;

  Operands(const Tensor& q, const Tensor& k, const std::optional<Tensor>& v, const std::optional<Tensor>& text_index,
           const std::optional<Tensor>& text_length, const std::optional<Tensor>& key_bias,
           const std::optional<Tensor>& score_mask, int64_t heads, double scale) {
    const Array queries = array("q", q), keys = array("k", k);
    STD_TORCH_CHECK(heads > 0 && q.size(2) % heads == 0 && k.size(2) == q.size(2) && keys.type == queries.type,
                    "k: does not fit q");
    shape = {q.size(0), q.size(1), k.size(0), k.size(1), heads, q.size(2) / heads};
    Array values = {nullptr, queries.type, 0, 0, 0};
    if (v) {
      values = array("v", *v);
      STD_TORCH_CHECK(v->size(0) == k.size(0) && v->size(1) == k.size(1) && v->size(2) == k.size(2) &&
                          values.type == queries.type,
                      "v: does not fit k");
    }
    if (text_index) {
      STD_TORCH_CHECK(text_index->scalar_type() == ScalarType::Long && text_index->dim() == 1 &&
                          text_index->size(0) == shape.rows,
                      "text_index: expected (B,) int64");
      index = torch::stable::contiguous(*text_index);
    } else {
      STD_TORCH_CHECK(shape.texts == shape.rows, "text_index: needed when there are not as many texts as rows");
    }
    if (text_length) {
      STD_TORCH_CHECK(text_length->scalar_type() == ScalarType::Long && text_length->numel() == shape.texts,
                      "text_length: expected (M,) int64");
      length = torch::stable::contiguous(*text_length);
    }
    bias = table("key_bias", key_bias, shape, ScalarType::Float);
    mask = table("score_mask", score_mask, shape, ScalarType::Bool);
    group();
    in = {shape,
          queries,
          keys,
          values,
          order.data(),
          start.data(),
          pointer<int64_t>(length),
          pointer<float>(bias),
          pointer<bool>(mask),
          static_cast<float>(scale)};
  }

  // The text of each row. Without an index row b has text b, so the order of the rows by text is their own.
  const int64_t* text() const { return index ? static_cast<const int64_t*>(index->data_ptr()) : order.data(); }

  // Tasks of at most `most` blocks, text by text, head by head.
  std::vector<Task> tasks(int64_t most) const {
    std::vector<Task> result;
    for (int64_t m = 0; m < shape.texts; ++m) {
      const int64_t total = (start[m + 1] - start[m]) * blocks(shape.length), parts = (total + most - 1) / most;
      for (int64_t h = 0; h < shape.heads; ++h)
        for (int64_t i = 0; i < parts; ++i) result.push_back({m, h, total * i / parts, total * (i + 1) / parts});
    }
    return result;
  }

 private:
  void group() {
    start.assign(shape.texts + 1, 0);
    order.resize(shape.rows);
    if (!index) {
      std::iota(order.begin(), order.end(), 0);
      std::iota(start.begin(), start.end(), 0);
      return;
    }
    for (int64_t b = 0; b < shape.rows; ++b) {
      STD_TORCH_CHECK(text()[b] >= 0 && text()[b] < shape.texts, "text_index: ", text()[b], " is not below ", shape.texts);
      ++start[text()[b] + 1];
    }
    for (int64_t m = 0; m < shape.texts; ++m) start[m + 1] += start[m];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t b = 0; b < shape.rows; ++b) order[next[text()[b]]++] = b;
  }
};

// Runs `work(i, scratch)` for all i below n on torch's threads.
template <class Work>
void each(int64_t n, const Shape& shape, const Work& work) {
  if (!n) return;
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(shape);
    for (int64_t i = begin; i < end; ++i) work(i, memory.get());
  });
}

Tensor floats(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, ScalarType::Float);
}

float* data(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, std::optional<Tensor> v,
                                           std::optional<Tensor> text_index, std::optional<Tensor> text_length,
                                           std::optional<Tensor> key_bias, std::optional<Tensor> score_mask,
                                           int64_t heads, double scale, bool mean, bool save) {
  const Operands operands(q, k, v, text_index, text_length, key_bias, score_mask, heads, scale);
  const Shape& s = operands.shape;
  const Kernels& kernel = kernels();
  const std::vector<int64_t> none = {0}, whole = {s.rows, s.length, s.heads * s.width};
  Tensor out = torch::stable::new_empty(q, v ? torch::headeronly::IntHeaderOnlyArrayRef(whole) : none);
  Tensor score = mean ? floats(q, {s.rows, s.heads}) : floats(q, {s.rows, s.heads, s.length});
  Tensor saved = floats(q, {save ? (score_mask ? 2 : 1) : 0, s.rows, s.heads, s.length});
  const auto partial = std::make_unique_for_overwrite<float[]>(mean ? s.rows * s.heads * blocks(s.length) : 0);

  Forward pass{operands.in, {nullptr, operands.in.q.type, 0, 0, 0}, nullptr, nullptr, nullptr, nullptr};
  if (v) pass.out = array("output", out);
  if (mean) pass.partial = partial.get();
  else pass.score = data(score);
  if (save) pass.lse = data(saved);
  if (save && score_mask) pass.scored = data(saved) + s.rows * s.heads * s.length;

  const int64_t total = s.rows * s.heads * blocks(s.length);
  const int64_t share = total / (kTasksPerThread * std::max<int64_t>(1, torch::stable::get_num_threads()));
  const std::vector<Task> tasks = operands.tasks(std::max(share, kLeastBlocks));
  each(tasks.size(), s, [&](int64_t i, float* memory) { kernel.forward(pass, tasks[i], memory); });
  if (mean)
    for (int64_t i = 0; i < s.rows * s.heads; ++i) {
      double sum = 0.0;
      for (int64_t j = 0; j < blocks(s.length); ++j) sum += partial[i * blocks(s.length) + j];
      data(score)[i] = s.length ? static_cast<float>(sum / static_cast<double>(s.length)) : 0.0f;
    }
  return {out, score, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(std::optional<Tensor> dout, std::optional<Tensor> dscore, Tensor q,
                                                    Tensor k, std::optional<Tensor> v,
                                                    std::optional<Tensor> text_index, std::optional<Tensor> text_length,
                                                    std::optional<Tensor> key_bias, std::optional<Tensor> score_mask,
                                                    Tensor saved, int64_t heads, double scale, bool mean) {
  const Operands operands(q, k, v, text_index, text_length, key_bias, score_mask, heads, scale);
  const Shape& s = operands.shape;
  const Kernels& kernel = kernels();
  const int64_t positions = s.rows * s.heads * s.length;
  STD_TORCH_CHECK(saved.numel() == positions * (score_mask ? 2 : 1), "saved: not what the forward pass kept");
  const bool output = dout && v;
  const auto like = [](const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); };
  const std::vector<int64_t> none = {0};
  Tensor dq = like(q), dk = like(k), dv = v ? like(*v) : torch::stable::new_empty(q, none);
  Tensor dbias = floats(k, {s.texts, s.tokens});
  // Texts without rows, and gradients that nothing asks for.
  torch::stable::zero_(dk);
  if (v) torch::stable::zero_(dv);
  torch::stable::zero_(dbias);

  Backward pass{operands.in, {nullptr, operands.in.q.type, 0, 0, 0}, nullptr, mean, array("q", dq)};
  if (output) pass.dout = array("dout", *dout);
  if (dscore) {
    dscore = torch::stable::contiguous(*dscore);
    pass.dscore = data(*dscore);
  }

  const std::vector<Task> tasks = operands.tasks(kBackwardBlocks);
  const int64_t matrix = s.tokens * padded(s.width), stride = (output ? 2 : 1) * matrix + s.tokens;
  const auto workspace = std::make_unique_for_overwrite<float[]>(tasks.size() * stride);
  std::vector<Sums> sums;
  for (size_t i = 0; i < tasks.size(); ++i) {
    float* at = workspace.get() + i * stride;
    sums.push_back({at + s.tokens, at + s.tokens + matrix, at});
  }
  each(tasks.size(), s, [&](int64_t i, float* memory) { kernel.backward(pass, tasks[i], sums[i], memory); });

  std::vector<int64_t> first;  // of each text and head
  for (size_t i = 0; i < tasks.size(); ++i)
    if (!i || tasks[i].text != tasks[i - 1].text || tasks[i].head != tasks[i - 1].head) first.push_back(i);
  const Array to_k = array("k", dk), to_v = output ? array("v", dv) : Array{nullptr, Scalar::float32, 0, 0, 0};
  each(first.size(), s, [&](int64_t i, float*) {
    const int64_t begin = first[i], end = i + 1 < static_cast<int64_t>(first.size()) ? first[i + 1] : tasks.size();
    kernel.gather(s, &sums[begin], end - begin, tasks[begin].text, tasks[begin].head, to_k, to_v);
  });
  for (size_t i = 0; i < tasks.size(); ++i)
    for (int64_t t = 0; t < s.tokens; ++t) data(dbias)[tasks[i].text * s.tokens + t] += sums[i].dbias[t];
  return {dq, dk, dv, dbias};
}

Tensor token_maps(Tensor q, Tensor k, Tensor tokens, std::optional<Tensor> text_index, std::optional<Tensor> text_length,
                  std::optional<Tensor> key_bias, int64_t heads, double scale) {
  const Operands operands(q, k, std::nullopt, text_index, text_length, key_bias, std::nullopt, heads, scale);
  const Shape& s = operands.shape;
  STD_TORCH_CHECK(tokens.scalar_type() == ScalarType::Long && tokens.dim() == 2 && tokens.size(0) == s.rows,
                  "tokens: expected (B, n) int64");
  tokens = torch::stable::contiguous(tokens);
  const auto* chosen = static_cast<const int64_t*>(tokens.data_ptr());
  for (int64_t i = 0; i < tokens.numel(); ++i)
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < s.tokens, "tokens: ", chosen[i], " is not below ", s.tokens);
  Tensor out = floats(q, {s.rows, tokens.size(1), s.length});
  const Maps pass{operands.in, operands.text(), chosen, tokens.size(1), data(out)};
  const Kernels& kernel = kernels();
  // A task packs the keys of all heads, so it takes many positions of a row.
  const int64_t most = 2 * kLeastBlocks, parts = (blocks(s.length) + most - 1) / most;
  each(s.rows * parts, s, [&](int64_t i, float* memory) {
    const int64_t part = i % parts;
    kernel.maps(pass, i / parts, blocks(s.length) * part / parts, blocks(s.length) * (part + 1) / parts, memory);
  });
  return out;
}

}  // namespace
}  // namespace dsd_fast::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dsd_fast_cpu, m) {
  m.def(
      "cross_attention_score(Tensor q, Tensor k, Tensor? v, Tensor? text_index, Tensor? text_length, Tensor? key_bias, "
      "Tensor? score_mask, int heads, float scale, bool mean, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cross_attention_score_backward(Tensor? dout, Tensor? dscore, Tensor q, Tensor k, Tensor? v, Tensor? text_index, "
      "Tensor? text_length, Tensor? key_bias, Tensor? score_mask, Tensor saved, int heads, float scale, bool mean) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_maps(Tensor q, Tensor k, Tensor tokens, Tensor? text_index, Tensor? text_length, Tensor? key_bias, int heads, "
      "float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dsd_fast_cpu, CPU, m) {
  m.impl("cross_attention_score", TORCH_BOX(&dsd_fast::cpu::forward));
  m.impl("cross_attention_score_backward", TORCH_BOX(&dsd_fast::cpu::backward));
  m.impl("token_maps", TORCH_BOX(&dsd_fast::cpu::token_maps));
}
