// Cross-attention and the log-sum-exp of its logits on tensor cores; kernels/cross_attention_score/README.md has the
// formulas. B rows, M texts, H heads, D head width, L positions, T text tokens.
//
// A block holds the keys and values of one (text, head) in shared memory for its whole life and streams the queries:
// each warp takes 16 positions at a time, whose successors are copied while it computes. All keys fit, so the softmax
// is exact in one step, and the warps of a block wait for each other only once.
//
// Everything in shared memory that mma reads lies in planes of 8 elements of the head's width, [D / 8][rows][8]: the 8
// rows of 16 bytes that ldmatrix reads at a time are then contiguous, without padding and without bank conflicts, and D
// need only be a multiple of 8.
//   keys    [D / 8][KEYS][8]
//   values  [D / 8][KEYS][8], columns dealt out as below
//   queries [kWarps][D / 8][16][8]
//   bias    [KEYS] float, times log2 e; -inf where a key is masked or beyond the text
//   marks   [KEYS] float, 1 where a key is scored
//
// The columns of the output may come in any order as long as the values do too. In the order used each of the four
// lanes of a row ends with contiguous elements, which it stores at once: of every 32, lane t has 8t..8t+7 (16 bytes), of
// a last 16, 4t..4t+3, of a last 8, 2t..2t+1. Pair j of a lane's elements stands in plane j of the 32, where mma wants
// lane t's.
//
// Not wgmma: a position costs 4·D bytes of device memory and 4·80·D floating-point operations, 80 a byte. At the 4.8
// TB/s of an H200 that is 0.39 PFLOP/s, which mma.sync reaches, and the 80 exponentials a position are nearer to their
// limit (4.8e12 / (4·40) · 80 = 2.4e12 a second at D = 40, of 16 a clock and multiprocessor, 3.6e12). wgmma would tie
// four warps to one tile of 64 positions and has no k = 8 for D = 40.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/cuda/primitives.cuh"
#include "cross_attention_score/cuda/forward.h"

namespace dsd_fast::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Calls body(n, first) for each 32 of D elements, and for the rest of 16 or 8: the type of n holds the number of pairs
// that each of four lanes has of them, `first` is the first element.
template <int D, class Body>
__device__ __forceinline__ void each_chunk(const Body& body) {
  static_assert(D % 32 == 0 || D % 32 == 8 || D % 32 == 16);
#pragma unroll
  for (int c = 0; c < D / 32; ++c) body(std::integral_constant<int, 4>(), 32 * c);
  if constexpr (D % 32 > 0) body(std::integral_constant<int, D % 32 / 8>(), D / 32 * 32);
}

// Keys, and values if OUTPUT, of one text and head into shared memory, `keys` of KEYS rows. Masked ones are written as
// zeros and never read: they may hold anything, and 0 · NaN would reach the sums.
template <int D, int KEYS, bool OUTPUT, class IsReal>
__device__ __forceinline__ void load_text(
    uint16_t* to_k, uint16_t* to_v, const uint16_t* k, const uint16_t* v, const Forward& p, int keys,
    const IsReal& is_real) {
#pragma unroll 1
  for (int i = threadIdx.x; i < 4 * keys; i += kThreads) {
    const int key = i / 4, t = i % 4;
    const bool real = is_real(key);
    // An address that exists even for a key that does not.
    const int64_t row = real ? key : 0;
#pragma unroll
    for (int plane = 0; plane < D / 8; plane += 4) {
      if (plane + t < D / 8) {
        copy_async<16>(to_k + ((plane + t) * KEYS + key) * 8, k + row * p.k_token + (plane + t) * 8, real);
      }
    }
    if constexpr (OUTPUT) {
      each_chunk<D>([&](auto n, int first) {
        constexpr int kPairs = decltype(n)::value;
        const uint16_t* from = v + row * p.v_token + first + 2 * kPairs * t;
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          copy_async<4>(to_v + ((first / 8 + j) * KEYS + key) * 8 + 2 * t, from + 2 * j, real);
        }
      });
    }
  }
}

// The 16 positions of `tile` into a warp's planes; zeros beyond the last.
template <int D>
__device__ __forceinline__ void load_queries(uint16_t* to, const uint16_t* q, const Forward& p, int tile, int lane) {
#pragma unroll
  for (int i = 0; i < D / 8 * kTile; i += 32) {
    const int row = (i + lane) / (D / 8), plane = (i + lane) % (D / 8);
    const int64_t position = int64_t{tile} * kTile + row;
    const bool real = position < p.length;
    if (D / 8 * kTile % 32 == 0 || row < kTile) {
      copy_async<16>(to + (plane * kTile + row) * 8, q + (real ? position : 0) * p.q_position + plane * 8, real);
    }
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// What is subtracted before exponentiating. Without a finite maximum nothing can be: -inf - -inf would be NaN.
__device__ __forceinline__ float shift_of(float highest) { return fabsf(highest) == INFINITY ? 0.0f : highest; }

// FIXED: 80 keys, none skipped. Otherwise up to 128, in groups of 16 of which those beyond the text are skipped.
template <class Element, int D, bool FIXED, bool OUTPUT>
__global__ void __launch_bounds__(kThreads, residents(D, FIXED, OUTPUT)) forward_kernel(const Forward p) {
  constexpr int kGroups = FIXED ? 5 : kMaxTokens / 16;
  constexpr int kKeys = 16 * kGroups;
  constexpr int kPlanes = D / 8;

  const int head = blockIdx.x % p.heads;
  const int chunk = blockIdx.x / p.heads % p.chunks;
  const int64_t row = blockIdx.x / p.heads / p.chunks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  const int64_t text = p.text_index[row];
  const float* key_bias = p.key_bias == nullptr ? nullptr : p.key_bias + text * p.bias_text;
  const bool* score_mask = p.score_mask == nullptr ? nullptr : p.score_mask + text * p.mask_text;
  int tokens = p.tokens;
  if (p.text_length != nullptr) tokens = static_cast<int>(min(max(p.text_length[text], int64_t{0}), int64_t{tokens}));
  const int groups = FIXED ? kGroups : (tokens + 15) / 16;
  // One log-sum-exp is both where every key is scored; and where no one asks for that over all keys, a key that is not
  // scored is a masked one.
  const bool two = score_mask != nullptr && (OUTPUT || p.saved_all != nullptr);

  uint16_t* keys = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* values = keys + kKeys * D;
  uint16_t* queries = values + (OUTPUT ? kKeys * D : 0) + warp * kTile * D;
  float* bias = reinterpret_cast<float*>(values + (OUTPUT ? kKeys * D : 0) + kWarps * kTile * D);
  float* marks = bias + kKeys;

  const uint16_t* q = p.q + row * p.q_row + head * D;
  const int64_t line = (row * p.heads + head) * p.length;
  const int end = min((chunk + 1) * p.rounds * kWarps, p.tiles);
  int tile = chunk * p.rounds * kWarps + warp;
  if (tile < end) load_queries<D>(queries, q, p, tile, lane);

  const auto is_real = [&](int key) {
    return key < tokens && (key_bias == nullptr || key_bias[key] != -INFINITY) &&
           (score_mask == nullptr || two || score_mask[key]);
  };
  load_text<D, kKeys, OUTPUT>(keys, values, p.k + text * p.k_text + head * D,
                             OUTPUT ? p.v + text * p.v_text + head * D : nullptr, p, 16 * groups, is_real);
#pragma unroll 1
  for (int key = threadIdx.x; key < kKeys; key += kThreads) {
    bias[key] = !is_real(key) ? -INFINITY : key_bias == nullptr ? 0.0f : key_bias[key] * kLog2E;
    marks[key] = key < tokens && score_mask != nullptr && score_mask[key] ? 1.0f : 0.0f;
  }
  wait_for_copies();
  barrier();

  // The row of a matrix whose address ldmatrix takes from this lane. Fragments of A and, transposed, of B run through the
  // 16 rows of a plane before the next plane, those of B that are not transposed through two planes before the next
  // rows.
  const unsigned query_start = shared_address(queries) + 16 * (lane / 16 * kTile + lane % 16);
  const unsigned key_start = shared_address(keys) + 16 * (lane / 8 % 2 * kKeys + lane / 16 * 8 + lane % 8);
  const unsigned last_key_start = shared_address(keys) + 16 * ((kPlanes - 1) * kKeys + lane % 16);
  const unsigned value_start = shared_address(values) + 16 * (lane / 16 * kKeys + lane % 16);
  const unsigned bias_start = shared_address(bias) + 8 * t;
  constexpr int kMarks = 4 * kKeys;  // bytes from a bias to its mark
  const float factor = p.scale * kLog2E;

  for (; tile < end; tile += kWarps) {
    const unsigned key_at = hidden(key_start), bias_at = hidden(bias_start), value_at = hidden(value_start);
    wait_for_copies();
    warp_barrier();
    // s[i][u] is the 16 x 8 tile of keys 16 i + 8 u + (0..7): logits times log2 e, then their exponentials.
    float s[kGroups][2][4] = {};
#pragma unroll
    for (int plane = 0; plane + 1 < kPlanes; plane += 2) {
      uint32_t a[4];
      load_matrices<4, false>(a, query_start + 16 * kTile * plane);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (FIXED || i < groups) {
          uint32_t b[4];
          load_matrices<4, false>(b, key_at + 16 * (plane * kKeys + 16 * i));
          mma<Element>(s[i][0], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma<Element>(s[i][1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
    }
    if constexpr (kPlanes % 2 == 1) {
      uint32_t a[2];
      load_matrices<2, false>(a, query_start + 16 * kTile * (kPlanes - 1));
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (FIXED || i < groups) {
          uint32_t b[2];
          load_matrices<2, false>(b, last_key_start + 16 * 16 * i);
          mma<Element>(s[i][0], a[0], a[1], b[0]);
          mma<Element>(s[i][1], a[0], a[1], b[1]);
        }
      }
    }
    // Once every lane has read this tile's queries, the next ones may arrive, during the softmax and the output.
    warp_barrier();
    if (tile + kWarps < end) load_queries<D>(queries, q, p, tile + kWarps, lane);

    const auto each_logit = [&](const auto& body) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (FIXED || i < groups) {
#pragma unroll
          for (int u = 0; u < 2; ++u) body(s[i][u], 4 * (16 * i + 8 * u));
        }
      }
    };
    float highest[2] = {-INFINITY, -INFINITY};
    each_logit([&](float(&c)[4], int offset) {
      float add[2];
      load_shared(add, bias_at + offset);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[e] = fmaf(c[e], factor, add[e % 2]);
        highest[e / 2] = fmaxf(highest[e / 2], c[e]);
      }
    });

    float shift[2], sum[2] = {0.0f, 0.0f}, scored_shift[2], scored_sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      highest[r] = quad_max(highest[r]);
      scored_shift[r] = shift[r] = shift_of(highest[r]);
    }
    bool near[2] = {true, true};
    if (two) {
      float scored_highest[2] = {-INFINITY, -INFINITY};
      each_logit([&](float(&c)[4], int offset) {
        float mark[2];
        load_shared(mark, bias_at + kMarks + offset);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (mark[e % 2] != 0.0f) scored_highest[e / 2] = fmaxf(scored_highest[e / 2], c[e]);
        }
      });
      // The output's exponentials serve the score too, unless they are so small that their sum would lose digits.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scored_highest[r] = quad_max(scored_highest[r]);
        near[r] = scored_highest[r] >= highest[r] - 32.0f;
        if (!near[r]) scored_shift[r] = shift_of(scored_highest[r]);
      }
      if (!near[0] || !near[1]) {
        each_logit([&](float(&c)[4], int offset) {
          float mark[2];
          load_shared(mark, bias_at + kMarks + offset);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float x = exp2_fast(c[e] - scored_shift[e / 2]);
            if (mark[e % 2] != 0.0f && !near[e / 2]) scored_sum[e / 2] += x;
          }
        });
      }
    }
    // A shuffle with oneself changes nothing, but what depends on it cannot be computed before the branch above, where
    // the logits are still needed.
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[r] = shuffle_xor(shift[r], 0);
    each_logit([&](float(&c)[4], int) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        c[e] = exp2_fast(c[e] - shift[e / 2]);
        sum[e / 2] += c[e];
      }
    });
    if (two) {
      each_logit([&](float(&c)[4], int offset) {
        float mark[2];
        load_shared(mark, bias_at + kMarks + offset);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (mark[e % 2] != 0.0f && near[e / 2]) scored_sum[e / 2] += c[e];
        }
      });
    }
    float all[2], scored[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = quad_sum(sum[r]);
      scored[r] = all[r] = (shift[r] + log2f(sum[r])) * kLn2;
      if (two) scored[r] = (scored_shift[r] + log2f(quad_sum(scored_sum[r]))) * kLn2;
    }

    const int64_t first = int64_t{tile} * kTile;
    const int rows = static_cast<int>(min(p.length - first, int64_t{kTile}));
    // The four lanes of a row hold the same numbers: of each, lane 0 writes row g and lane 1 row g + 8.
    if (t < 2 && g + 8 * t < rows) {
      const int64_t at = line + first + g + 8 * t;
      if (p.tile_sums == nullptr) p.score[at] = t == 0 ? scored[0] : scored[1];
      if (p.saved_all != nullptr) p.saved_all[at] = t == 0 ? all[0] : all[1];
      if (p.saved_scored != nullptr) p.saved_scored[at] = t == 0 ? scored[0] : scored[1];
    }
    if (p.tile_sums != nullptr) {
      float total = (g < rows ? scored[0] : 0.0f) + (g + 8 < rows ? scored[1] : 0.0f);
      total += shuffle_xor(total, 4);
      total += shuffle_xor(total, 8);
      total += shuffle_xor(total, 16);
      if (lane == 0) p.tile_sums[(row * p.heads + head) * p.tiles + tile] = total;
    }

    if constexpr (OUTPUT) {
      float o[kPlanes][4] = {};
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (FIXED || i < groups) {
          // The accumulators of two tiles of 8 keys are, rounded, the fragment of A for these 16 keys.
          const float(&x)[4] = s[i][0];
          const float(&y)[4] = s[i][1];
          const uint32_t a0 = pack<Element>(x[0], x[1]), a1 = pack<Element>(x[2], x[3]);
          const uint32_t a2 = pack<Element>(y[0], y[1]), a3 = pack<Element>(y[2], y[3]);
#pragma unroll
          for (int plane = 0; plane + 1 < kPlanes; plane += 2) {
            uint32_t b[4];
            load_matrices<4, true>(b, value_at + 16 * (plane * kKeys + 16 * i));
            mma<Element>(o[plane], a0, a1, a2, a3, b[0], b[1]);
            mma<Element>(o[plane + 1], a0, a1, a2, a3, b[2], b[3]);
          }
          if constexpr (kPlanes % 2 == 1) {
            uint32_t b[2];
            load_matrices<2, true>(b, value_at + 16 * ((kPlanes - 1) * kKeys + 16 * i));
            mma<Element>(o[kPlanes - 1], a0, a1, a2, a3, b[0], b[1]);
          }
        }
      }
      uint16_t* out = p.out + (row * p.length + first) * p.width + head * D;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (g + 8 * r >= rows) continue;
        const float inverse = sum[r] == 0.0f ? 0.0f : reciprocal_fast(sum[r]);
        each_chunk<D>([&](auto n, int begin) {
          constexpr int kPairs = decltype(n)::value;
          uint32_t packed[kPairs];
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            const float(&c)[4] = o[begin / 8 + j];
            packed[j] = pack<Element>(c[2 * r] * inverse, c[2 * r + 1] * inverse);
          }
          store_global<kPairs>(out + static_cast<int64_t>(g + 8 * r) * p.width + begin + 2 * kPairs * t, packed);
        });
      }
    }
  }
}

}  // namespace dsd_fast::cuda
