// sums[g, i, j] = sum over tokens t of group g of <h_i[t], h_j[t]> / (|h_i[t]| |h_j[t]|)
//
// Every element of up to 64 states is read once, straight into the layout that the matrix units
// want: in mma.m16n8k16 a lane holds the same elements of a row whether the row belongs to the left
// or to the right factor, and in which order the columns come does not matter as long as both
// factors agree. So a lane copies 16 bytes of a row into a queue of its own in shared memory and
// takes them out again; no lane ever waits for another. The diagonal of the product has the norms.
//
// A block takes a slice of the tokens, sorted by group, token after token; its warps share the
// columns. Cosines are added up in fp64, and where the group changes the sums go to a record. From
// slice to slice the groups only grow, so slice + group is a free place for a record. What a group
// has in several slices is added up in order at the end.
//
// More than 64 states are cut into panels of 32, and a pass takes the states of two panels. Passes
// are numbered by how far their panels lie apart, then by the lower one, so that those that a band
// needs come first.
#include <algorithm>
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/layer_similarity.h"
#include "cuda/ptx.cuh"

namespace interlace {
namespace {

constexpr float kEps = 1e-8f;
constexpr int kPanel = 32;
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
// resident on a multiprocessor, by groups of eight states of a pass
constexpr int blocks_for(int groups) { return groups > 5 ? 2 : 3; }
// of the small kernels: threads, and tokens or outputs of a block
constexpr int kOrderThreads = 1024, kOrderEach = 4, kOrderTokens = kOrderThreads * kOrderEach;
constexpr int kMergeOutputs = 32, kMergeSlices = 16;

// How the states are cut up. The same on the host and on the device.
struct Plan {
  int num_states, num_panels, num_passes, num_pairs, num_slices;
};

int64_t pairs_of(int64_t rows) { return rows * (rows + 1) / 2; }

Plan make_plan(const LayerSimilarityCudaArgs& args) {
  Plan plan;
  plan.num_states = static_cast<int>(args.num_states);
  plan.num_panels = std::max(2, (plan.num_states + kPanel - 1) / kPanel);
  plan.num_passes = plan.num_panels - 1;
  // panels that lie further apart are needed if their closest states are
  for (int apart = 2; apart < plan.num_panels && (apart - 1) * kPanel < args.max_offset; ++apart) {
    plan.num_passes += plan.num_panels - apart;
  }
  plan.num_pairs = static_cast<int>(pairs_of(std::min(plan.num_states, 2 * kPanel)));
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, args.device),
        "cudaDeviceGetAttribute");
  const int64_t resident = multiprocessors * blocks_for((plan.num_states + 7) / 8);
  plan.num_slices =
      static_cast<int>(std::max<int64_t>(1, std::min(resident / plan.num_passes, args.num_tokens)));
  return plan;
}

// Parts of the scratch memory.
struct Scratch {
  double* records;  // [slices + groups, passes, pairs]
  int* order;       // [T]
  int* starts;      // [G + 1]
  int64_t bytes;
};

Scratch lay_out(const LayerSimilarityCudaArgs& args, const Plan& plan) {
  const int64_t records =
      (plan.num_slices + args.num_groups) * plan.num_passes * int64_t{plan.num_pairs};
  Scratch scratch;
  scratch.records = static_cast<double*>(args.scratch);
  scratch.order = reinterpret_cast<int*>(scratch.records + records);
  scratch.starts = scratch.order + args.num_tokens;
  scratch.bytes = records * sizeof(double) + (args.num_tokens + args.num_groups + 1) * sizeof(int);
  return scratch;
}

struct Tokens {
  const int* groups;
  int* order;
  int* starts;
  int64_t* counts;
  int num_tokens, num_groups;
};

// Sum over a block of kOrderThreads, for every thread; `before` gets that of the threads before.
__device__ int block_sum(int value, int& before) {
  __shared__ int sums[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int running = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, running, step);
    if (lane >= step) running += other;
  }
  __syncthreads();
  if (lane == kWarp - 1) sums[warp] = running;
  __syncthreads();
  before = running - value;
  int total = 0;
  for (int i = 0; i < kOrderThreads / kWarp; ++i) {
    if (i < warp) before += sums[i];
    total += sums[i];
  }
  return total;
}

// Token numbers sorted by group, where each group starts, and tokens per group. A block is for one
// group and some tokens; it finds the place of these by counting those that come before.
__global__ void __launch_bounds__(kOrderThreads) order_kernel(Tokens tokens) {
  const int group = blockIdx.x % tokens.num_groups;
  const int64_t own = int64_t{blockIdx.x / tokens.num_groups} * kOrderTokens;
  int lower = 0, earlier = 0;
  for (int64_t t = threadIdx.x; t < tokens.num_tokens; t += kOrderThreads) {
    const int mark = tokens.groups[t];
    lower += mark >= 0 && mark < group;
    earlier += mark == group && t < own;
  }
  const int64_t first = own + threadIdx.x * kOrderEach;
  bool mine[kOrderEach];
  int count = 0;
  for (int i = 0; i < kOrderEach; ++i) {
    mine[i] = first + i < tokens.num_tokens && tokens.groups[first + i] == group;
    count += mine[i];
  }
  int before;
  lower = block_sum(lower, before);
  earlier = block_sum(earlier, before);
  const int total = block_sum(count, before);
  int place = lower + earlier + before;
  for (int i = 0; i < kOrderEach; ++i) {
    if (mine[i]) tokens.order[place++] = static_cast<int>(first + i);
  }
  if (threadIdx.x != 0) return;
  if (own == 0) tokens.starts[group] = lower;
  if (own + kOrderTokens >= tokens.num_tokens) {
    tokens.counts[group] = earlier + total;
    if (group == tokens.num_groups - 1) tokens.starts[group + 1] = lower + earlier + total;
  }
}

// Tokens of a slice: sorted positions first..last-1.
struct Slice {
  int first, last;
};

__device__ int share_of(int num_tokens, int num_slices) {
  return max(1, (num_tokens + num_slices - 1) / num_slices);
}

struct Rows {
  const char* base[kMostStates];
  int64_t stride[kMostStates];  // in bytes
};

struct CosineArgs {
  Rows rows;
  Plan plan;
  const int* groups;
  const int* order;
  const int* starts;
  double* records;
  int64_t width;
  int num_groups;
  bool aligned;  // whether every row starts at a multiple of 16 bytes
};

// How many factors an element is split into, and their type.
template <class Element>
struct Factors {
  using Type = Element;
  static constexpr int kPlanes = 1;
};
// fp32 is the sum of three bf16. Six of the nine products matter: the others stay below its last
// place.
template <>
struct Factors<float> {
  using Type = __nv_bfloat16;
  static constexpr int kPlanes = 3;
};

// What a lane holds of eight rows: 32 columns of 16-bit elements or 16 of fp32, spread over four
// lanes. Two words per plane make half of a fragment of mma.m16n8k16.
template <class Element>
struct Fragment {
  static constexpr int kSteps = 2;
  uint4 words;

  __device__ void fill(const uint4& raw) { words = raw; }
  __device__ uint32_t low(int step, int) const { return step == 0 ? words.x : words.z; }
  __device__ uint32_t high(int step, int) const { return step == 0 ? words.y : words.w; }
};

template <>
struct Fragment<float> {
  static constexpr int kSteps = 1;
  uint32_t words[3][2];

  __device__ void fill(const uint4& raw) {
    float rest[4] = {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z),
                     __uint_as_float(raw.w)};
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const __nv_bfloat16 one = __float2bfloat16_rn(rest[2 * pair]);
        const __nv_bfloat16 two = __float2bfloat16_rn(rest[2 * pair + 1]);
        rest[2 * pair] -= __bfloat162float(one);
        rest[2 * pair + 1] -= __bfloat162float(two);
        words[plane][pair] = __bfloat16_as_ushort(one) | uint32_t{__bfloat16_as_ushort(two)} << 16;
      }
    }
  }
  __device__ uint32_t low(int, int plane) const { return words[plane][0]; }
  __device__ uint32_t high(int, int plane) const { return words[plane][1]; }
};

// A pass of kGroups groups of eight rows.
template <class Element, int kGroups>
struct Shape {
  static constexpr int kPack = Pack<Element>::kSize;
  // columns that a block takes at a time
  static constexpr int kColumns = kWarps * 4 * kPack;
  static constexpr int kHeights = (kGroups + 1) / 2;
  // tiles of 16 rows by 8 that touch the lower triangle
  static constexpr int kTiles = kHeights * (kHeights + 1) - kGroups % 2;
  static constexpr int kTilesEach = (kTiles + kWarps - 1) / kWarps;
  static constexpr int kStages = kGroups > 5 ? 3 : 4;
  static constexpr int kQueueBytes = kStages * kGroups * kThreads * 16;
  static constexpr int kSharedBytes = kQueueBytes + kWarps * kTiles * kWarp * 16;
};

// The queue of one thread: it brings in the rows of its lane, token after token.
template <class Element, int kGroups>
class Stream {
  using S = Shape<Element, kGroups>;

 public:
  __device__ Stream(const CosineArgs& args, uint4* queue, int low, int high, Slice slice)
      : args_(args),
        queue_(queue),
        low_(low),
        high_(high),
        position_(slice.first),
        last_(args.width > 0 ? slice.last : slice.first) {
    if (position_ < last_) enter_token();
  }

  // Asks for what comes next, if anything does.
  __device__ void fetch() {
    if (position_ < last_) {
      uint4* to = queue_ + into_ * (kGroups * kThreads) + threadIdx.x;
      const int64_t left = args_.width - column_;
      const int count = static_cast<int>(left < 0 ? 0 : left < S::kPack ? left : S::kPack);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int valid = state_of(group) < args_.plan.num_states ? count : 0;
        // where nothing is read, the address still has to be one
        const char* from = at_[group] + (valid > 0 ? column_ : 0) * int64_t{sizeof(Element)};
        if (args_.aligned) {
          copy_async(to + group * kThreads, from, valid * static_cast<int>(sizeof(Element)));
        } else {
          Pack<Element> pack;
#pragma unroll
          for (int i = 0; i < S::kPack; ++i) {
            pack.element[i] =
                i < valid ? reinterpret_cast<const Element*>(from)[i] : from_float<Element>(0.0f);
          }
          store_pack(reinterpret_cast<Element*>(to + group * kThreads), pack);
        }
      }
      column_ += S::kColumns;
      // all threads go on to the next token at once
      if (column_ - start() >= args_.width && ++position_ < last_) enter_token();
    }
    commit_copies();
    into_ = into_ + 1 == S::kStages ? 0 : into_ + 1;
  }

  // Waits for the oldest that was asked for and not yet taken.
  __device__ void take(uint4 (&raw)[kGroups]) {
    wait_copies<S::kStages - 2>();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      raw[group] = queue_[(from_ * kGroups + group) * kThreads + threadIdx.x];
    }
    from_ = from_ + 1 == S::kStages ? 0 : from_ + 1;
  }

 private:
  __device__ static int start() {
    return static_cast<int>(threadIdx.x / kWarp * 4 + threadIdx.x % 4) * S::kPack;
  }

  __device__ int state_of(int group) const {
    const int row = group * 8 + threadIdx.x % kWarp / 4;
    return (row < kPanel ? low_ : high_ - 1) * kPanel + row;
  }

  __device__ void enter_token() {
    column_ = start();
    const int64_t token = args_.order[position_];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int state = min(state_of(group), args_.plan.num_states - 1);
      at_[group] = args_.rows.base[state] + token * args_.rows.stride[state];
    }
  }

  const CosineArgs& args_;
  uint4* queue_;
  const char* at_[kGroups];
  int64_t column_ = 0;
  int low_, high_, position_, last_, into_ = 0, from_ = 0;
};

// Adds to every tile the products of what a warp holds of all rows.
template <class Element, int kGroups>
__device__ void add_products(const uint4 (&raw)[kGroups],
                             float (&dots)[Shape<Element, kGroups>::kTiles][4]) {
  using Factor = typename Factors<Element>::Type;
  constexpr int kPlanes = Factors<Element>::kPlanes;
  Fragment<Element> rows[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) rows[group].fill(raw[group]);
  int tile = 0;
#pragma unroll
  for (int top = 0; top < kGroups; top += 2) {
#pragma unroll
    for (int right = 0; right < min(top + 2, kGroups); ++right, ++tile) {
      // The matrix units round every sum towards zero. Starting anew each time and adding up
      // outside keeps that from growing with the width.
      float sum[4] = {};
#pragma unroll
      for (int step = 0; step < Fragment<Element>::kSteps; ++step) {
        // small products first
#pragma unroll
        for (int order = kPlanes - 1; order >= 0; --order) {
#pragma unroll
          for (int plane = 0; plane <= order; ++plane) {
            const bool paired = top + 1 < kGroups;
            const Fragment<Element>& below = rows[paired ? top + 1 : top];
            const uint32_t left[4] = {
                rows[top].low(step, plane), paired ? below.low(step, plane) : 0u,
                rows[top].high(step, plane), paired ? below.high(step, plane) : 0u};
            multiply_add(sum, left, rows[right].low(step, order - plane),
                         rows[right].high(step, order - plane),
                         static_cast<const Factor*>(nullptr));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[tile][i] += sum[i];
    }
  }
}

// Row and column of the i-th value that a lane holds of a tile.
struct Place {
  int row, column;
};

__device__ Place place_of(int tile, int i) {
  int height = 0;
  while (tile >= 2 * (height + 1)) tile -= 2 * ++height;
  const int lane = threadIdx.x % kWarp;
  return {16 * height + i / 2 * 8 + lane / 4, 8 * tile + lane % 4 * 2 + i % 2};
}

template <class Element, int kGroups>
__global__ void __launch_bounds__(kThreads, blocks_for(kGroups))
    cosine_kernel(const __grid_constant__ CosineArgs args) {
  using S = Shape<Element, kGroups>;
  extern __shared__ uint4 shared[];
  __shared__ float scale[8 * kGroups];
  float4* const parts = reinterpret_cast<float4*>(shared + S::kQueueBytes / 16);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // neighbouring blocks are passes of one slice: they read the same rows
  const int pass = blockIdx.x % args.plan.num_passes, number = blockIdx.x / args.plan.num_passes;
  int low = pass, apart = 1;
  while (low >= args.plan.num_panels - apart) low -= args.plan.num_panels - apart++;
  const int num_tokens = args.starts[args.num_groups];
  const int share = share_of(num_tokens, args.plan.num_slices);
  const Slice slice{min(number * share, num_tokens), min((number + 1) * share, num_tokens)};

  Stream<Element, kGroups> stream(args, shared, low, low + apart, slice);
#pragma unroll
  for (int i = 0; i < S::kStages - 1; ++i) stream.fetch();
  double totals[S::kTilesEach][4] = {};
  for (int position = slice.first; position < slice.last; ++position) {
    const int group = args.groups[args.order[position]];
    const bool ends = position + 1 == slice.last || args.groups[args.order[position + 1]] != group;
    float dots[S::kTiles][4] = {};
    for (int64_t column = 0; column < args.width; column += S::kColumns) {
      uint4 raw[kGroups];
      stream.take(raw);
      stream.fetch();
      add_products<Element>(raw, dots);
    }

    // the warps' parts of the dots come together, and every warp takes some of the tiles
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile) {
      parts[(warp * S::kTiles + tile) * kWarp + lane] =
          make_float4(dots[tile][0], dots[tile][1], dots[tile][2], dots[tile][3]);
    }
    __syncthreads();
    float whole[S::kTilesEach][4];
#pragma unroll
    for (int n = 0; n < S::kTilesEach; ++n) {
      const int tile = warp + n * kWarps;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int part = 0; part < kWarps && tile < S::kTiles; ++part) {
        const float4 one = parts[(part * S::kTiles + tile) * kWarp + lane];
        sum = make_float4(sum.x + one.x, sum.y + one.y, sum.z + one.z, sum.w + one.w);
      }
      whole[n][0] = sum.x, whole[n][1] = sum.y, whole[n][2] = sum.z, whole[n][3] = sum.w;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Place place = place_of(tile, i);
        if (tile < S::kTiles && place.row == place.column) {
          const float norm = sqrtf(whole[n][i]);
          // written so that NaN stays NaN
          scale[place.row] = 1.0f / (norm < kEps ? kEps : norm);
        }
      }
    }
    __syncthreads();
    double* record = args.records +
                     (int64_t{number + group} * args.plan.num_passes + pass) * args.plan.num_pairs;
#pragma unroll
    for (int n = 0; n < S::kTilesEach; ++n) {
      const int tile = warp + n * kWarps;
      if (tile >= S::kTiles) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Place place = place_of(tile, i);
        totals[n][i] += whole[n][i] * scale[place.row] * scale[place.column];
        if (!ends) continue;
        const int state = (place.row < kPanel ? low : low + apart - 1) * kPanel + place.row;
        if (place.row >= place.column && state < args.plan.num_states) {
          record[place.row * (place.row + 1) / 2 + place.column] = totals[n][i];
        }
        totals[n][i] = 0.0;
      }
    }
  }
}

struct MergeArgs {
  Plan plan;
  const int* starts;
  const double* records;
  float* sums;
  int num_groups, max_offset;
};

// Sums of a group from those of its slices. A block is for one group and some outputs, next to each
// other in x; y takes turns with the slices.
__global__ void __launch_bounds__(kMergeOutputs* kMergeSlices) merge_kernel(MergeArgs args) {
  __shared__ double parts[kMergeSlices][kMergeOutputs];
  const Plan& plan = args.plan;
  const int outputs = plan.num_states * plan.num_states;
  const int num_blocks = (outputs + kMergeOutputs - 1) / kMergeOutputs;
  const int group = blockIdx.x / num_blocks;
  const int output = blockIdx.x % num_blocks * kMergeOutputs + threadIdx.x;
  const int one = output / plan.num_states, two = output % plan.num_states;
  const int late = max(one, two), early = min(one, two);
  // the pass of two panels; of one panel, that with the panel before it
  const int high = max(late / kPanel, 1), low = min(early / kPanel, high - 1), apart = high - low;
  const int pass = (apart - 1) * plan.num_panels - apart * (apart - 1) / 2 + low;
  const int row = late - (late >= high * kPanel ? high - 1 : low) * kPanel;
  const int column = early - (early >= high * kPanel ? high - 1 : low) * kPanel;

  const int begin = args.starts[group], end = args.starts[group + 1];
  const int share = share_of(args.starts[args.num_groups], plan.num_slices);
  const int first = begin / share, stop = begin < end ? (end - 1) / share + 1 : first;
  double total = 0.0;
  if (output < outputs && late - early <= args.max_offset) {
    const double* from =
        args.records + int64_t{pass} * plan.num_pairs + row * (row + 1) / 2 + column;
    const int64_t stride = int64_t{plan.num_passes} * plan.num_pairs;
#pragma unroll 4
    for (int slice = first + threadIdx.y; slice < stop; slice += kMergeSlices) {
      total += from[(slice + group) * stride];
    }
  }
  parts[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || output >= outputs) return;
  for (int i = 1; i < kMergeSlices; ++i) total += parts[i][threadIdx.x];
  args.sums[int64_t{group} * outputs + output] = static_cast<float>(total);
}

template <class Element, int kGroups>
void launch_cosines(const CosineArgs& args, cudaStream_t stream) {
  constexpr int kBytes = Shape<Element, kGroups>::kSharedBytes;
  const auto kernel = cosine_kernel<Element, kGroups>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
        "layer_similarity: shared memory");
  kernel<<<args.plan.num_slices * args.plan.num_passes, kThreads, kBytes, stream>>>(args);
}

}  // namespace

int64_t layer_similarity_scratch(const LayerSimilarityCudaArgs& args) {
  return lay_out(args, make_plan(args)).bytes;
}

void layer_similarity_cuda(const LayerSimilarityCudaArgs& args) {
  const DeviceGuard guard(args.device);
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const Plan plan = make_plan(args);
  const Scratch scratch = lay_out(args, plan);
  const int num_tokens = static_cast<int>(args.num_tokens);
  const int num_groups = static_cast<int>(args.num_groups);

  const int64_t order_blocks =
      std::max<int64_t>(1, (args.num_tokens + kOrderTokens - 1) / kOrderTokens);
  order_kernel<<<static_cast<unsigned>(order_blocks * num_groups), kOrderThreads, 0, stream>>>(
      {args.groups, scratch.order, scratch.starts, args.counts, num_tokens, num_groups});
  check(cudaGetLastError(), "layer_similarity: order");

  if (num_tokens > 0) {
    CosineArgs cosines{};
    cosines.aligned = true;
    for (int64_t i = 0; i < args.num_states; ++i) {
      cosines.rows.base[i] = static_cast<const char*>(args.states[i]);
      cosines.rows.stride[i] = args.row_strides[i] * size_of(args.dtype);
      const auto address = reinterpret_cast<uintptr_t>(args.states[i]);
      if (address % 16 != 0 || cosines.rows.stride[i] % 16 != 0) cosines.aligned = false;
    }
    cosines.plan = plan;
    cosines.groups = args.groups;
    cosines.order = scratch.order;
    cosines.starts = scratch.starts;
    cosines.records = scratch.records;
    cosines.width = args.width;
    cosines.num_groups = num_groups;
    dispatch(args.dtype, [&](auto* element) {
      using Element = std::remove_pointer_t<decltype(element)>;
      // what a smaller size would save in products does not show: reading takes longer
      if (args.num_states <= 40) {
        launch_cosines<Element, 5>(cosines, stream);
      } else {
        launch_cosines<Element, 8>(cosines, stream);
      }
    });
    check(cudaGetLastError(), "layer_similarity: cosines");
  }

  const int64_t outputs = args.num_states * args.num_states;
  const int64_t merge_blocks = (outputs + kMergeOutputs - 1) / kMergeOutputs * num_groups;
  merge_kernel<<<static_cast<unsigned>(merge_blocks), dim3(kMergeOutputs, kMergeSlices), 0,
                 stream>>>({plan, scratch.starts, scratch.records, args.sums, num_groups,
                            static_cast<int>(args.max_offset)});
  check(cudaGetLastError(), "layer_similarity: merge");
}

}  // namespace interlace
