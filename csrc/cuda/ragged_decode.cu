// out[b, n, h] = gate[h] * softmax(scale * <q[b, n, h], k[b, j]>) v[b, j], j the kv head of h
//
// A block of threads handles one kv head of one sequence and one split of its keys. Its threads
// form teams, as many threads as 16-byte packs cover a key. A team takes a key, each thread one
// pack of it, for all rows (token, query head) of the kv head; every team has a running softmax of
// its own, so nobody waits for anybody before the end. There the teams join, and a second kernel
// joins the splits.
//
// Source: online softmax, Milakov and Gimelshein, arXiv 1805.02867, algorithm 3; splits over the
// keys, Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/ragged_decode.h"

namespace interlace {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
// blocks that share a multiprocessor, so that some compute while others wait for memory
constexpr int kResident = 4;

// Keys that the new tokens of a sequence see together, and how they are split.
struct Keys {
  int begin, end, split_size;

  __device__ int num_splits() const { return (end - begin + split_size - 1) / split_size; }
};

__device__ inline Keys keys_of(const RaggedDecodeCudaArgs& args, int sequence, int step) {
  const int length = args.lengths[sequence];
  int begin = max(length - args.num_tokens - args.window + 1, 0);
  if (args.starts) begin = max(begin, args.starts[sequence]);
  const int end = max(min(length, args.capacity), begin);
  const int share = max((end - begin + args.num_splits - 1) / args.num_splits, 1);
  return {begin, end, (share + step - 1) / step * step};
}

// e^(score - base), where base is the largest score, or 0 before any score was seen.
__device__ inline float weight_of(float score, float largest) {
  return __expf(score - (largest == -INFINITY ? 0.0f : largest));
}

__device__ inline int64_t num_stats(const RaggedDecodeCudaArgs& args) {
  return static_cast<int64_t>(args.num_sequences) * args.num_tokens * args.num_heads *
         args.num_splits;
}

// Adds `sum` up over the threads of a team.
template <int kTeam>
__device__ inline float team_sum(float sum) {
#pragma unroll
  for (int offset = kTeam / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  return sum;
}

template <class Element, int kRows, int kTeam>
struct Shape {
  static constexpr int kPack = Pack<Element>::kSize;
  static constexpr int kTeams = kThreads / kTeam;
  // keys of a team whose packs are asked for at once
  static constexpr int kAhead = 4;
  static constexpr int kStep = kTeams * kAhead;
};

template <class Element, int kRows, int kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    attend_kernel(const __grid_constant__ RaggedDecodeCudaArgs args,
                  const __grid_constant__ DecodeHeads heads) {
  enter();
  using Sizes = Shape<Element, kRows, kTeam>;
  constexpr int kPack = Sizes::kPack, kAhead = Sizes::kAhead, kWidth = kTeam * kPack;
  __shared__ __align__(16) float queries[kRows][kWidth];
  __shared__ float warp_sums[kWarps][kRows][kWidth];
  __shared__ float warp_top[kWarps][kRows], warp_total[kWarps][kRows];

  const int split = blockIdx.x % args.num_splits;
  const int tile = blockIdx.x / args.num_splits;
  const int entry = tile % heads.count, sequence = tile / heads.count;
  const int kv_head = heads.kv_head[entry], group = heads.group[entry];
  const int first_head = heads.first_head[entry], num_rows = group * args.num_tokens;
  Keys keys = keys_of(args, sequence, Sizes::kStep);
  const int begin = keys.begin + split * keys.split_size;
  const int end = min(begin + keys.split_size, keys.end);
  // a lone split writes zeros where there are no keys
  if (begin >= end && args.num_splits > 1) return;

  for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads) {
    const int row = i / kWidth, d = i % kWidth;
    float value = 0.0f;
    if (row < num_rows && d < args.width) {
      const int64_t at = sequence * args.q_sequence_stride + row / group * args.q_token_stride +
                         (first_head + row % group) * args.q_head_stride + d;
      value = to_float(static_cast<const Element*>(args.q)[at]);
    }
    queries[row][d] = value;
  }
  int position[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // rows that there are not see nothing
    position[r] = r < num_rows ? args.lengths[sequence] - args.num_tokens + r / group : -1;
  }
  __syncthreads();

  const int team = threadIdx.x / kTeam, d = threadIdx.x % kTeam * kPack;
  const bool inside = d < args.width;
  const int32_t* const table =
      args.block_table ? args.block_table + sequence * args.table_stride : nullptr;
  const Element* const all_keys =
      static_cast<const Element*>(args.k) + kv_head * args.k_head_stride + d;
  const Element* const all_values =
      static_cast<const Element*>(args.v) + kv_head * args.v_head_stride + d;
  float top[kRows], total[kRows], sums[kRows][kPack];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
#pragma unroll
    for (int e = 0; e < kPack; ++e) sums[r][e] = 0.0f;
  }

  for (int first = begin; first < end; first += Sizes::kStep) {
    Pack<Element> key[kAhead], value[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int place = first + a * Sizes::kTeams + team;
      key[a] = value[a] = Pack<Element>{};
      if (place < end && inside) {
        int64_t outer = sequence, inner = place;
        if (table) {
          outer = table[place / args.block_size];
          inner = place % args.block_size;
        }
        key[a] = load_pack(all_keys + outer * args.k_outer_stride + inner * args.k_key_stride);
        value[a] = load_pack(all_values + outer * args.v_outer_stride + inner * args.v_key_stride);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float score[kAhead], query[kPack], largest = top[r];
#pragma unroll
      for (int e = 0; e < kPack; ++e) query[e] = queries[r][d + e];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        float product = 0.0f;
#pragma unroll
        for (int e = 0; e < kPack; ++e) product += query[e] * to_float(key[a].element[e]);
        product = team_sum<kTeam>(product) * args.scale;
        const int place = first + a * Sizes::kTeams + team;
        const bool seen = place < end && place <= position[r] && place > position[r] - args.window;
        score[a] = seen ? product : -INFINITY;
        largest = fmaxf(largest, score[a]);
      }
      const float shrink = weight_of(top[r], largest);
      top[r] = largest;
      total[r] *= shrink;
#pragma unroll
      for (int e = 0; e < kPack; ++e) sums[r][e] *= shrink;
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const float weight = weight_of(score[a], largest);
        total[r] += weight;
#pragma unroll
        for (int e = 0; e < kPack; ++e) sums[r][e] += weight * to_float(value[a].element[e]);
      }
    }
  }

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // the teams of a warp
#pragma unroll
    for (int offset = kTeam; offset < kWarp; offset *= 2) {
      const float other_top = __shfl_xor_sync(0xffffffffu, top[r], offset);
      const float largest = fmaxf(top[r], other_top);
      const float mine = weight_of(top[r], largest), other = weight_of(other_top, largest);
      total[r] = total[r] * mine + __shfl_xor_sync(0xffffffffu, total[r], offset) * other;
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        sums[r][e] = sums[r][e] * mine + __shfl_xor_sync(0xffffffffu, sums[r][e], offset) * other;
      }
      top[r] = largest;
    }
    if (lane < kTeam) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) warp_sums[warp][r][d + e] = sums[r][e];
    }
    if (lane == 0) {
      warp_top[warp][r] = top[r];
      warp_total[warp][r] = total[r];
    }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < num_rows * args.width; i += kThreads) {
    const int row = i / args.width, column = i % args.width;
    float largest = -INFINITY, all = 0.0f, sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, warp_top[w][row]);
    for (int w = 0; w < kWarps; ++w) {
      const float weight = weight_of(warp_top[w][row], largest);
      all += weight * warp_total[w][row];
      sum += weight * warp_sums[w][row][column];
    }
    const int head = first_head + row % group;
    const int64_t at =
        (static_cast<int64_t>(sequence) * args.num_tokens + row / group) * args.num_heads + head;
    if (args.num_splits == 1) {
      const float gate = args.gate ? args.gate[head] : 1.0f;
      static_cast<Element*>(args.out)[at * args.width + column] =
          from_float<Element>(sum / (all == 0.0f ? 1.0f : all) * gate);
      continue;
    }
    const int64_t part = at * args.num_splits + split;
    args.parts[part * args.width + column] = sum;
    if (column == 0) {
      float* const tops = args.parts + num_stats(args) * args.width;
      tops[part] = largest;
      tops[num_stats(args) + part] = all;
    }
  }
}

// One row of the output from its splits; those without keys wrote nothing.
template <class Element>
__global__ void __launch_bounds__(kThreads)
    join_kernel(const __grid_constant__ RaggedDecodeCudaArgs args, int step) {
  enter();
  static_assert(kThreads >= kMaxDecodeSplits, "a thread per split");
  __shared__ float weights[kMaxDecodeSplits], warp_top[kWarps], warp_total[kWarps];
  const int64_t row = blockIdx.x;
  const int sequence = static_cast<int>(row / (args.num_tokens * args.num_heads));
  const int head = static_cast<int>(row % args.num_heads);
  const int used = keys_of(args, sequence, step).num_splits();
  const float* const tops = args.parts + num_stats(args) * args.width + row * args.num_splits;
  const int s = threadIdx.x, warp = threadIdx.x / kWarp;

  const float top = s < used ? tops[s] : -INFINITY;
  warp_top[warp] = warp_max(top);
  __syncthreads();
  float largest = -INFINITY;
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, warp_top[w]);
  const float weight = weight_of(top, largest);
  weights[s] = weight;
  warp_total[warp] = warp_sum(s < used ? weight * tops[num_stats(args) + s] : 0.0f);
  __syncthreads();

  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += warp_total[w];
  const float gate = args.gate ? args.gate[head] : 1.0f;
  for (int d = threadIdx.x; d < args.width; d += kThreads) {
    const float* const part = args.parts + row * args.num_splits * args.width + d;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = 0; i < used; ++i) sum += weights[i] * part[i * args.width];
    static_cast<Element*>(args.out)[row * args.width + d] =
        from_float<Element>(sum / (total == 0.0f ? 1.0f : total) * gate);
  }
}

template <class Element, int kRows, int kTeam>
void launch(const RaggedDecodeCudaArgs& args, const DecodeHeads& heads) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const unsigned tiles = static_cast<unsigned>(args.num_sequences) * heads.count;
  launch_kernel(attend_kernel<Element, kRows, kTeam>, tiles * args.num_splits, kThreads, stream,
                args.overlap, args, heads);
  if (args.num_splits == 1) return;
  const unsigned num_rows =
      static_cast<unsigned>(args.num_sequences) * args.num_tokens * args.num_heads;
  constexpr int kStep = Shape<Element, kRows, kTeam>::kStep;
  launch_kernel(join_kernel<Element>, num_rows, kThreads, stream, args.overlap, args, kStep);
}

template <class Element, int kTeam>
void launch_rows(const RaggedDecodeCudaArgs& args, const DecodeHeads& heads) {
  const int widest = *std::max_element(heads.group, heads.group + heads.count);
  const int rows = widest * args.num_tokens;
  if (rows <= 1) return launch<Element, 1, kTeam>(args, heads);
  if (rows <= 2) return launch<Element, 2, kTeam>(args, heads);
  if (rows <= kMaxDecodeRows) return launch<Element, kMaxDecodeRows, kTeam>(args, heads);
  throw std::invalid_argument("ragged_decode: too many rows per kv head");
}

}  // namespace

void ragged_decode_cuda(const RaggedDecodeCudaArgs& args, const DecodeHeads& heads) {
  const DeviceGuard guard(args.device);
  dispatch(args.dtype, [&](auto* type) {
    using Element = std::remove_pointer_t<decltype(type)>;
    // a team covers 64 or 128 elements; fp32, which is rare, is compiled for the wider one alone
    constexpr int kPack = Pack<Element>::kSize;
    if constexpr (kPack > 4) {
      if (args.width <= 64) return launch_rows<Element, 64 / kPack>(args, heads);
    }
    return launch_rows<Element, 128 / kPack>(args, heads);
  });
}

}  // namespace interlace
