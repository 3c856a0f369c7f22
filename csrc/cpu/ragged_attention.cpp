// out[i, h] = gate[h] * softmax(scale * <q[i, h], k[j]>) v[j], lse[h, i] = log sum exp of the
// scores
//
// A task is one kv head of one sequence and a block of its rows (query token, query head). It walks
// over the keys that its rows see, in blocks: a block is widened to fp32 and packed once, and every
// tile of rows works on it with a running softmax. Rows lie across the lanes of vectors, so that
// the scores, their softmax and the weighted values need no sum over lanes, keys and values are
// read as they lie, and query heads that share a kv head fill vectors together, however many they
// are. What a task is follows from its own sequence alone, so no result depends on the number of
// threads or on the batch.
//
// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1; online softmax, Milakov and Gimelshein,
// arXiv 1805.02867, algorithm 3.
#include "cpu/ragged_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace interlace {
namespace {

constexpr int64_t kBlock = 64;
// a multiple of the rows of any tile
constexpr int64_t kMaxRows = 128;
constexpr int64_t kMaxTile = 32;
// less work than this is not worth a thread
constexpr int64_t kFlopsPerThread = 1 << 20;

struct Task {
  int64_t first_query, num_queries;  // the sequence's queries, among those of all sequences
  int64_t first_key, num_keys;       // and its keys
  int64_t kv_head;
  int64_t first_row, num_rows;  // row = query in the sequence * heads of the group + head
};

struct Span {
  int64_t begin, end;
};

// The query token and the query head of a row, the former counted in its sequence.
struct Row {
  int64_t query, head;
};

Row locate(const RaggedAttentionArgs& args, const Task& task, int64_t row) {
  const int64_t first_head = args.q_start[task.kv_head];
  const int64_t group = args.q_start[task.kv_head + 1] - first_head;
  return {(task.first_row + row) / group, first_head + (task.first_row + row) % group};
}

// The keys of its sequence that a row sees.
Span seen(const RaggedAttentionArgs& args, const Task& task, int64_t row) {
  const int64_t position = locate(args, task, row).query + task.num_keys - task.num_queries;
  const int64_t begin = std::clamp<int64_t>(position - args.before, 0, task.num_keys);
  const int64_t end = std::clamp<int64_t>(position + args.behind + 1, 0, task.num_keys);
  return {begin, std::max(begin, end)};
}

// One worker's memory. A tile is as many rows as the body works on together; rows of a tile lie
// side by side, and `stride` is the width rounded up to whole vectors.
struct Scratch {
  explicit Scratch(int64_t width)
      : stride((width + 15) / 16 * 16),
        queries(kMaxRows * stride),
        sums(kMaxRows * stride),
        keys(kBlock * stride),
        values(kBlock * stride),
        scores(kBlock * kMaxTile),
        top(kMaxRows),
        total(kMaxRows),
        begin(kMaxRows),
        count(kMaxRows) {}

  int64_t stride;
  std::vector<float> queries;          // per tile [D, rows]
  std::vector<float> sums;             // per tile [D, rows], weighted values
  std::vector<float> keys, values;     // [kBlock, stride]
  std::vector<float> scores;           // [kBlock, rows], of one tile
  std::vector<float> top, total;       // largest score so far, and sum of weights, of every row
  std::vector<uint32_t> begin, count;  // first key that a row sees, and how many
};

}  // namespace

#define INTERLACE_BODY "cpu/ragged_attention_body.h"
#include "cpu/isa.h"

namespace {

using Attend = void (*)(const RaggedAttentionArgs&, const Task&, Scratch&);

Attend choose_variant(int max_lanes) {
  switch (usable_lanes(max_lanes)) {
#if defined(__x86_64__)
    case avx512::kLanes:
      return avx512::attend;
    case avx2::kLanes:
      return avx2::attend;
#endif
    default:
      return plain::attend;
  }
}

}  // namespace

void ragged_attention(const RaggedAttentionArgs& args) {
  std::vector<Task> tasks;
  int64_t flops = 0;
  for (int64_t b = 0; b < args.num_sequences; ++b) {
    for (int64_t j = 0; j < args.num_kv_heads; ++j) {
      Task task{args.q_tokens[b],
                args.q_tokens[b + 1] - args.q_tokens[b],
                args.kv_tokens[b],
                args.kv_tokens[b + 1] - args.kv_tokens[b],
                j,
                0,
                0};
      const int64_t rows = task.num_queries * (args.q_start[j + 1] - args.q_start[j]);
      for (; task.first_row < rows; task.first_row += kMaxRows) {
        task.num_rows = std::min(kMaxRows, rows - task.first_row);
        tasks.push_back(task);
        const Span first = seen(args, task, 0), last = seen(args, task, task.num_rows - 1);
        flops += 4 * task.num_rows * (last.end - first.begin) * args.width;
      }
    }
  }

  const Attend attend = choose_variant(args.max_lanes);
  const int num_threads =
      static_cast<int>(std::min<int64_t>(args.num_threads, 1 + flops / kFlopsPerThread));
  std::vector<Scratch> scratch(num_threads, Scratch(args.width));
  const int64_t num_tasks = static_cast<int64_t>(tasks.size());
  parallel_for(num_tasks, 1, num_threads, [&](int worker, int64_t begin, int64_t end) {
    // later rows see more keys; the long tasks go first
    for (int64_t i = begin; i < end; ++i) attend(args, tasks[num_tasks - 1 - i], scratch[worker]);
  });
}

}  // namespace interlace
