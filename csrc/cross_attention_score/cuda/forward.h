// What the forward kernels are given, and how their work is cut into blocks: plain C++, for the binding, the launchers
// and the kernels alike.

#pragma once

#include <algorithm>
#include <cstdint>

namespace dsd_fast::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 16;         // query positions that a warp works on at a time: the m of mma
constexpr int kMaxTokens = 128;
constexpr int kMaxRounds = 16;
constexpr int64_t kMaxLength = int64_t{kTile} << 30;  // so that tiles are counted in 32 bits

constexpr bool is_width(int64_t d) { return d == 40 || d == 64 || d == 80 || d == 128 || d == 160; }

constexpr int tiles(int64_t length) { return static_cast<int>((length + kTile - 1) / kTile); }

// Elements are 16 bits wide, strides count elements, and every last stride is 1. q, k, v and out begin on multiples of 16
// bytes, and so do their rows.
struct Forward {
  const uint16_t* q;            // (B, L, H·D)
  const uint16_t* k;            // (M, T, H·D)
  const uint16_t* v;            // (M, T, H·D), or null: no output
  const int64_t* text_index;    // (B,)
  const int64_t* text_length;   // (M,) or null
  const float* key_bias;        // (M, T) or null
  const bool* score_mask;       // (M, T) or null
  uint16_t* out;                // (B, L, H·D) contiguous, where there is v
  float* score;                 // (B, H, L) contiguous; with `tile_sums`, (B, H)
  float* tile_sums;             // (B, H, tiles) contiguous, or null: the score is not averaged
  float* saved_all;             // (B, H, L) contiguous or null: log-sum-exp over all keys
  float* saved_scored;          // (B, H, L) contiguous or null: over the scored keys
  int64_t q_row, q_position, k_text, k_token, v_text, v_token, bias_text, mask_text;
  int64_t rows, length;
  int tiles;                    // tiles(L)
  int tokens, heads, width;     // T, H, H·D
  int rounds, chunks;           // a block streams `rounds` times kWarps tiles; `chunks` blocks a row and head
  float scale;
};

// Loading the keys and values costs a block about as much as one or two rounds, so it streams several, but not so many
// that fewer than eight blocks a multiprocessor remain. No number depends on the cut.
inline void cut_into_blocks(Forward& p, int multiprocessors) {
  p.tiles = tiles(p.length);
  const int64_t rounds = (int64_t{p.tiles} + kWarps - 1) / kWarps;
  const int64_t wanted = rounds * p.rows * p.heads / (8 * static_cast<int64_t>(multiprocessors));
  const int64_t most = std::clamp<int64_t>(wanted, 1, kMaxRounds);
  const int64_t chunks = std::max<int64_t>(1, (rounds + most - 1) / most);
  p.chunks = static_cast<int>(chunks);
  p.rounds = static_cast<int>((rounds + chunks - 1) / chunks);
}

inline int64_t blocks(const Forward& p) { return p.rows * p.heads * p.chunks; }

// 65 to 80 keys, of which none is cut off by a length, is what Stable Diffusion asks for, and has kernels without a
// branch on their number.
inline bool is_fixed(const Forward& p) { return p.text_length == nullptr && p.tokens > 64 && p.tokens <= 80; }

// Bytes of shared memory: keys, values if `output`, a tile of queries a warp, biases and marks.
constexpr int shared_bytes(int keys, int width, bool output) {
  return 2 * width * (keys * (output ? 2 : 1) + kWarps * kTile) + 2 * keys * static_cast<int>(sizeof(float));
}

// Blocks that a multiprocessor's registers should hold at a time, as many as leave each kernel without spills.
constexpr int residents(int width, bool fixed, bool output) {
  if (!output) return width <= 80 ? 4 : 3;
  if (width == 160 || (width == 128 && !fixed)) return 2;
  return width == 40 || (width == 64 && fixed) ? 4 : 3;
}

}  // namespace dsd_fast::cuda
