// The inner part of ragged_attention: all keys for a block of rows, for one instruction set.
//
// Included once per instruction set, see cpu/isa.h. Scores are computed for kTile rows times kStep
// keys in registers, weighted values for kTile rows times kStep elements of them.

constexpr int kTile = 2 * kLanes;
constexpr int kStep = kLanes == 16 ? 8 : 4;

// A tile of rows and a packed block of keys and values.
struct Tile {
  int64_t width, stride;
  float scale;
  const float* queries;  // [width, kTile]
  const float* keys;     // [kBlock, stride]
  const float* values;   // [kBlock, stride]
  float* sums;           // [stride, kTile]
  float* scores;         // [kBlock, kTile]
  float* top;            // [kTile]
  float* total;          // [kTile]
  const uint32_t* begin;
  const uint32_t* count;
};

// Scores of kStep keys, the first of them number `n` of the block and `key` of the sequence. Raises
// `top` to the largest. Masked: a key that a row does not see gets the score -infinity.
template <bool Masked>
INTERLACE_TARGET static inline void score(const Tile& tile, int64_t n, int64_t key,
                                          Vector (&top)[2]) {
  Vector sum[kStep][2] = {};
  const float* queries = tile.queries;
  const float* keys = tile.keys + n * tile.stride;
  for (int64_t d = 0; d < tile.width; ++d, ++keys, queries += kTile) {
    const Vector low = load(queries), high = load(queries + kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kStep; ++c) {
      sum[c][0] += low * keys[c * tile.stride];
      sum[c][1] += high * keys[c * tile.stride];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kStep; ++c) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Vector scaled = sum[c][half] * tile.scale;
      if constexpr (Masked) {
        VectorBits begin, count;
        std::memcpy(&begin, tile.begin + half * kLanes, sizeof begin);
        std::memcpy(&count, tile.count + half * kLanes, sizeof count);
        // keys before `begin` wrap around
        const VectorBits sees = (VectorBits)(static_cast<uint32_t>(key + c) - begin < count);
        const VectorBits nothing = (VectorBits)(Vector{} - std::numeric_limits<float>::infinity());
        scaled = (Vector)(((VectorBits)scaled & sees) | (nothing & ~sees));
      }
      top[half] = top[half] > scaled ? top[half] : scaled;
      store(scaled, tile.scores + (n + c) * kTile + half * kLanes);
    }
  }
}

// Adds to the sums of kStep elements the values of keys begin..end - 1, weighted.
INTERLACE_TARGET static inline void mix(const Tile& tile, int64_t d, int64_t begin, int64_t end,
                                        const Vector (&shrink)[2]) {
  // a sum of its own for every block keeps rounding errors small over many keys
  Vector sum[kStep][2] = {};
  const float* weights = tile.scores + begin * kTile;
  const float* values = tile.values + begin * tile.stride + d;
  for (int64_t n = begin; n < end; ++n, weights += kTile, values += tile.stride) {
    const Vector low = load(weights), high = load(weights + kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kStep; ++c) {
      sum[c][0] += low * values[c];
      sum[c][1] += high * values[c];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kStep; ++c) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* const to = tile.sums + (d + c) * kTile + half * kLanes;
      store(load(to) * shrink[half] + sum[c][half], to);
    }
  }
}

// Adds the keys begin..end - 1 of a block, the first of them number `key` of the sequence, to the
// softmax and the sums of a tile.
template <bool Masked>
INTERLACE_TARGET static void add_keys(const Tile& tile, int64_t begin, int64_t end, int64_t key) {
  const Vector before[2] = {load(tile.top), load(tile.top + kLanes)};
  Vector top[2] = {before[0], before[1]};
  for (int64_t n = begin; n < end; n += kStep) score<Masked>(tile, n, key + n - begin, top);
  Vector base[2], shrink[2], total[2] = {};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    store(top[half], tile.top + half * kLanes);
    // a row that has not seen any key yet has sums of 0
    const VectorBits nothing = (VectorBits)(top[half] == -std::numeric_limits<float>::infinity());
    base[half] = (Vector)((VectorBits)top[half] & ~nothing);
    shrink[half] = exp_of_negative(before[half] - base[half]);
  }
  for (int64_t n = begin; n < end; ++n) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* const at = tile.scores + n * kTile + half * kLanes;
      const Vector weight = exp_of_negative(load(at) - base[half]);
      store(weight, at);
      total[half] += weight;
    }
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    float* const to = tile.total + half * kLanes;
    store(load(to) * shrink[half] + total[half], to);
  }
  for (int64_t d = 0; d < tile.width; d += kStep) mix(tile, d, begin, end, shrink);
}

// Where the vector at element `d` of a row begins: the last one ends with the row, and so repeats
// some elements of the one before it.
INTERLACE_TARGET static inline int64_t vector_start(int64_t d, int64_t width) {
  return std::max<int64_t>(0, std::min<int64_t>(d, width - kLanes));
}

// Widens `num` keys or values, and adds keys of zeros up to a whole step. Behind their elements the
// packed rows stay as they were made, zero.
template <class Element>
INTERLACE_TARGET static void pack(const Element* from, int64_t token_stride, int64_t num,
                                  int64_t width, int64_t stride, float* to) {
  for (int64_t n = 0; n < num; ++n, from += token_stride, to += stride) {
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t at = vector_start(d, width);
      store(load_up_to(from + at, width), to + at);
    }
  }
  for (; num % kStep; ++num, to += stride) std::fill_n(to, stride, 0.0f);
}

// Swaps the upper half of every 2 * Half lanes of `a` with the lower half of those of `b`.
template <int Half, int... Lane>
INTERLACE_TARGET static inline void swap_lanes(Vector& a, Vector& b,
                                               std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  const Vector lower =
      __builtin_shufflevector(a, b, (Lane & Half ? kLanes + Lane - Half : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Half ? kLanes + Lane : Lane + Half)...);
#else
  const Vector lower =
      __builtin_shuffle(a, b, VectorBits{(Lane & Half ? kLanes + Lane - Half : Lane)...});
  b = __builtin_shuffle(a, b, VectorBits{(Lane & Half ? kLanes + Lane : Lane + Half)...});
#endif
  a = lower;
}

// Transposes the square of kLanes vectors.
template <int Half = kLanes / 2>
INTERLACE_TARGET static inline void transpose(Vector (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Half) continue;
    swap_lanes<Half>(square[i], square[i + Half], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (Half > 1) transpose<Half / 2>(square);
}

// The place of row `row` of a task in the queries or the sums.
INTERLACE_TARGET static inline float* place(std::vector<float>& rows, int64_t stride, int64_t row) {
  return rows.data() + row / kTile * kTile * stride + row % kTile;
}

// Puts queries side by side, and makes the rows see nothing yet. Rows that there are not, up to a
// whole tile, are zeros and stay so.
template <class Element>
INTERLACE_TARGET static void begin_rows(const RaggedAttentionArgs& args, const Task& task,
                                        Scratch& scratch, int64_t num_rows) {
  std::fill_n(scratch.sums.begin(), num_rows * scratch.stride, 0.0f);
  std::fill_n(scratch.total.begin(), num_rows, 0.0f);
  std::fill_n(scratch.top.begin(), num_rows, -std::numeric_limits<float>::infinity());
  for (int64_t first = 0; first < num_rows; first += kLanes) {
    const Element* from[kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = first + i;
      scratch.begin[row] = scratch.count[row] = 0;
      if (row >= task.num_rows) continue;
      const Span span = seen(args, task, row);
      scratch.begin[row] = static_cast<uint32_t>(span.begin);
      scratch.count[row] = static_cast<uint32_t>(span.end - span.begin);
      const Row at = locate(args, task, row);
      from[i] = static_cast<const Element*>(args.q) +
                (task.first_query + at.query) * args.q_token_stride + at.head * args.q_head_stride;
    }
    float* const to = place(scratch.queries, scratch.stride, first);
    for (int64_t d = 0; d < args.width; d += kLanes) {
      const int64_t at = vector_start(d, args.width);
      Vector square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = from[i] ? load_up_to(from[i] + at, args.width) : Vector{};
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(square[i], to + (at + i) * kTile);
    }
  }
}

// Writes the output of a task.
template <class Element>
INTERLACE_TARGET static void finish_rows(const RaggedAttentionArgs& args, const Task& task,
                                         Scratch& scratch) {
  const int64_t num_heads = args.q_start[args.num_kv_heads];
  for (int64_t first = 0; first < task.num_rows; first += kLanes) {
    Element* to[kLanes] = {};
    Vector factor = {};
    for (int64_t i = 0; i < kLanes && first + i < task.num_rows; ++i) {
      const Row at = locate(args, task, first + i);
      const int64_t token = task.first_query + at.query;
      const float top = scratch.top[first + i], total = scratch.total[first + i];
      args.lse[at.head * args.num_queries + token] = top + std::log(total);
      // a row that sees no key; written so that NaN stays NaN
      factor[i] = (args.gate ? args.gate[at.head] : 1.0f) / (total == 0.0f ? 1.0f : total);
      to[i] = static_cast<Element*>(args.out) + (token * num_heads + at.head) * args.width;
    }
    const float* const from = place(scratch.sums, scratch.stride, first);
    for (int64_t d = 0; d < args.width; d += kLanes) {
      const int64_t at = vector_start(d, args.width);
      Vector square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(from + (at + i) * kTile) * factor;
      transpose(square);
      for (int i = 0; i < kLanes && to[i]; ++i) {
        if (args.width >= kLanes) {
          store(square[i], to[i] + at);
        } else {
          store_some(square[i], to[i], args.width);
        }
      }
    }
  }
}

template <class Element>
INTERLACE_TARGET static void attend_as(const RaggedAttentionArgs& args, const Task& task,
                                       Scratch& scratch) {
  const int64_t num_rows = (task.num_rows + kTile - 1) / kTile * kTile;
  begin_rows<Element>(args, task, scratch, num_rows);
  const int64_t stride = scratch.stride;
  const Span all = {seen(args, task, 0).begin, seen(args, task, task.num_rows - 1).end};
  for (int64_t key = all.begin; key < all.end; key += kBlock) {
    const int64_t num = std::min(kBlock, all.end - key), token = task.first_key + key;
    pack(static_cast<const Element*>(args.k) + token * args.k_token_stride +
             task.kv_head * args.k_head_stride,
         args.k_token_stride, num, args.width, stride, scratch.keys.data());
    pack(static_cast<const Element*>(args.v) + token * args.v_token_stride +
             task.kv_head * args.v_head_stride,
         args.v_token_stride, num, args.width, stride, scratch.values.data());
    for (int64_t row = 0; row < num_rows; row += kTile) {
      // the spans of rows move on with their number
      const int64_t last_row = std::min(row + kTile, task.num_rows) - 1;
      const Span first = seen(args, task, row), last = seen(args, task, last_row);
      const int64_t begin = std::max<int64_t>(0, first.begin - key) / kStep * kStep;
      const int64_t end = std::min(num, last.end - key);
      if (begin >= end) continue;
      const Tile tile{args.width,
                      stride,
                      args.scale,
                      scratch.queries.data() + row * stride,
                      scratch.keys.data(),
                      scratch.values.data(),
                      scratch.sums.data() + row * stride,
                      scratch.scores.data(),
                      scratch.top.data() + row,
                      scratch.total.data() + row,
                      scratch.begin.data() + row,
                      scratch.count.data() + row};
      const bool all_seen = key + begin >= last.begin && key + end <= first.end &&
                            (end - begin) % kStep == 0 && row + kTile <= task.num_rows;
      (all_seen ? add_keys<false> : add_keys<true>)(tile, begin, end, key + begin);
    }
  }
  finish_rows<Element>(args, task, scratch);
}

INTERLACE_TARGET static void attend(const RaggedAttentionArgs& args, const Task& task,
                                    Scratch& scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return attend_as<float>(args, task, scratch);
    case DType::kBFloat16:
      return attend_as<BFloat16>(args, task, scratch);
    case DType::kFloat16:
      return attend_as<Float16>(args, task, scratch);
  }
}
