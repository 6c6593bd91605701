// The memory-bound kernels, included after vector.h once for each instruction set.

constexpr int64_t kRun = 64;  // numbers added up before their sum is added to those of other runs

// A vector of n ≤ kWidth numbers, and back.
inline vec load_some(const float* p, int64_t n) {
  if (n == kWidth) return load(p);
  float lanes[kWidth] = {};
  __builtin_memcpy(lanes, p, n * sizeof(float));
  return load(lanes);
}

inline void store_some(float* p, vec x, int64_t n) {
  if (n == kWidth) return store(p, x);
  float lanes[kWidth];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(float));
}

inline vec magnitude(vec x) { return maximum(x, -x); }

inline vec silu(vec x) {
  const vec e = exp2_nonpositive(magnitude(x) * -kLog2E);
  return x * ((x < 0.0f ? e : all(1.0f)) / (1.0f + e));
}

// Φ(−|x|), Φ the normal distribution function, as t · 2^(P(t) − x²/2 · log₂e) with t = 1/(1 + 0.4|x|): a polynomial P of
// relative error 9e-8 in the result for |x| ≤ 13 (least maximum, by Lawson's iteration). Beyond, the power is 0 in floats.
inline vec normal_tail(vec x) {
  const vec t = 1.0f / (1.0f + 0.4f * magnitude(x));
  vec p = all(2.739330817e-1f);
  p = p * t - 1.402803503f;
  p = p * t + 2.801122651f;
  p = p * t - 2.515099289f;
  p = p * t + 7.741550368e-1f;
  p = p * t - 2.584260530e-1f;
  p = p * t + 5.360289628e-1f;
  p = p * t + 1.438612196f;
  p = p * t - 2.647522900f;
  return t * exp2_nonpositive(p - x * x * (0.5f * kLog2E));
}

inline vec gelu(vec x) {
  const vec tail = normal_tail(x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

// sum[j] = Σ over rows of x[j] + offset[j], or of its square, by runs, so that the error of a long sum is that of short ones.
template <bool Squares>
inline void column_sums(const Norm& p, float* sum, float* run, const float* offset) {
  const int64_t width = padded(p.width);
  for (int64_t j = 0; j < width; ++j) sum[j] = 0.0f;
  for (int64_t first = 0; first < p.length; first += kRun) {
    const int64_t last = first + kRun < p.length ? first + kRun : p.length;
    for (int64_t j = 0; j < p.width; j += kWidth) {
      const int64_t n = p.width - j < kWidth ? p.width - j : kWidth;
      const vec shift = load(offset + j);
      vec total{};
      for (int64_t i = first; i < last; ++i) {
        const vec x = load_some(p.x + i * p.row + j, n) + shift;
        total += Squares ? x * x : x;
      }
      store(run + j, total);
    }
    for (int64_t j = 0; j < width; j += kWidth) store(sum + j, load(sum + j) + load(run + j));
  }
}

// `scratch` holds 4 · padded(width) floats.
void norm(const Norm& p, float* scratch) {
  const int64_t width = padded(p.width), groups = p.width / p.group;
  const double count = static_cast<double>(p.length) * static_cast<double>(p.group);
  float *sum = scratch, *run = sum + width, *offset = run + width, *factor = offset + width;
  for (int64_t j = 0; j < 4 * width; ++j) scratch[j] = 0.0f;
  column_sums<false>(p, sum, run, offset);
  for (int64_t g = 0; g < groups; ++g) {
    double mean = 0.0;
    for (int64_t j = g * p.group; j < (g + 1) * p.group; ++j)
      mean += sum[j] + (p.shift ? static_cast<double>(p.shift[j]) * static_cast<double>(p.length) : 0.0);
    mean /= count;
    for (int64_t j = g * p.group; j < (g + 1) * p.group; ++j)
      offset[j] = static_cast<float>((p.shift ? static_cast<double>(p.shift[j]) : 0.0) - mean);
  }
  column_sums<true>(p, sum, run, offset);
  for (int64_t g = 0; g < groups; ++g) {
    double variance = 0.0;
    for (int64_t j = g * p.group; j < (g + 1) * p.group; ++j) variance += sum[j];
    const float rstd = static_cast<float>(1.0 / __builtin_sqrt(variance / count + p.eps));
    for (int64_t j = g * p.group; j < (g + 1) * p.group; ++j) factor[j] = p.weight ? rstd * p.weight[j] : rstd;
  }
  for (int64_t j = 0; j < p.width; ++j) sum[j] = p.bias ? p.bias[j] : 0.0f;
  for (int64_t i = 0; i < p.length; ++i)
    for (int64_t j = 0; j < p.width; j += kWidth) {
      const int64_t n = p.width - j < kWidth ? p.width - j : kWidth;
      const vec x = load_some(p.x + i * p.row + j, n);
      const vec y = (x + load(offset + j)) * load(factor + j) + load(sum + j);
      store_some(p.y + i * p.row + j, p.silu ? silu(y) : y, n);
    }
}

void gate(const Gate& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const float* x = p.x + 2 * i * p.width;
    for (int64_t j = 0; j < p.width; j += kWidth) {
      const int64_t n = p.width - j < kWidth ? p.width - j : kWidth;
      store_some(p.y + i * p.width + j, load_some(x + j, n) * gelu(load_some(x + p.width + j, n)), n);
    }
  }
}
