// csrc/common/cuda/primitives.cuh for a CPU: the same functions, which do what the PTX ISA says of the instructions.
//
// An asynchronous copy leaves NaN where it will write, and writes when its thread waits for it: a kernel that waits too
// late, or in another thread only, reads NaN. Fragments are indexed as in the tables of the PTX ISA, sections
// "Matrix fragments for mma.m16n8k16 with floating point type", "… mma.m16n8k8 …" and "ldmatrix".

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (dsd_fast::cuda::host::Index{dsd_fast::cuda::host::Block::now->thread})
#define blockIdx (dsd_fast::cuda::host::Block::block_index)

namespace dsd_fast::cuda {

using std::max;
using std::min;

struct Half {};
struct BFloat16 {};

namespace host {

template <class Element>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<Element, Half>) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return static_cast<float>(x);
  } else {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
}

template <class Element>
uint16_t from_float(float x) {
  uint16_t bits;
  if constexpr (std::is_same_v<Element, Half>) {
    const _Float16 half = static_cast<_Float16>(x);
    std::memcpy(&bits, &half, 2);
  } else {
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if (std::isnan(x)) return 0x7fff;
    bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  return bits;
}

// Element i of a fragment of registers of two.
template <class Element>
float element(const uint32_t* fragment, int i) {
  return to_float<Element>(static_cast<uint16_t>(fragment[i / 2] >> (i % 2 * 16)));
}

template <int K>
struct Operands {
  uint32_t a[K / 4];
  uint32_t b[K / 8];
  float* c;
};

// mma.m16n8kK, K = 16 or 8. Products are exact in double; the sum is rounded once, where hardware's order is its own.
template <class Element, int K>
void multiply(const std::vector<void*>& lanes) {
  float A[16][K], B[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<const Operands<K>*>(lanes[lane]);
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < K / 2; ++i) {
      const int row = (K == 16 ? (i % 4 < 2) : (i < 2)) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      A[row][col] = element<Element>(x.a, i);
    }
    for (int i = 0; i < K / 4; ++i) B[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = element<Element>(x.b, i);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto& x = *static_cast<Operands<K>*>(lanes[lane]);
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? group : group + 8, col = in_group * 2 + (i & 1);
      double sum = x.c[i];
      for (int k = 0; k < K; ++k) sum += static_cast<double>(A[row][k]) * B[k][col];
      x.c[i] = static_cast<float>(sum);
    }
  }
}

// The address of a function's own static is what tells one call from another.
template <class Work>
void meet_warp(const void* kind, void* mine, const Work& work) {
  Block::now->meet(false, kind, mine, work);
}

}  // namespace host

inline unsigned char* shared_memory() { return host::Block::now->shared.get(); }

inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - shared_memory());
}

inline unsigned hidden(unsigned x) { return x; }

template <int BYTES>
void copy_async(void* shared, const void* global, bool real) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
  unsigned char* to = host::Block::now->at(shared_address(shared), BYTES, BYTES);
  if (reinterpret_cast<uintptr_t>(global) % BYTES != 0) host::fail("a misaligned address in global memory");
  std::memset(to, 0xff, BYTES);
  host::Block::now->fiber().copies.push_back([=] {
    if (real) {
      std::memcpy(to, global, BYTES);
    } else {
      std::memset(to, 0, BYTES);
    }
  });
}

inline void wait_for_copies() {
  auto& copies = host::Block::now->fiber().copies;
  for (const auto& copy : copies) copy();
  copies.clear();
}

inline void barrier() {
  static const char kind = 0;
  host::Block::now->meet(true, &kind, nullptr, [](const auto&) {});
}

inline void warp_barrier() {
  static const char kind = 0;
  host::meet_warp(&kind, nullptr, [](const auto&) {});
}

inline float shuffle_xor(float x, int lanes) {
  static const char kind = 0;
  struct Exchange {
    float given, taken;
    int lanes;
  } mine{x, 0, lanes};
  host::meet_warp(&kind, &mine, [](const std::vector<void*>& all) {
    for (int lane = 0; lane < 32; ++lane) {
      auto& to = *static_cast<Exchange*>(all[lane]);
      to.taken = static_cast<Exchange*>(all[lane ^ to.lanes])->given;
    }
  });
  return mine.taken;
}

template <int N>
void store_global(void* to, const uint32_t* from) {
  static_assert(N == 1 || N == 2 || N == 4);
  if (reinterpret_cast<uintptr_t>(to) % (4 * N) != 0) host::fail("a misaligned address in global memory");
  std::memcpy(to, from, 4 * N);
}

inline void load_shared(float (&to)[2], unsigned address) { std::memcpy(to, host::Block::now->at(address, 8, 8), 8); }

// ldmatrix: thread 8 i + r gives the address of row r of matrix i; thread T gets the elements 2 (T % 4) and the next of
// row T / 4, or with .trans those of column T / 4. Addresses of threads beyond 8 COUNT are not used.
template <int COUNT, bool TRANSPOSED>
void load_matrices(uint32_t (&to)[COUNT], unsigned row) {
  static const char kind = 0;
  struct Request {
    unsigned row;
    uint32_t* to;
  } mine{row, to};
  host::meet_warp(&kind, &mine, [](const std::vector<void*>& all) {
    for (int i = 0; i < COUNT; ++i) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) {
        std::memcpy(matrix[r], host::Block::now->at(static_cast<Request*>(all[8 * i + r])->row, 16, 16), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int one = lane / 4, two = 2 * (lane % 4);
        const uint16_t low = TRANSPOSED ? matrix[two][one] : matrix[one][two];
        const uint16_t high = TRANSPOSED ? matrix[two + 1][one] : matrix[one][two + 1];
        static_cast<Request*>(all[lane])->to[i] = low | static_cast<uint32_t>(high) << 16;
      }
    }
  });
}

template <class Element>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static const char kind = 0;
  host::Operands<16> mine{{a0, a1, a2, a3}, {b0, b1}, c};
  host::meet_warp(&kind, &mine, host::multiply<Element, 16>);
}

template <class Element>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  static const char kind = 0;
  host::Operands<8> mine{{a0, a1}, {b0}, c};
  host::meet_warp(&kind, &mine, host::multiply<Element, 8>);
}

template <class Element>
uint32_t pack(float low, float high) {
  return host::from_float<Element>(low) | static_cast<uint32_t>(host::from_float<Element>(high)) << 16;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float reciprocal_fast(float x) { return 1.0f / x; }

}  // namespace dsd_fast::cuda
