// bridge_norm: the threads of a row keep it in registers from load to store.
//
// So memory is read and written once, 16 bytes per access. A row of up to 4 KB belongs to one warp
// and four rows make a block; a longer one has a block for itself, with two accesses per thread as
// long as 512 threads are enough, so that several blocks share a multiprocessor and load while
// others add up.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "cuda/bridge_norm.h"
#include "cuda/common.cuh"

namespace interlace {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kShortRowThreads = 128;
// elements that a thread keeps
constexpr int kMaxElements = 32;

// How rows are shared out.
struct Layout {
  int threads;         // of a row, a multiple of 32
  int rows_per_block;  // 1 unless a row has one warp
  int num_packs;       // of a row
};

__device__ __forceinline__ uint4 load_streaming(const void* from) {
  // nobody reads x and residual again
  return __ldcs(static_cast<const uint4*>(from));
}

template <class Element>
__device__ __forceinline__ void load_parameter(const Parameter& parameter, int pack,
                                               float (&values)[Pack<Element>::kSize]) {
  constexpr int kSize = Pack<Element>::kSize;
  if (parameter.dtype == DType::kFloat32) {
    const float* const from = static_cast<const float*>(parameter.data) + pack * kSize;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const Pack<float> found = load_pack(from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[i + j] = found.element[j];
    }
  } else {
    const Pack<Element> found =
        load_pack(static_cast<const Element*>(parameter.data) + pack * kSize);
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = to_float(found.element[i]);
  }
}

// Every thread of a row gets the sum over its threads. `partial` has a place per warp and serves
// one sum only.
__device__ __forceinline__ float row_sum(float value, const Layout& layout, float* partial) {
  value = warp_sum(value);
  if (layout.threads == kWarp) return value;
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_sum(lane < layout.threads / kWarp ? partial[lane] : 0.0f);
}

template <class Element, int kPacks>
__global__ void __launch_bounds__(kMaxThreads)
    bridge_norm_kernel(const BridgeNormArgs args, const Layout layout) {
  enter();
  constexpr int kSize = Pack<Element>::kSize;
  __shared__ float partial[2][kMaxWarps];
  const int place = threadIdx.x % layout.threads;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * layout.rows_per_block + threadIdx.x / layout.threads;
  // a whole warp leaves, and only where a row has one warp: nobody waits for it
  if (row >= args.num_rows) return;
  const Element* const x = static_cast<const Element*>(args.x) + row * args.x_stride;
  const Element* const residual =
      static_cast<const Element*>(args.residual) + row * args.residual_stride;

  union Access {
    uint4 bits;
    Pack<Element> pack;
    __device__ Access() : bits{} {}
  };
  Access mine[kPacks], other[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int pack = p * layout.threads + place;
    if (pack >= layout.num_packs) continue;
    mine[p].bits = load_streaming(x + pack * kSize);
    if (args.residual) other[p].bits = load_streaming(residual + pack * kSize);
  }

  const bool is_scalar = args.scale_size == 1;
  float factor[kSize];
  if (is_scalar) {
    factor[0] = args.scale.dtype == DType::kFloat32
                    ? *static_cast<const float*>(args.scale.data)
                    : to_float(*static_cast<const Element*>(args.scale.data));
  }
  Element* const new_residual = static_cast<Element*>(args.new_residual) + row * args.width;
  float r[kPacks][kSize];
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int pack = p * layout.threads + place;
    // what is behind the row is zero
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      r[p][i] = to_float(mine[p].pack.element[i]);
      if (args.residual) r[p][i] += to_float(other[p].pack.element[i]);
    }
    if (pack >= layout.num_packs) continue;
    if (args.scale.data) {
      if (!is_scalar) load_parameter<Element>(args.scale, pack, factor);
#pragma unroll
      for (int i = 0; i < kSize; ++i) r[p][i] *= is_scalar ? factor[0] : factor[i];
    }
    Pack<Element> rounded;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      rounded.element[i] = from_float<Element>(r[p][i]);
      sum += args.is_layer_norm ? r[p][i] : r[p][i] * r[p][i];
    }
    store_pack(new_residual + pack * kSize, rounded);
  }

  const float count = static_cast<float>(args.width);
  float mean = 0;
  sum = row_sum(sum, layout, partial[0]);
  if (args.is_layer_norm) {
    mean = sum / count;
    sum = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (p * layout.threads + place >= layout.num_packs) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        r[p][i] -= mean;
        sum += r[p][i] * r[p][i];
      }
    }
    sum = row_sum(sum, layout, partial[1]);
  }
  const float rstd = __frsqrt_rn(sum / count + args.eps);
  if (place == 0) {
    args.rstd[row] = rstd;
    args.mean[row] = mean;
  }

  Element* const normed = static_cast<Element*>(args.normed) + row * args.width;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int pack = p * layout.threads + place;
    if (pack >= layout.num_packs) continue;
    float weight[kSize], bias[kSize];
    load_parameter<Element>(args.weight, pack, weight);
    if (args.bias.data) load_parameter<Element>(args.bias, pack, bias);
    Pack<Element> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float value = r[p][i] * rstd * weight[i];
      if (args.bias.data) value += bias[i];
      out.element[i] = from_float<Element>(value);
    }
    store_pack(normed + pack * kSize, out);
  }
}

template <class Element, int kPacks>
void launch(const BridgeNormArgs& args, int threads, cudaStream_t stream, bool overlap) {
  const int rows_per_block = threads == kWarp ? kShortRowThreads / kWarp : 1;
  const Layout layout{threads, rows_per_block, static_cast<int>(args.width / Pack<Element>::kSize)};
  const int64_t blocks = (args.num_rows + rows_per_block - 1) / rows_per_block;
  launch_kernel(bridge_norm_kernel<Element, kPacks>, static_cast<unsigned>(blocks),
                threads * rows_per_block, stream, overlap, args, layout);
}

template <class Element>
void launch_for(const BridgeNormArgs& args, cudaStream_t stream, bool overlap) {
  const int num_packs = static_cast<int>(args.width / Pack<Element>::kSize);
  const auto threads = [&](int packs) {
    return (num_packs + packs * kWarp - 1) / (packs * kWarp) * kWarp;
  };
  if (num_packs <= kWarp) return launch<Element, 1>(args, kWarp, stream, overlap);
  if (num_packs <= 2 * kWarp) return launch<Element, 2>(args, kWarp, stream, overlap);
  if (num_packs <= 4 * kWarp) return launch<Element, 4>(args, kWarp, stream, overlap);
  if (num_packs <= 2 * kMaxThreads) return launch<Element, 2>(args, threads(2), stream, overlap);
  if (num_packs <= 4 * kMaxThreads) return launch<Element, 4>(args, threads(4), stream, overlap);
  if constexpr (8 * Pack<Element>::kSize <= kMaxElements) {
    if (num_packs <= 8 * kMaxThreads) return launch<Element, 8>(args, threads(8), stream, overlap);
  }
  throw std::runtime_error("bridge_norm_cuda: rows are too long");
}

}  // namespace

void bridge_norm_cuda(const BridgeNormArgs& args, int device, std::uintptr_t stream, bool overlap) {
  if (args.num_rows == 0) return;
  const DeviceGuard guard(device);
  dispatch(args.dtype, [&](auto* null) {
    using Element = std::remove_pointer_t<decltype(null)>;
    launch_for<Element>(args, reinterpret_cast<cudaStream_t>(stream), overlap);
  });
  check(cudaGetLastError(), "bridge_norm_cuda");
}

}  // namespace interlace
