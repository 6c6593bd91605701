// Vectors of kWidth floats and the few functions on them that the kernels need. Included once for each instruction set,
// after kWidth is defined and inside that set's namespace: nothing here may be shared between sets.

typedef float vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t ivec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t uvec __attribute__((vector_size(4 * kWidth)));
typedef float unaligned_vec __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));

constexpr float kLog2E = 1.4426950408889634f;

inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<unaligned_vec*>(p) = x; }
inline vec all(float x) { return x - vec{}; }
inline vec maximum(vec a, vec b) { return a > b ? a : b; }

inline float lane_maximum(vec x) {
  float lanes[kWidth];
  __builtin_memcpy(lanes, &x, sizeof(x));
  for (int n = kWidth / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] = lanes[i] > lanes[i + n] ? lanes[i] : lanes[i + n];
  return lanes[0];
}

inline float lane_sum(vec x) {
  float lanes[kWidth];
  __builtin_memcpy(lanes, &x, sizeof(x));
  for (int n = kWidth / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// 2^x for x ≤ 0, or a rounding above: 2^n · 2^f with n = round(x), f in [−1/2, 1/2], by a polynomial of relative error 2e-9 (least maximum, by
// Lawson's iteration). Below 2^−126 the result is 0. NaN stays NaN.
inline vec exp2_nonpositive(vec x) {
  const vec magic = all(12582912.0f);  // 1.5 · 2^23: adding it leaves round(x) in the low bits
  const vec shifted = x + magic;
  const vec f = x - (shifted - magic);
  vec p = all(1.53458075e-4f);
  p = p * f + 1.339993118e-3f;
  p = p * f + 9.618488974e-3f;
  p = p * f + 5.550328777e-2f;
  p = p * f + 2.402264689e-1f;
  p = p * f + 6.931472057e-1f;
  p = p * f + 1.0f;
  const vec scaled = (vec)((uvec)p + ((uvec)shifted << 23));
  const vec result = x < -126.0f ? vec{} : scaled;
  return x == x ? result : x;
}

// log₂ x for normal x > 0: exponent, and a polynomial in m − 1 for the mantissa m in [√½, √2), relative error 3e-8.
inline vec log2_positive(vec x) {
  const uvec bits = (uvec)x - 0x3f3504f3;  // √½
  const ivec exponent = (ivec)bits >> 23;
  const vec f = (vec)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  vec p = all(1.258353709e-1f);
  p = p * f - 2.072689404e-1f;
  p = p * f + 2.157158457e-1f;
  p = p * f - 2.389449515e-1f;
  p = p * f + 2.879162375e-1f;
  p = p * f - 3.607036767e-1f;
  p = p * f + 4.809106431e-1f;
  p = p * f - 7.213473469e-1f;
  p = p * f + 1.442695004f;
  const vec result = p * f + __builtin_convertvector(exponent, vec);
  return x == x ? result : x;
}
