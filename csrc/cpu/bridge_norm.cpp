// r = s + up (down s) with s = scale (x + residual), and the norm of r, row by row.
//
// Rows are independent and each is worked on in one order, so no result depends on the number of
// threads.
#include "cpu/bridge_norm.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace interlace {
namespace {

// rows that go together through a low-rank bridge, and those of them whose sums are in registers
constexpr int kGroup = 16, kTokens = 4;
// rows are padded to this many floats: the sums of the widest vectors
constexpr int64_t kPadding = 64;
// less work than this, in multiplications and the like, is not worth a thread
constexpr int64_t kWorkPerThread = 1 << 18;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define INTERLACE_SHUFFLES
#endif
#endif

int64_t padded(int64_t width) { return (width + kPadding - 1) / kPadding * kPadding; }

// Parameters in fp32; null where there is none.
struct Widened {
  const float* weight;
  const float* bias;
  const float* scale;
  const float* up;  // packed, see the body
};

// One row and what is applied to it.
template <class Element>
struct Inputs {
  const Element* x;
  const Element* residual;
  const float* scale;
  const float* weight;
  const float* bias;
  int64_t width;
};

// Memory that is not filled with zeros first.
using Floats = std::unique_ptr<float[]>;
Floats floats(int64_t count) { return Floats(new float[count]); }

// What one worker needs.
class Scratch {
 public:
  Scratch(int64_t num_rows, int64_t width, int64_t rank)
      : stride_(padded(width)), rows_(floats(num_rows * stride_)), z_(floats(num_rows * rank)) {}

  int64_t stride() const { return stride_; }
  float* row(int64_t i) { return rows_.get() + i * stride_; }
  float* z() { return z_.get(); }

 private:
  int64_t stride_;
  Floats rows_, z_;
};

}  // namespace

#define INTERLACE_BODY "cpu/bridge_norm_body.h"
#include "cpu/isa.h"

namespace {

struct Variant {
  void (*widen_parameter)(const Parameter&, int64_t, float*);
  void (*pack)(const void*, DType, int64_t, int64_t, float*);
  void (*some_rows)(const BridgeNormArgs&, const LowRank&, const Widened&, int64_t, int64_t,
                    Scratch&);
};

Variant choose_variant(int max_lanes) {
  switch (usable_lanes(max_lanes)) {
#if defined(__x86_64__)
    case avx512::kLanes:
      return {avx512::widen_parameter, avx512::pack, avx512::some_rows};
    case avx2::kLanes:
      return {avx2::widen_parameter, avx2::pack, avx2::some_rows};
#endif
    default:
      return {plain::widen_parameter, plain::pack, plain::some_rows};
  }
}

}  // namespace

void bridge_norm(const BridgeNormArgs& args, const LowRank& low, int num_threads, int max_lanes) {
  if (args.num_rows == 0) return;
  const Variant variant = choose_variant(max_lanes);
  const int64_t stride = padded(args.width), rank = low.rank;
  std::vector<Floats> kept;
  const auto widened = [&](const Parameter& parameter) -> const float* {
    if (!parameter.data || parameter.dtype == DType::kFloat32) {
      return static_cast<const float*>(parameter.data);
    }
    kept.push_back(floats(stride));
    variant.widen_parameter(parameter, args.width, kept.back().get());
    return kept.back().get();
  };
  Widened wide{widened(args.weight), widened(args.bias), nullptr, nullptr};
  if (args.scale.data && args.scale_size == 1) {
    float* const scale = kept.emplace_back(floats(stride)).get();
    variant.widen_parameter(args.scale, 1, scale);
    std::fill_n(scale, args.width, scale[0]);
    wide.scale = scale;
  } else {
    wide.scale = widened(args.scale);
  }
  if (rank > 0) {
    float* const up = kept.emplace_back(floats(rank * stride)).get();
    variant.pack(low.up, args.dtype, args.width, rank, up);
    wide.up = up;
  }

  const int64_t work = args.num_rows * args.width * (1 + rank);
  num_threads = static_cast<int>(std::min<int64_t>(num_threads, 1 + work / kWorkPerThread));
  std::vector<Scratch> scratch;
  for (int worker = 0; worker < num_threads; ++worker) {
    scratch.emplace_back(rank > 0 ? std::min<int64_t>(kGroup, args.num_rows) : 1, args.width, rank);
  }
  parallel_for(args.num_rows, kGroup, num_threads, [&](int worker, int64_t begin, int64_t end) {
    variant.some_rows(args, low, wide, begin, end, scratch[worker]);
  });
}

}  // namespace interlace
