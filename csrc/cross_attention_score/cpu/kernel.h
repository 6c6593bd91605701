// The kernels. Included once for each instruction set, inside its namespace, after vector.h, and after kColumns (vectors of a
// tile of a product) is defined. Both products, of queries with keys and of probabilities with values, go
// through one tile of registers: a few rows of broadcast numbers times a panel that stays in cache.

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLn2 = 0.6931471805599453f;

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Subnormals as a difference of two numbers: threads that take float32's own subnormals as 0 (set_flush_denormal) read them, too.
inline float from_float16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t subnormal = 0x38800000 | bits;  // 2^-14 · (1 + mantissa)
  float value;
  __builtin_memcpy(&value, &subnormal, 4);
  value -= 0x1p-14f;
  uint32_t result;
  __builtin_memcpy(&result, &value, 4);
  if ((x & 0x7c00) != 0) result = bits + 0x38000000;
  if ((x & 0x7c00) == 0x7c00) result = 0x7f800000 | bits;
  result |= sign;
  __builtin_memcpy(&value, &result, 4);
  return value;
}

// Round to nearest even by adding a number whose last place is that of the result.
inline uint16_t to_float16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value += 0.5f;
    __builtin_memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + ((bits >> 13) & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | (bits >> 13));
}

inline float element(const Array& a, int64_t at) {
  switch (a.type) {
    case Scalar::float32: return static_cast<const float*>(a.data)[at];
    case Scalar::bfloat16: return from_bfloat16(static_cast<const uint16_t*>(a.data)[at]);
    default: return from_float16(static_cast<const uint16_t*>(a.data)[at]);
  }
}

template <class T, class Convert>
inline void read(float* to, const T* from, int64_t stride, int64_t n, Convert convert) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i * stride]);
}

// Head `head` of one row of `a`, as floats.
inline void read_row(float* to, const Array& a, int64_t outer, int64_t row, int64_t head, int64_t width) {
  const int64_t at = outer * a.outer + row * a.row + head * width * a.element;
  if (a.type == Scalar::float32)
    read(to, static_cast<const float*>(a.data) + at, a.element, width, [](float x) { return x; });
  else if (a.type == Scalar::bfloat16)
    read(to, static_cast<const uint16_t*>(a.data) + at, a.element, width, from_bfloat16);
  else
    read(to, static_cast<const uint16_t*>(a.data) + at, a.element, width, from_float16);
}

template <class T, class Convert>
inline void write(T* to, const float* from, float factor, int64_t stride, int64_t n, Convert convert) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i] * factor);
  else
    for (int64_t i = 0; i < n; ++i) to[i * stride] = convert(from[i] * factor);
}

inline void write_row(const Array& a, const float* from, float factor, int64_t outer, int64_t row, int64_t head,
                      int64_t width) {
  const int64_t at = outer * a.outer + row * a.row + head * width * a.element;
  if (a.type == Scalar::float32)
    write(static_cast<float*>(a.data) + at, from, factor, a.element, width, [](float x) { return x; });
  else if (a.type == Scalar::bfloat16)
    write(static_cast<uint16_t*>(a.data) + at, from, factor, a.element, width, to_bfloat16);
  else
    write(static_cast<uint16_t*>(a.data) + at, from, factor, a.element, width, to_float16);
}

// A matrix read by broadcast: row r, depth k at data[r * row + k * depth].
struct Broadcast {
  const float* data;
  int64_t row, depth;
};

enum class Begin { zero, row, sum };  // what a product is added to: nothing, one row for all, what is there

// c (R rows, C vectors) = begin + Σ_k a[r, k] b[k, :]. `begin` is added last: beside a large one every term of the sum
// would be rounded to its last place.
template <int R, int C, Begin B>
inline __attribute__((always_inline)) void tile(Broadcast a, int64_t depth, const float* b, int64_t b_row, float* c,
                                                int64_t c_row, const float* begin) {
  vec sum[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j)
      sum[r][j] = vec{};
  for (int64_t k = 0; k < depth; ++k) {
    vec panel[C];
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) panel[j] = load(b + k * b_row + j * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vec x = all(a.data[r * a.row + k * a.depth]);
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) sum[r][j] += x * panel[j];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) {
      float* to = c + r * c_row + j * kWidth;
      const vec before = B == Begin::sum ? load(to) : B == Begin::row ? load(begin + j * kWidth) : vec{};
      store(to, B == Begin::zero ? sum[r][j] : before + sum[r][j]);
    }
}

template <int C, Begin B>
void strip(int64_t rows, Broadcast a, int64_t depth, const float* b, int64_t b_row, float* c, int64_t c_row,
           const float* begin) {
  // As many rows as leave registers for the panel and a broadcast number.
  constexpr int R = C * 8 <= kRegisters ? 8 : C * 4 <= kRegisters ? 4 : 2;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    tile<R, C, B>({a.data + r * a.row, a.row, a.depth}, depth, b, b_row, c + r * c_row, c_row, begin);
  for (; r < rows; ++r)
    tile<1, C, B>({a.data + r * a.row, a.row, a.depth}, depth, b, b_row, c + r * c_row, c_row, begin);
}

// c (rows, columns) = begin + a b, columns a multiple of kWidth, in strips of about equal width.
template <Begin B>
void strips(int64_t rows, int64_t columns, int64_t depth, Broadcast a, const float* b, int64_t b_row, float* c,
            int64_t c_row, const float* begin) {
  const int64_t vectors = columns / kWidth, count = (vectors + kColumns - 1) / kColumns;
  int64_t done = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t n = (vectors - done + count - s - 1) / (count - s), at = done * kWidth;
    const float* from = B == Begin::row ? begin + at : nullptr;
    switch (n) {
      case 1: strip<1, B>(rows, a, depth, b + at, b_row, c + at, c_row, from); break;
      case 2: strip<2, B>(rows, a, depth, b + at, b_row, c + at, c_row, from); break;
      case 3: strip<3, B>(rows, a, depth, b + at, b_row, c + at, c_row, from); break;
      // Narrow vectors have no tile of four.
      case 4: strip<kColumns < 4 ? kColumns : 4, B>(rows, a, depth, b + at, b_row, c + at, c_row, from); break;
      default: strip<kColumns, B>(rows, a, depth, b + at, b_row, c + at, c_row, from);
    }
    done += n;
  }
}

// The same for any depth. A sum of more than kDepth terms is made of several: it loses fewer digits, as many as a library's
// product does.
template <Begin B>
void product(int64_t rows, int64_t columns, int64_t depth, Broadcast a, const float* b, int64_t b_row, float* c,
             int64_t c_row, const float* begin = nullptr) {
  constexpr int64_t kDepth = 48;
  const int64_t parts = depth > kDepth ? (depth + kDepth - 1) / kDepth : 1;
  strips<B>(rows, columns, depth / parts, a, b, b_row, c, c_row, begin);
  for (int64_t i = 1; i < parts; ++i) {
    const int64_t k = depth * i / parts, next = depth * (i + 1) / parts;
    strips<Begin::sum>(rows, columns, next - k, {a.data + k * a.depth, a.row, a.depth}, b + k * b_row, b_row, c, c_row,
                       nullptr);
  }
}

// A text's keys and values at one head, packed: what is masked is 0, so that it may hold anything.
struct Packed {
  const float *keys, *bias, *scored;  // keysᵀ · scale · log₂e (D, T'); log₂e · bias (T'); 0 or −∞ (T'), or null
  int64_t tokens, columns, width;     // T, T' = columns_of(T), D' = padded(D)
};

class Scratch {
 public:
  explicit Scratch(float* at) : at_(at) {}
  float* take(int64_t floats) {
    float* taken = at_;
    at_ += floats;
    return taken;
  }

 private:
  float* at_;
};

inline bool exists(const Inputs& in, int64_t text, int64_t token) {
  if (in.length && token >= in.length[text]) return false;
  return !in.bias || in.bias[text * in.shape.tokens + token] != -kInfinity;
}

// Keys or values of a text at a head, row by row (T, D'), zeros where masked.
inline void pack_rows(const Inputs& in, const Array& from, int64_t text, int64_t head, float factor, float* to) {
  const int64_t width = padded(in.shape.width);
  for (int64_t t = 0; t < in.shape.tokens; ++t, to += width) {
    const bool real = exists(in, text, t);
    if (real) read_row(to, from, text, t, head, in.shape.width);
    if (real && factor != 1.0f)
      for (int64_t d = 0; d < in.shape.width; ++d) to[d] *= factor;
    for (int64_t d = real ? in.shape.width : 0; d < width; ++d) to[d] = 0.0f;
  }
}

// rows (n, width) → columns (width, columns), zeros beyond n.
inline void turn(const float* rows, int64_t n, int64_t row, int64_t width, float* to, int64_t columns) {
  for (int64_t t0 = 0; t0 < columns; t0 += kPad)
    for (int64_t d0 = 0; d0 < width; d0 += kPad) {
      const int64_t t1 = t0 + kPad < n ? t0 + kPad : n, d1 = d0 + kPad < width ? d0 + kPad : width;
      for (int64_t d = d0; d < d1; ++d) {
        for (int64_t t = t0; t < t1; ++t) to[d * columns + t] = rows[t * row + d];
        for (int64_t t = t1 > t0 ? t1 : t0; t < t0 + kPad; ++t) to[d * columns + t] = 0.0f;
      }
    }
}

inline Packed pack_keys(const Inputs& in, int64_t text, int64_t head, Scratch& scratch, float* rows) {
  const int64_t tokens = in.shape.tokens, columns = columns_of(tokens), width = padded(in.shape.width);
  float* keys = scratch.take(in.shape.width * columns);
  float* bias = scratch.take(columns);
  float* scored = scratch.take(columns);
  pack_rows(in, in.k, text, head, in.scale * kLog2E, rows);
  turn(rows, tokens, width, in.shape.width, keys, columns);
  for (int64_t t = 0; t < columns; ++t) {
    const bool real = t < tokens && exists(in, text, t);
    bias[t] = real ? (in.bias ? in.bias[text * tokens + t] * kLog2E : 0.0f) : -kInfinity;
    scored[t] = real && in.mask && in.mask[text * tokens + t] ? 0.0f : -kInfinity;
  }
  return {keys, bias, in.mask ? scored : nullptr, tokens, columns, width};
}

// A block of queries, or of gradients of the output: where it lies if it is made of floats, else copied.
inline Broadcast block_of(const Array& a, const Shape& shape, int64_t row, int64_t head, int64_t position, int64_t n,
                          float* copy) {
  if (a.type == Scalar::float32)
    return {static_cast<const float*>(a.data) + row * a.outer + position * a.row + head * shape.width * a.element, a.row,
            a.element};
  const int64_t width = padded(shape.width);
  for (int64_t i = 0; i < n; ++i) read_row(copy + i * width, a, row, position + i, head, shape.width);
  return {copy, width, 1};
}

// Logits of a row → exp2(logit − largest), their sum, and the largest. A row without keys: zeros, 0, −∞.
inline void exponentials(float* row, int64_t columns, float* sum, float* largest) {
  vec most = load(row);
  for (int64_t j = kWidth; j < columns; j += kWidth) most = maximum(load(row + j), most);
  const float m = lane_maximum(most);
  const float base = m == -kInfinity ? 0.0f : m;
  vec total = {};
  for (int64_t j = 0; j < columns; j += kWidth) {
    const vec e = exp2_nonpositive(load(row + j) - base);
    store(row + j, e);
    total += e;
  }
  *sum = lane_sum(total);
  *largest = m;
}

// ln of sums of exponentials, natural: (largest + log₂ sum) ln 2; −∞ for a row without keys.
inline void logarithms(const float* sum, const float* largest, int64_t n, float* lse) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const vec m = load(largest + i), s = load(sum + i);
    const vec value = (m + log2_positive(s)) * kLn2;
    const vec answer = m == -kInfinity ? m : value;
    for (int64_t j = 0; j < kWidth && i + j < n; ++j) lse[i + j] = answer[j];
  }
}

// The score's own sums where a mask leaves keys out of it. Not from the probabilities: what the scored keys have may be
// too little beside the others.
inline void scored_logarithms(const float* logits, const Packed& text, int64_t n, float* row, float* sum, float* largest,
                              float* lse) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < text.columns; j += kWidth)
      store(row + j, load(logits + i * text.columns + j) + load(text.scored + j));
    exponentials(row, text.columns, sum + i, largest + i);
  }
  logarithms(sum, largest, n, lse);
}

inline float block_sum(const float* x, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return static_cast<float>(total);
}

void forward(const Forward& p, const Task& task, float* memory) {
  const Inputs& in = p.in;
  const Shape& s = in.shape;
  Scratch scratch(memory);
  const int64_t width = padded(s.width), per_row = blocks(s.length);
  float* values = scratch.take(s.tokens * width);
  const Packed text = pack_keys(in, task.text, task.head, scratch, values);
  if (p.out.data) pack_rows(in, in.v, task.text, task.head, 1.0f, values);
  float* copy = scratch.take(kBlock * width);
  float* out = scratch.take(kBlock * width);
  float* logits = scratch.take(kBlock * text.columns);
  float* masked = scratch.take(text.columns);
  float* sum = scratch.take(kBlock);
  float* largest = scratch.take(kBlock);
  float* lse = scratch.take(kBlock);
  float* scored = scratch.take(kBlock);

  for (int64_t block = task.first; block < task.last; ++block) {
    const int64_t row = in.order[in.start[task.text] + block / per_row], position = block % per_row * kBlock;
    const int64_t n = s.length - position < kBlock ? s.length - position : kBlock;
    const int64_t at = (row * s.heads + task.head) * s.length + position;
    const Broadcast q = block_of(in.q, s, row, task.head, position, n, copy);
    product<Begin::row>(n, text.columns, s.width, q, text.keys, text.columns, logits, text.columns, text.bias);
    if (text.scored) scored_logarithms(logits, text, n, masked, sum, largest, scored);
    for (int64_t i = 0; i < n; ++i) exponentials(logits + i * text.columns, text.columns, sum + i, largest + i);
    logarithms(sum, largest, n, lse);
    const float* score = text.scored ? scored : lse;
    if (p.score)
      for (int64_t i = 0; i < n; ++i) p.score[at + i] = score[i];
    if (p.partial) p.partial[(row * s.heads + task.head) * per_row + position / kBlock] = block_sum(score, n);
    if (p.lse)
      for (int64_t i = 0; i < n; ++i) p.lse[at + i] = lse[i];
    if (p.scored)
      for (int64_t i = 0; i < n; ++i) p.scored[at + i] = scored[i];
    if (!p.out.data) continue;
    product<Begin::zero>(n, width, s.tokens, {logits, text.columns, 1}, values, width, out, width);
    for (int64_t i = 0; i < n; ++i)
      write_row(p.out, out + i * width, sum[i] == 0.0f ? 0.0f : 1.0f / sum[i], row, position + i, task.head, s.width);
  }
}

void maps(const Maps& p, int64_t row, int64_t first, int64_t last, float* memory) {
  const Inputs& in = p.in;
  const Shape& s = in.shape;
  const int64_t width = padded(s.width);
  float* out = p.out + row * p.count * s.length;
  for (int64_t i = 0; i < p.count; ++i)
    for (int64_t at = first * kBlock; at < last * kBlock && at < s.length; ++at) out[i * s.length + at] = 0.0f;
  for (int64_t head = 0; head < s.heads; ++head) {
    Scratch scratch(memory);
    float* rows = scratch.take(s.tokens * width);
    const Packed text = pack_keys(in, p.text[row], head, scratch, rows);
    float* copy = scratch.take(kBlock * width);
    float* logits = scratch.take(kBlock * text.columns);
    for (int64_t block = first; block < last; ++block) {
      const int64_t position = block * kBlock, n = s.length - position < kBlock ? s.length - position : kBlock;
      const Broadcast q = block_of(in.q, s, row, head, position, n, copy);
      product<Begin::row>(n, text.columns, s.width, q, text.keys, text.columns, logits, text.columns, text.bias);
      for (int64_t i = 0; i < n; ++i) {
        float sum, largest;
        exponentials(logits + i * text.columns, text.columns, &sum, &largest);
        const float share = sum == 0.0f ? 0.0f : 1.0f / (sum * static_cast<float>(s.heads));
        for (int64_t c = 0; c < p.count; ++c)
          out[c * s.length + position + i] += logits[i * text.columns + p.chosen[row * p.count + c]] * share;
      }
    }
  }
}

// Logits of a row → its probabilities times `factor`; zeros where no key exists. From the row itself and not from the
// log-sum-exp that the forward pass kept: that is rounded once more, and an exponent's rounding is a share of the result.
inline void probabilities(const float* logits, const float* masked, int64_t columns, float factor, float* to) {
  for (int64_t j = 0; j < columns; j += kWidth)
    store(to + j, masked ? load(logits + j) + load(masked + j) : load(logits + j));
  float sum, largest;
  exponentials(to, columns, &sum, &largest);
  const float share = sum == 0.0f ? 0.0f : factor / sum;
  for (int64_t j = 0; j < columns; j += kWidth) store(to + j, load(to + j) * share);
}

void backward(const Backward& p, const Task& task, const Sums& sums, float* memory) {
  const Inputs& in = p.in;
  const Shape& s = in.shape;
  Scratch scratch(memory);
  const int64_t width = padded(s.width), columns = columns_of(s.tokens), per_row = blocks(s.length);
  float* keys = scratch.take(s.tokens * width);
  const Packed text = pack_keys(in, task.text, task.head, scratch, keys);
  float* values = scratch.take(s.width * columns);
  if (p.dout.data) {
    pack_rows(in, in.v, task.text, task.head, 1.0f, keys);
    turn(keys, s.tokens, width, s.width, values, columns);
  }
  pack_rows(in, in.k, task.text, task.head, in.scale, keys);
  float* q = scratch.take(kBlock * width);
  float* dout = scratch.take(kBlock * width);
  float* logits = scratch.take(kBlock * columns);
  float* weights = scratch.take(kBlock * columns);
  float* ds = scratch.take(kBlock * columns);
  for (int64_t i = 0; i < s.tokens * width; ++i) sums.dk[i] = 0.0f;
  if (p.dout.data)
    for (int64_t i = 0; i < s.tokens * width; ++i) sums.dv[i] = 0.0f;
  for (int64_t t = 0; t < s.tokens; ++t) sums.dbias[t] = 0.0f;

  for (int64_t block = task.first; block < task.last; ++block) {
    const int64_t row = in.order[in.start[task.text] + block / per_row], position = block % per_row * kBlock;
    const int64_t n = s.length - position < kBlock ? s.length - position : kBlock;
    const int64_t at = (row * s.heads + task.head) * s.length + position;
    for (int64_t i = 0; i < n; ++i) {
      read_row(q + i * width, in.q, row, position + i, task.head, s.width);
      for (int64_t d = s.width; d < width; ++d) q[i * width + d] = 0.0f;
    }
    product<Begin::row>(n, columns, s.width, {q, width, 1}, text.keys, columns, logits, columns, text.bias);
    if (p.dout.data) {
      for (int64_t i = 0; i < n; ++i) {
        read_row(dout + i * width, p.dout, row, position + i, task.head, s.width);
        for (int64_t d = s.width; d < width; ++d) dout[i * width + d] = 0.0f;
      }
      product<Begin::zero>(n, columns, s.width, {dout, width, 1}, values, columns, ds, columns);
    }
    for (int64_t i = 0; i < n; ++i) {
      float *weight = weights + i * columns, *slope = ds + i * columns;
      if (p.dout.data) {
        probabilities(logits + i * columns, nullptr, columns, 1.0f, weight);
        vec total = {};
        for (int64_t j = 0; j < columns; j += kWidth) total += load(weight + j) * load(slope + j);
        const float delta = lane_sum(total);
        for (int64_t j = 0; j < columns; j += kWidth) store(slope + j, load(weight + j) * (load(slope + j) - delta));
      } else {
        for (int64_t j = 0; j < columns; j += kWidth) store(slope + j, vec{});
      }
      if (p.dscore) {
        const float grad = p.mean ? p.dscore[row * s.heads + task.head] / static_cast<float>(s.length) : p.dscore[at + i];
        float* counted = logits + i * columns;
        // Where every key is scored, these are the probabilities of the output too.
        if (p.dout.data && !text.scored)
          for (int64_t j = 0; j < columns; j += kWidth) store(counted + j, load(weight + j) * grad);
        else
          probabilities(counted, text.scored, columns, grad, counted);
        for (int64_t j = 0; j < columns; j += kWidth) store(slope + j, load(slope + j) + load(counted + j));
      }
    }
    for (int64_t j = 0; j < columns; j += kWidth) {
      vec total = {};
      for (int64_t i = 0; i < n; ++i) total += load(ds + i * columns + j);
      for (int64_t t = 0; t < kWidth && j + t < s.tokens; ++t) sums.dbias[j + t] += total[t];
    }
    product<Begin::sum>(s.tokens, width, n, {ds, 1, columns}, q, width, sums.dk, width);
    if (p.dout.data) product<Begin::sum>(s.tokens, width, n, {weights, 1, columns}, dout, width, sums.dv, width);
    product<Begin::zero>(n, width, s.tokens, {ds, columns, 1}, keys, width, q, width);
    for (int64_t i = 0; i < n; ++i) write_row(p.dq, q + i * width, 1.0f, row, position + i, task.head, s.width);
  }
  for (int64_t i = 0; i < s.tokens * width; ++i) sums.dk[i] *= in.scale;
}

void gather(const Shape& s, const Sums* tasks, int64_t n, int64_t text, int64_t head, const Array& dk, const Array& dv) {
  const int64_t width = padded(s.width);
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = 0; j < s.tokens * width; ++j) {
      tasks[0].dk[j] += tasks[i].dk[j];
      if (dv.data) tasks[0].dv[j] += tasks[i].dv[j];
    }
  for (int64_t t = 0; t < s.tokens; ++t) {
    write_row(dk, tasks[0].dk + t * width, 1.0f, text, t, head, s.width);
    if (dv.data) write_row(dv, tasks[0].dv + t * width, 1.0f, text, t, head, s.width);
  }
}
