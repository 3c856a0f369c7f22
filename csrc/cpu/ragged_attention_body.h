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

// Widens the keys or values begin..end - 1 of a sequence, and zeros up to whole vectors and steps.
template <class Element>
INTERLACE_TARGET static void pack(const Element* from, int64_t token_stride, int64_t num,
                                  int64_t width, int64_t stride, float* to) {
  for (int64_t n = 0; n < num; ++n, from += token_stride, to += stride) {
    for (int64_t d = 0; d < width; d += kLanes) {
      store(load_up_to(from + d, width - d), to + d);
    }
  }
  for (; num % kStep; ++num, to += stride) std::fill_n(to, stride, 0.0f);
}

// Puts the rows of a tile side by side; rows that there are not are zeros that see nothing.
template <class Element>
INTERLACE_TARGET static void begin_rows(const RaggedAttentionArgs& args, const Task& task,
                                        Scratch& scratch, int64_t num_rows) {
  std::fill_n(scratch.sums.begin(), num_rows * scratch.stride, 0.0f);
  std::fill_n(scratch.total.begin(), num_rows, 0.0f);
  std::fill_n(scratch.top.begin(), num_rows, -std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < num_rows; ++row) {
    float* const to = scratch.queries.data() + row / kTile * kTile * scratch.stride + row % kTile;
    if (row >= task.num_rows) {
      scratch.begin[row] = scratch.count[row] = 0;
      for (int64_t d = 0; d < args.width; ++d) to[d * kTile] = 0.0f;
      continue;
    }
    const Span span = seen(args, task, row);
    scratch.begin[row] = static_cast<uint32_t>(span.begin);
    scratch.count[row] = static_cast<uint32_t>(span.end - span.begin);
    const Row at = locate(args, task, row);
    const Element* const from = static_cast<const Element*>(args.q) +
                                (task.first_query + at.query) * args.q_token_stride +
                                at.head * args.q_head_stride;
    for (int64_t d = 0; d < args.width; ++d) to[d * kTile] = to_float(from[d]);
  }
}

// Writes the output of a task.
template <class Element>
INTERLACE_TARGET static void finish_rows(const RaggedAttentionArgs& args, const Task& task,
                                         Scratch& scratch) {
  const int64_t num_heads = args.q_start[args.num_kv_heads];
  for (int64_t row = 0; row < task.num_rows; ++row) {
    const Row at = locate(args, task, row);
    const int64_t token = task.first_query + at.query;
    const float gate = args.gate ? args.gate[at.head] : 1.0f;
    const float top = scratch.top[row], total = scratch.total[row];
    args.lse[at.head * args.num_queries + token] = top + std::log(total);
    // a row that sees no key; written so that NaN stays NaN
    const float divisor = total == 0.0f ? 1.0f : total;
    const float* const from =
        scratch.sums.data() + row / kTile * kTile * scratch.stride + row % kTile;
    Element* const to =
        static_cast<Element*>(args.out) + (token * num_heads + at.head) * args.width;
    for (int64_t d = 0; d < args.width; ++d) {
      from_float(from[d * kTile] / divisor * gate, to[d]);
    }
  }
}

template <class Element>
INTERLACE_TARGET static void attend_as(const RaggedAttentionArgs& args, const Task& task,
                                       Scratch& scratch) {
  const int64_t num_rows = (task.num_rows + kTile - 1) / kTile * kTile;
  begin_rows<Element>(args, task, scratch, num_rows);
  const int64_t stride = scratch.stride;
  const Element* const keys = static_cast<const Element*>(args.k) +
                              task.first_key * args.k_token_stride +
                              task.kv_head * args.k_head_stride;
  const Element* const values = static_cast<const Element*>(args.v) +
                                task.first_key * args.v_token_stride +
                                task.kv_head * args.v_head_stride;
  const Span all = {seen(args, task, 0).begin, seen(args, task, task.num_rows - 1).end};
  for (int64_t key = all.begin; key < all.end; key += kBlock) {
    const int64_t num = std::min(kBlock, all.end - key);
    pack(keys + key * args.k_token_stride, args.k_token_stride, num, args.width, stride,
         scratch.keys.data());
    pack(values + key * args.v_token_stride, args.v_token_stride, num, args.width, stride,
         scratch.values.data());
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
