// What the kernels are given: plain pointers, strides and sizes, so that a kernel's source needs no header of torch.
// Letters as everywhere: B rows, M texts, H heads, D head width, L image positions, T text tokens.
#pragma once

#include <cstdint>

#include "../../common/cpu/padding.h"

namespace dsd_fast::cpu {

enum class Scalar { float32, bfloat16, float16 };

// A tensor (outer, row, H·D); strides in elements.
struct Array {
  void* data;
  Scalar type;
  int64_t outer, row, element;
};

struct Shape {
  int64_t rows, length, texts, tokens, heads, width;
};

// Positions worked on together: a block of queries and its logits stay in the first-level cache.
constexpr int64_t kBlock = 32;
// Logits of a position: one vector at least, so that a text without keys is a row of −∞.
constexpr int64_t columns_of(int64_t tokens) { return padded(tokens ? tokens : 1); }
constexpr int64_t blocks(int64_t length) { return (length + kBlock - 1) / kBlock; }

// What every pass reads.
struct Inputs {
  Shape shape;
  Array q, k, v;
  const int64_t* order;    // (B,) rows, those of a text together
  const int64_t* start;    // (M + 1,) where the rows of each text begin in `order`
  const int64_t* length;   // (M,) keys that exist, or null
  const float* bias;       // (M, T) or null
  const bool* mask;        // (M, T) keys that the score counts, or null
  float scale;
};

// Blocks `first` to `last` of the image positions of all rows of one text, at one head.
struct Task {
  int64_t text, head, first, last;
};

struct Forward {
  Inputs in;
  Array out;       // data is null where only the score is wanted
  float* score;    // (B, H, L), or null where the mean is wanted
  float* partial;  // (B, H, blocks): sums of the score over a block, or null
  float* lse;      // (B, H, L) over all keys, kept for other implementations' gradient, or null
  float* scored;   // (B, H, L) over the scored keys, kept for the same, or null
};

struct Backward {
  Inputs in;
  Array dout;           // data is null without a gradient of the output
  const float* dscore;  // (B, H, L), or (B, H) for the mean, or null
  bool mean;
  Array dq;
};

// Where a task of the backward pass leaves its share of the sums over rows and positions: (T, padded(D)) twice, (T,).
struct Sums {
  float *dk, *dv, *dbias;
};

struct Maps {
  Inputs in;
  const int64_t* text;    // (B,) the text of each row
  const int64_t* chosen;  // (B, n)
  int64_t count;
  float* out;             // (B, n, L)
};

// Packed keys and values, both ways round for the gradient; a block of queries, of output, and of logits, each twice; a
// row of biases and two numbers a position.
constexpr int64_t scratch_floats(const Shape& s) {
  const int64_t width = padded(s.width), tokens = columns_of(s.tokens);
  return 2 * (s.width * tokens + s.tokens * width) + 2 * kBlock * width + 3 * kBlock * tokens + 2 * tokens + 4 * kBlock;
}

}  // namespace dsd_fast::cpu
