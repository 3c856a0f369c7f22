// The inner part of ragged_decode: a block of keys and values for the rows of one kv head, for one
// instruction set.
//
// Included once per instruction set, see cpu/isa.h. Rows are (token, query head) pairs. Every key
// and value of a block is widened to fp32 in registers and serves a tile of rows there: kRows rows
// times kKeys keys for the scores, kRows rows times kColumns vectors for the output. The second
// tile of rows finds the block in the cache.

constexpr int kRows = kLanes == 16 ? 4 : 2;
constexpr int kKeys = 4;
constexpr int kColumns = 4;

// Scores of kKeys keys, `num` of them real, with `Rows` rows of queries.
template <int Rows, class Element>
INTERLACE_TARGET static void score_tile(const Block& block, int64_t first, int num, int64_t row) {
  const Element* keys[kKeys];
  for (int c = 0; c < kKeys; ++c) {
    keys[c] = static_cast<const Element*>(block.keys[first + (c < num ? c : num - 1)]);
  }
  const float* queries = block.queries + row * block.stride;
  Vector sum[Rows * kKeys] = {};
  for (int64_t d = 0; d < block.width; d += kLanes) {
    Vector query[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) query[r] = load(queries + r * block.stride + d);
#pragma GCC unroll 8
    for (int c = 0; c < kKeys; ++c) {
      const Vector key = load_up_to(keys[c] + d, block.width - d);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r * kKeys + c] += query[r] * key;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c < num; ++c) {
      block.scores[(row + r) * kBlock + first + c] = sum_of_lanes(sum[r * kKeys + c]);
    }
  }
}

// Adds to `Columns` vectors of `Rows` rows of the output the values, weighted.
template <int Rows, int Columns, class Element>
INTERLACE_TARGET static void mix_tile(const Block& block, int64_t d, int64_t row) {
  float* const out = block.sums + row * block.stride + d;
  const float* const weights = block.scores + row * kBlock;
  // a sum of its own for every block keeps rounding errors small over many keys
  Vector sum[Rows * Columns] = {};
  for (int64_t n = 0; n < block.num_keys; ++n) {
    const Element* const from = static_cast<const Element*>(block.values[n]) + d;
    Vector value[Columns];
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      // several columns are whole ones
      value[c] = Columns > 1 ? load(from + c * kLanes) : load_up_to(from, block.width - d);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vector weight = broadcast(weights[r * kBlock + n]);
#pragma GCC unroll 8
      for (int c = 0; c < Columns; ++c) sum[r * Columns + c] += weight * value[c];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows * Columns; ++i) {
    float* const to = out + i / Columns * block.stride + i % Columns * kLanes;
    store(load(to) + sum[i], to);
  }
}

template <int Rows, class Element>
INTERLACE_TARGET static void score_rows(const Block& block, int64_t row) {
  const int64_t bytes = block.width * sizeof(Element);
  for (int64_t n = 0; n < block.num_keys; n += kKeys) {
    const int num = static_cast<int>(block.num_keys - n < kKeys ? block.num_keys - n : kKeys);
    // the processor's own prefetching follows the keys, and the values come next
    for (int c = 0; row == 0 && c < num; ++c) {
      const char* const value = static_cast<const char*>(block.values[n + c]);
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(value + at, 0, 3);
    }
    score_tile<Rows, Element>(block, n, num, row);
  }
}

template <int Rows, class Element>
INTERLACE_TARGET static void mix_rows(const Block& block, int64_t row) {
  int64_t d = 0;
  for (; d + kColumns * kLanes <= block.width; d += kColumns * kLanes) {
    mix_tile<Rows, kColumns, Element>(block, d, row);
  }
  for (; d < block.width; d += kLanes) mix_tile<Rows, 1, Element>(block, d, row);
}

// Turns the scores of one row into weights, against the largest score so far.
INTERLACE_TARGET static void weigh_row(const Block& block, int64_t row) {
  float* const scores = block.scores + row * kBlock;
  const int64_t begin = block.seen[row].begin, end = block.seen[row].end;
  const float nothing = -std::numeric_limits<float>::infinity();
  for (int64_t n = 0; n < kBlock; ++n) {
    const bool seen = n >= begin && n < end;
    scores[n] = seen ? scores[n] * block.scale : nothing;
  }
  Vector top = broadcast(block.top[row]);
  for (int64_t n = 0; n < kBlock; n += kLanes) {
    const Vector other = load(scores + n);
    top = top > other ? top : other;
  }
  const float largest = largest_lane(top);
  // against the first score that is seen, all earlier sums are 0
  const float base = largest == nothing ? 0.0f : largest;
  const float shrink = exp_of_negative(broadcast(block.top[row] - base))[0];
  Vector total = {};
  for (int64_t n = 0; n < kBlock; n += kLanes) {
    const Vector weight = exp_of_negative(load(scores + n) - base);
    store(weight, scores + n);
    total += weight;
  }
  block.top[row] = largest;
  block.total[row] = block.total[row] * shrink + sum_of_lanes(total);
  if (shrink == 1.0f) return;
  float* const sums = block.sums + row * block.stride;
  for (int64_t d = 0; d < block.width; d += kLanes) store(load(sums + d) * shrink, sums + d);
}

template <class Element>
INTERLACE_TARGET static void attend_as(const Block& block) {
  int64_t row = 0;
  for (; row + kRows <= block.num_rows; row += kRows) score_rows<kRows, Element>(block, row);
  if (kRows > 2 && row + 2 <= block.num_rows) {
    score_rows<2, Element>(block, row);
    row += 2;
  }
  if (row < block.num_rows) score_rows<1, Element>(block, row);
  for (row = 0; row < block.num_rows; ++row) weigh_row(block, row);
  for (row = 0; row + kRows <= block.num_rows; row += kRows) mix_rows<kRows, Element>(block, row);
  if (kRows > 2 && row + 2 <= block.num_rows) {
    mix_rows<2, Element>(block, row);
    row += 2;
  }
  if (row < block.num_rows) mix_rows<1, Element>(block, row);
}

// Adds a block of keys and values to the softmax and the output of all rows.
INTERLACE_TARGET static void attend(const Block& block, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return attend_as<float>(block);
    case DType::kBFloat16:
      return attend_as<BFloat16>(block);
    case DType::kFloat16:
      return attend_as<Float16>(block);
  }
}

// Widens a row of queries, and zeros up to a whole vector.
INTERLACE_TARGET static void widen(const void* from, DType dtype, int64_t count, float* to) {
  for (int64_t d = 0; d < count; d += kLanes) {
    switch (dtype) {
      case DType::kFloat32:
        store(load_up_to(static_cast<const float*>(from) + d, count - d), to + d);
        break;
      case DType::kBFloat16:
        store(load_up_to(static_cast<const BFloat16*>(from) + d, count - d), to + d);
        break;
      case DType::kFloat16:
        store(load_up_to(static_cast<const Float16*>(from) + d, count - d), to + d);
        break;
    }
  }
}
