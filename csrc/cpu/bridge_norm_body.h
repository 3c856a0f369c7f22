// The inner part of bridge_norm: rows of one tensor, for one instruction set.
//
// Included once per instruction set, see cpu/isa.h. A row is widened to fp32 into scratch memory
// that fits the first-level cache, so that all passes but the first and the last stay there. With a
// low-rank bridge a few rows go together, because its weights are worth loading for several.
//
// `up` is packed once per call into blocks of kLanes channels, [D / kLanes, R, kLanes] in fp32: its
// rows of R elements are too short for vectors.

// sums of a row, so that one does not wait for another and each adds up fewer terms
constexpr int kSums = 4;
// rows of `down` at a time; with kTokens tokens each, their sums fit in the registers
constexpr int kDownRows = kLanes == 16 ? 4 : 2;

// kLanes elements, or as many as there are of the `count` left, with zeros behind.
template <bool kWhole, class Element>
INTERLACE_TARGET static inline Vector load_left(const Element* from, int64_t count) {
  return kWhole || count >= kLanes ? load(from) : load_some(from, count);
}

template <bool kWhole, class Element>
INTERLACE_TARGET static inline void store_left(const Vector& vector, Element* to, int64_t count) {
  if (kWhole || count >= kLanes) {
    store(vector, to);
  } else {
    store_some(vector, to, count);
  }
}

template <class Element>
INTERLACE_TARGET static void widen(const Element* from, int64_t count, float* to) {
  for (int64_t d = 0; d < count; d += kLanes) store(load_left<false>(from + d, count - d), to + d);
}

// a[0] b[0] a[1] b[1] ... from the halves of two vectors that begin at kStart.
template <size_t kStart, size_t... kIndex>
INTERLACE_TARGET static inline Vector interleave(const Vector& a, const Vector& b,
                                                 std::index_sequence<kIndex...>) {
#if defined(INTERLACE_SHUFFLES)
  return __builtin_shufflevector(a, b, (kStart + kIndex / 2 + kIndex % 2 * kLanes)...);
#else
  return Vector{(kIndex % 2 ? b : a)[kStart + kIndex / 2]...};
#endif
}

// Turns kLanes rows of kLanes elements into columns.
INTERLACE_TARGET static inline void transpose(Vector (&rows)[kLanes]) {
  using Indices = std::make_index_sequence<kLanes>;
  // every round halves the distance between elements that belong side by side
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vector next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], Indices{});
      next[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], Indices{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

template <class Element>
INTERLACE_TARGET static void pack_up(const Element* up, int64_t width, int64_t rank,
                                     float* packed) {
  const int64_t size = width * rank;
  for (int64_t d = 0; d < width; d += kLanes, packed += rank * kLanes) {
    for (int64_t first = 0; first < rank; first += kLanes) {
      Vector rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        // what follows in memory belongs to the next row and becomes columns that nobody takes
        const int64_t at = (d + i) * rank + first;
        rows[i] = at < size ? load_left<false>(up + at, size - at) : Vector{};
      }
      transpose(rows);
      for (int64_t r = 0; r < kLanes && first + r < rank; ++r) {
        store(rows[r], packed + (first + r) * kLanes);
      }
    }
  }
}

// Elements d.. of s = scale (x + residual), and zeros behind the row.
template <bool kWhole, class Element>
INTERLACE_TARGET static inline Vector entering(const Inputs<Element> from, int64_t d) {
  const int64_t left = from.width - d;
  Vector h = load_left<kWhole>(from.x + d, left);
  if (from.residual) h += load_left<kWhole>(from.residual + d, left);
  if (from.scale) h *= load_left<kWhole>(from.scale + d, left);
  return h;
}

template <class Element>
INTERLACE_TARGET static void enter(const Inputs<Element> from, float* s) {
  for (int64_t d = 0; d < from.width; d += kLanes) store(entering<false>(from, d), s + d);
}

// z[token][first..] = <down[first..], s[token]> for kDownRows rows of down and kCount tokens.
template <int kCount, class Element>
INTERLACE_TARGET static void dots(const Element* down, int64_t width, int64_t rank, int64_t first,
                                  const float* s, int64_t stride, float* z) {
  const Element* row[kDownRows];
  // rows beyond the last are read as the last; nobody asks for what comes of them
  for (int64_t r = 0; r < kDownRows; ++r) {
    row[r] = down + (first + r < rank ? first + r : rank - 1) * width;
  }
  Vector sum[kDownRows][kCount] = {};
  for (int64_t d = 0; d < width; d += kLanes) {
    Vector token[kCount];
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) token[t] = load(s + t * stride + d);
#pragma GCC unroll 4
    for (int r = 0; r < kDownRows; ++r) {
      const Vector weight = load_left<false>(row[r] + d, width - d);
#pragma GCC unroll 4
      for (int t = 0; t < kCount; ++t) sum[r][t] += weight * token[t];
    }
  }
  for (int64_t r = 0; r < kDownRows && first + r < rank; ++r) {
    for (int t = 0; t < kCount; ++t) z[t * rank + first + r] = sum_of_lanes(sum[r][t]);
  }
}

// s[token][d..] += up[d..] z[token] for kLanes channels and kCount tokens.
template <int kCount>
INTERLACE_TARGET static inline void add_lifted(const float* packed, int64_t rank, const float* z,
                                               float* s, int64_t stride) {
  Vector sum[kCount];
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t) sum[t] = load(s + t * stride);
  for (int64_t r = 0; r < rank; ++r) {
    const Vector weight = load(packed + r * kLanes);
#pragma GCC unroll 4
    for (int t = 0; t < kCount; ++t) sum[t] += weight * z[t * rank + r];
  }
#pragma GCC unroll 4
  for (int t = 0; t < kCount; ++t) store(sum[t], s + t * stride);
}

// s[token] += up (down s[token])
template <class Element>
INTERLACE_TARGET static void cross(const Element* down, const float* packed, int64_t width,
                                   int64_t rank, int64_t num_tokens, Scratch& scratch) {
  const int64_t stride = scratch.stride();
  for (int64_t first = 0; first < rank; first += kDownRows) {
    int64_t t = 0;
    for (; t + kTokens <= num_tokens; t += kTokens) {
      dots<kTokens>(down, width, rank, first, scratch.row(t), stride, scratch.z() + t * rank);
    }
    for (; t < num_tokens; ++t) {
      dots<1>(down, width, rank, first, scratch.row(t), stride, scratch.z() + t * rank);
    }
  }
  for (int64_t d = 0; d < width; d += kLanes, packed += rank * kLanes) {
    int64_t t = 0;
    for (; t + kTokens <= num_tokens; t += kTokens) {
      add_lifted<kTokens>(packed, rank, scratch.z() + t * rank, scratch.row(t) + d, stride);
    }
    for (; t < num_tokens; ++t) {
      add_lifted<1>(packed, rank, scratch.z() + t * rank, scratch.row(t) + d, stride);
    }
  }
}

INTERLACE_TARGET static inline float total(const Vector (&sums)[kSums]) {
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Writes elements d.. of new_residual, leaves r in scratch memory, and adds to sums. r is there
// already behind a low-rank bridge, and s = r otherwise.
template <bool kIsThere, bool kSquares, bool kWhole, class Element>
INTERLACE_TARGET static inline void settle_some(const Inputs<Element> from, int64_t start, float* r,
                                                Element* new_residual, Vector (&sums)[kSums]) {
#pragma GCC unroll 4
  for (int i = 0; i < kSums; ++i) {
    const int64_t d = start + i * kLanes, left = from.width - d;
    // what lies behind the row is left over from another
    const Vector value = kIsThere ? load_left<kWhole>(r + d, left) : entering<kWhole>(from, d);
    store(value, r + d);
    store_left<kWhole>(value, new_residual + d, left);
    sums[i] += kSquares ? value * value : value;
  }
}

// Returns the sum of r or of its squares.
template <bool kIsThere, bool kSquares, class Element>
INTERLACE_TARGET static float settle(const Inputs<Element> from, int64_t stride, float* r,
                                     Element* new_residual) {
  constexpr int64_t kStep = kSums * kLanes;
  Vector sums[kSums] = {};
  int64_t d = 0;
  for (; d + kStep <= from.width; d += kStep) {
    settle_some<kIsThere, kSquares, true>(from, d, r, new_residual, sums);
  }
  for (; d < stride; d += kStep) {
    settle_some<kIsThere, kSquares, false>(from, d, r, new_residual, sums);
  }
  return total(sums);
}

INTERLACE_TARGET static float sum_of_squares(const float* r, float mean, int64_t stride) {
  Vector sums[kSums] = {};
  for (int64_t start = 0; start < stride; start += kSums * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const Vector value = load(r + start + i * kLanes) - mean;
      sums[i] += value * value;
    }
  }
  return total(sums);
}

template <bool kWhole, class Element>
INTERLACE_TARGET static inline void normalise(const Inputs<Element> from, int64_t d, const float* r,
                                              float mean, float rstd, Element* normed) {
  const int64_t left = from.width - d;
  Vector value = (load(r + d) - mean) * rstd * load_left<kWhole>(from.weight + d, left);
  if (from.bias) value += load_left<kWhole>(from.bias + d, left);
  store_left<kWhole>(value, normed + d, left);
}

template <bool kIsThere, class Element>
INTERLACE_TARGET static void finish(const BridgeNormArgs& args, const Inputs<Element> from,
                                    int64_t row, int64_t stride, float* r) {
  const int64_t width = from.width;
  Element* const new_residual = static_cast<Element*>(args.new_residual) + row * width;
  const float count = static_cast<float>(width);
  float mean = 0, squares;
  if (args.is_layer_norm) {
    mean = settle<kIsThere, false>(from, stride, r, new_residual) / count;
    // so that what lies behind the row adds nothing to the variance
    for (int64_t d = width; d < stride; ++d) r[d] = mean;
    squares = sum_of_squares(r, mean, stride);
  } else {
    squares = settle<kIsThere, true>(from, stride, r, new_residual);
  }
  const float rstd = 1 / std::sqrt(squares / count + args.eps);
  args.rstd[row] = rstd;
  args.mean[row] = mean;
  Element* const normed = static_cast<Element*>(args.normed) + row * width;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) normalise<true>(from, d, r, mean, rstd, normed);
  if (d < width) normalise<false>(from, d, r, mean, rstd, normed);
}

template <class Element>
INTERLACE_TARGET static void rows_of(const BridgeNormArgs& args, const LowRank& low,
                                     const Widened& wide, int64_t begin, int64_t end,
                                     Scratch& scratch) {
  const auto inputs = [&](int64_t row) -> Inputs<Element> {
    const Element* const x = static_cast<const Element*>(args.x) + row * args.x_stride;
    const Element* const residual = static_cast<const Element*>(args.residual);
    return {x,          residual ? residual + row * args.residual_stride : nullptr,
            wide.scale, wide.weight,
            wide.bias,  args.width};
  };
  const int64_t stride = scratch.stride();
  if (low.rank == 0) {
    for (int64_t row = begin; row < end; ++row) {
      finish<false>(args, inputs(row), row, stride, scratch.row(0));
    }
    return;
  }
  const Element* const down = static_cast<const Element*>(low.down);
  for (int64_t first = begin; first < end; first += kGroup) {
    const int64_t count = first + kGroup < end ? kGroup : end - first;
    for (int64_t t = 0; t < count; ++t) enter(inputs(first + t), scratch.row(t));
    cross(down, wide.up, args.width, low.rank, count, scratch);
    for (int64_t t = 0; t < count; ++t) {
      finish<true>(args, inputs(first + t), first + t, stride, scratch.row(t));
    }
  }
}

INTERLACE_TARGET static void widen_parameter(const Parameter& parameter, int64_t count, float* to) {
  switch (parameter.dtype) {
    case DType::kFloat32:
      return widen(static_cast<const float*>(parameter.data), count, to);
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(parameter.data), count, to);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(parameter.data), count, to);
  }
}

INTERLACE_TARGET static void pack(const void* up, DType dtype, int64_t width, int64_t rank,
                                  float* packed) {
  switch (dtype) {
    case DType::kFloat32:
      return pack_up(static_cast<const float*>(up), width, rank, packed);
    case DType::kBFloat16:
      return pack_up(static_cast<const BFloat16*>(up), width, rank, packed);
    case DType::kFloat16:
      return pack_up(static_cast<const Float16*>(up), width, rank, packed);
  }
}

// Rows begin..end-1 of the tensor.
INTERLACE_TARGET static void some_rows(const BridgeNormArgs& args, const LowRank& low,
                                       const Widened& wide, int64_t begin, int64_t end,
                                       Scratch& scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return rows_of<float>(args, low, wide, begin, end, scratch);
    case DType::kBFloat16:
      return rows_of<BFloat16>(args, low, wide, begin, end, scratch);
    case DType::kFloat16:
      return rows_of<Float16>(args, low, wide, begin, end, scratch);
  }
}
