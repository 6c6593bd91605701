// The instructions of sm_80 and later that CUDA C++ has no words for, one function each.
//
// Kernels use warp-wide instructions and asynchronous copies through this header alone, so that a second header of the
// same name (tests/kernels/cuda_host) can run a kernel's unchanged source on a CPU. Layouts are those of the PTX ISA,
// "Matrix multiply-accumulate operation using mma instruction": lane = 4 g + t holds of
//   A (16 x 16): a0 (g, 2t..2t+1), a1 (g + 8, 2t..), a2 (g, 2t+8..), a3 (g + 8, 2t+8..); A (16 x 8): a0 and a1 alone
//   B (16 x 8):  b0 (2t..2t+1, g), b1 (2t+8.., g);                                       B (8 x 8):  b0 alone
//   C (16 x 8):  c0, c1 (g, 2t..2t+1), c2, c3 (g + 8, 2t..2t+1)
// with two 16-bit elements in a register, the lower index in the lower half.

#pragma once

#include <cstdint>
#include <type_traits>

namespace dsd_fast::cuda {

struct Half {};
struct BFloat16 {};

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Addresses within shared memory have 32 bits.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// The same number, of which the compiler knows nothing. Inside a loop it keeps sums of an address and constants from
// being computed before the loop, each in a register of its own, where they cost nothing as offsets of the loads.
__device__ __forceinline__ unsigned hidden(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Starts copying BYTES (4, 8 or 16, both sides aligned to them) to shared memory; zeros, and nothing is read, unless
// `real`.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
  const int size = real ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(BYTES),
                 "r"(size)
                 : "memory");
  }
}

// Waits for this thread's copies; others see them after a barrier that both pass.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void barrier() { __syncthreads(); }

// The lanes of a warp arrive, and see what the others wrote before.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

__device__ __forceinline__ float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// N = 1, 2 or 4 registers, to an address aligned to their size.
template <int N>
__device__ __forceinline__ void store_global(void* to, const uint32_t* from) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 4) {
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  } else if constexpr (N == 2) {
    *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
  } else {
    *static_cast<unsigned*>(to) = from[0];
  }
}

// Two floats from shared memory. Volatile, here and in load_matrices: what does not change in a loop would otherwise be
// loaded before it, into more registers than there are.
__device__ __forceinline__ void load_shared(float (&to)[2], unsigned address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(address));
}

// COUNT = 2 or 4 matrices of 8 x 8 elements: lane 8 i + r gives the address of row r of matrix i and gets, of each
// matrix, the elements (g, 2t) and (g, 2t + 1); if TRANSPOSED, (2t, g) and (2t + 1, g).
template <int COUNT, bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[COUNT], unsigned row) {
  static_assert(COUNT == 2 || COUNT == 4);
  if constexpr (COUNT == 4 && TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
  } else if constexpr (COUNT == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row));
  } else if constexpr (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(row));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(row));
  }
}

// c += A B with k = 16.
template <class Element>
__device__ __forceinline__ void mma(
    float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Element, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// c += A B with k = 8.
template <class Element>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  if constexpr (std::is_same_v<Element, Half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
  }
}

// Two numbers rounded to nearest even, `low` in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
  if constexpr (std::is_same_v<Element, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
}

// 2 to the x, relative error at most 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within one unit in the last place.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dsd_fast::cuda
