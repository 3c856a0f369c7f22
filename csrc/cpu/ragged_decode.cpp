// out[b, n, h] = gate[h] * softmax(scale * <q[b, n, h], k[b, j]>) v[b, j], j the kv head of h
//
// A task is one kv head of one sequence, a block of its rows (token, query head) and a piece of its
// keys. It walks over its keys once, in blocks that fit the first-level cache, with a running
// softmax. Pieces are joined by their largest scores afterwards. What a piece is follows from the
// keys of its own sequence alone, so no result depends on the number of threads or on the batch.
//
// Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867, algorithm 3; pieces over the
// keys as in Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
#include "cpu/ragged_decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace interlace {
namespace {

constexpr int64_t kBlock = 32;
constexpr int64_t kMaxRows = 64;
constexpr int64_t kMinPiece = 512, kMaxPieces = 16;
// less work than this is not worth a thread
constexpr int64_t kFlopsPerThread = 1 << 20;

struct Span {
  int64_t begin, end;
};

// Keys and values, at most kBlock, and the state of the rows that they are added to.
struct Block {
  const void* keys[kBlock];
  const void* values[kBlock];
  int64_t num_keys, num_rows, width;
  int64_t stride;  // of a row of queries or sums, a multiple of 16
  float scale;
  const float* queries;  // [rows, stride], zeros behind `width`
  float* sums;           // [rows, stride], weighted values
  float* scores;         // [rows, kBlock]
  float* top;            // [rows], largest score so far
  float* total;          // [rows], sum of weights
  Span* seen;            // [rows], the keys of this block that a row sees
};

}  // namespace

#define INTERLACE_BODY "cpu/ragged_decode_body.h"
#include "cpu/isa.h"

namespace {

struct Variant {
  void (*attend)(const Block&, DType);
  void (*widen)(const void*, DType, int64_t, float*);
};

Variant choose_variant(int max_lanes) {
  switch (usable_lanes(max_lanes)) {
#if defined(__x86_64__)
    case avx512::kLanes:
      return {avx512::attend, avx512::widen};
    case avx2::kLanes:
      return {avx2::attend, avx2::widen};
#endif
    default:
      return {plain::attend, plain::widen};
  }
}

struct Task {
  int64_t sequence, kv_head, first_row, num_rows;
  Span keys;
  int64_t part_row;  // where its rows go among those of all pieces; -1: straight to the output
};

// What pieces leave behind, per row: sums [stride], largest score, sum of weights.
struct Parts {
  int64_t stride;
  std::vector<float> data;

  int64_t row_size() const { return stride + 2; }
  float* row(int64_t i) { return data.data() + i * row_size(); }
};

int64_t first_key(const RaggedDecodeArgs& args, int64_t sequence, int64_t token) {
  const int64_t position = args.lengths[sequence] - args.num_tokens + token;
  const int64_t start = args.starts ? args.starts[sequence] : 0;
  return std::max(start, position - args.window + 1);
}

int64_t end_key(const RaggedDecodeArgs& args, int64_t sequence, int64_t token) {
  return args.lengths[sequence] - args.num_tokens + token + 1;
}

int64_t group_size(const RaggedDecodeArgs& args, int64_t kv_head) {
  return args.q_start[kv_head + 1] - args.q_start[kv_head];
}

void finish_row(const RaggedDecodeArgs& args, const Task& task, int64_t row, const float* sums,
                float total) {
  const int64_t group = group_size(args, task.kv_head);
  const int64_t token = (task.first_row + row) / group;
  const int64_t head = args.q_start[task.kv_head] + (task.first_row + row) % group;
  const int64_t at =
      ((task.sequence * args.num_tokens + token) * args.num_heads + head) * args.width;
  const float gate = args.gate ? args.gate[head] : 1.0f;
  // a row that sees no key; written so that NaN stays NaN
  const float divisor = total == 0.0f ? 1.0f : total;
  for (int64_t d = 0; d < args.width; ++d) {
    const float value = sums[d] / divisor * gate;
    switch (args.dtype) {
      case DType::kFloat32:
        static_cast<float*>(args.out)[at + d] = value;
        break;
      case DType::kBFloat16:
        from_float(value, static_cast<BFloat16*>(args.out)[at + d]);
        break;
      case DType::kFloat16:
        from_float(value, static_cast<Float16*>(args.out)[at + d]);
        break;
    }
  }
}

// One worker's memory.
class Worker {
 public:
  explicit Worker(int64_t stride)
      : queries_(kMaxRows * stride),
        sums_(kMaxRows * stride),
        scores_(kMaxRows * kBlock),
        top_(kMaxRows),
        total_(kMaxRows),
        seen_(kMaxRows) {
    block_.stride = stride;
    block_.queries = queries_.data();
    block_.sums = sums_.data();
    block_.scores = scores_.data();
    block_.top = top_.data();
    block_.total = total_.data();
    block_.seen = seen_.data();
  }

  void run(const RaggedDecodeArgs& args, const Variant& variant, const Task& task, Parts& parts) {
    begin(args, variant, task);
    const int64_t group = group_size(args, task.kv_head);
    for (int64_t key = task.keys.begin; key < task.keys.end; key += kBlock) {
      block_.num_keys = std::min(kBlock, task.keys.end - key);
      locate(args, task, key);
      for (int64_t row = 0; row < task.num_rows; ++row) {
        const int64_t token = (task.first_row + row) / group;
        seen_[row] = {first_key(args, task.sequence, token) - key,
                      std::min(end_key(args, task.sequence, token) - key, block_.num_keys)};
      }
      variant.attend(block_, args.dtype);
    }
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const float* const sums = sums_.data() + row * block_.stride;
      if (task.part_row < 0) {
        finish_row(args, task, row, sums, total_[row]);
        continue;
      }
      float* const to = parts.row(task.part_row + row);
      std::copy_n(sums, block_.stride, to);
      to[block_.stride] = top_[row];
      to[block_.stride + 1] = total_[row];
    }
  }

 private:
  void begin(const RaggedDecodeArgs& args, const Variant& variant, const Task& task) {
    block_.num_rows = task.num_rows;
    block_.width = args.width;
    block_.scale = args.scale;
    std::fill_n(sums_.begin(), task.num_rows * block_.stride, 0.0f);
    std::fill_n(total_.begin(), task.num_rows, 0.0f);
    std::fill_n(top_.begin(), task.num_rows, -std::numeric_limits<float>::infinity());
    const int64_t group = group_size(args, task.kv_head);
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const int64_t token = (task.first_row + row) / group;
      const int64_t head = args.q_start[task.kv_head] + (task.first_row + row) % group;
      const int64_t at = task.sequence * args.q_sequence_stride + token * args.q_token_stride +
                         head * args.q_head_stride;
      variant.widen(static_cast<const char*>(args.q) + at * size_of(args.dtype), args.dtype,
                    args.width, queries_.data() + row * block_.stride);
    }
  }

  void locate(const RaggedDecodeArgs& args, const Task& task, int64_t first) {
    const int64_t size = size_of(args.dtype);
    for (int64_t n = 0; n < block_.num_keys; ++n) {
      int64_t outer = task.sequence, inner = first + n;
      if (args.block_table) {
        outer = args.block_table[task.sequence * args.table_stride + inner / args.block_size];
        inner %= args.block_size;
      }
      block_.keys[n] = static_cast<const char*>(args.k) +
                       size * (outer * args.k_outer_stride + task.kv_head * args.k_head_stride +
                               inner * args.k_key_stride);
      block_.values[n] = static_cast<const char*>(args.v) +
                         size * (outer * args.v_outer_stride + task.kv_head * args.v_head_stride +
                                 inner * args.v_key_stride);
    }
  }

  std::vector<float> queries_, sums_, scores_, top_, total_;
  std::vector<Span> seen_;
  Block block_;
};

// Adds the pieces that the keys of one block of rows are cut into.
void add_tasks(const Task& whole, std::vector<Task>& tasks, int64_t& num_part_rows) {
  const int64_t num_keys = whole.keys.end - whole.keys.begin;
  const int64_t pieces = std::clamp<int64_t>(num_keys / kMinPiece, 1, kMaxPieces);
  const int64_t size = ((num_keys + pieces - 1) / pieces + kBlock - 1) / kBlock * kBlock;
  if (num_keys <= size) {
    tasks.push_back(whole);
    return;
  }
  for (int64_t key = whole.keys.begin; key < whole.keys.end; key += size) {
    tasks.push_back(whole);
    tasks.back().keys = {key, std::min(whole.keys.end, key + size)};
    tasks.back().part_row = num_part_rows;
    num_part_rows += whole.num_rows;
  }
}

// Writes the output of a block of rows from its pieces.
void join(const RaggedDecodeArgs& args, const Task* pieces, int64_t num_pieces, Parts& parts) {
  const float nothing = -std::numeric_limits<float>::infinity();
  std::vector<float> sums(parts.stride);
  for (int64_t row = 0; row < pieces->num_rows; ++row) {
    float top = nothing, total = 0.0f;
    for (int64_t i = 0; i < num_pieces; ++i) {
      top = std::max(top, parts.row(pieces[i].part_row + row)[parts.stride]);
    }
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t i = 0; i < num_pieces; ++i) {
      const float* const part = parts.row(pieces[i].part_row + row);
      const float weight = std::exp(part[parts.stride] - (top == nothing ? 0.0f : top));
      total += part[parts.stride + 1] * weight;
      for (int64_t d = 0; d < args.width; ++d) sums[d] += part[d] * weight;
    }
    finish_row(args, *pieces, row, sums.data(), total);
  }
}

}  // namespace

void ragged_decode(const RaggedDecodeArgs& args) {
  std::vector<Task> tasks;
  // numbers of the tasks that are the pieces of one block of rows
  std::vector<Span> joins;
  int64_t num_part_rows = 0, flops = 0;
  for (int64_t b = 0; b < args.num_sequences; ++b) {
    for (int64_t j = 0; j < args.num_kv_heads; ++j) {
      const int64_t group = group_size(args, j), rows = group * args.num_tokens;
      for (int64_t row = 0; row < rows; row += kMaxRows) {
        const int64_t num_rows = std::min(kMaxRows, rows - row);
        // windows of neighbouring tokens overlap, so the rows see one stretch of keys
        const int64_t begin = std::max<int64_t>(0, first_key(args, b, row / group));
        const int64_t end = std::max(begin, end_key(args, b, (row + num_rows - 1) / group));
        const int64_t first = static_cast<int64_t>(tasks.size());
        add_tasks({b, j, row, num_rows, {begin, end}, -1}, tasks, num_part_rows);
        const int64_t behind = static_cast<int64_t>(tasks.size());
        if (behind > first + 1) joins.push_back({first, behind});
        flops += 4 * num_rows * (end - begin) * args.width;
      }
    }
  }

  const Variant variant = choose_variant(args.max_lanes);
  const int64_t stride = std::max<int64_t>(16, (args.width + 15) / 16 * 16);
  Parts parts{stride, {}};
  parts.data.resize(num_part_rows * parts.row_size());
  const int num_threads =
      static_cast<int>(std::min<int64_t>(args.num_threads, 1 + flops / kFlopsPerThread));
  std::vector<std::unique_ptr<Worker>> workers;
  for (int i = 0; i < num_threads; ++i) workers.push_back(std::make_unique<Worker>(stride));
  parallel_for(static_cast<int64_t>(tasks.size()), 1, num_threads,
               [&](int worker, int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   workers[worker]->run(args, variant, tasks[i], parts);
                 }
               });
  for (const Span& one : joins) join(args, &tasks[one.begin], one.end - one.begin, parts);
}

}  // namespace interlace
