// sums[g, i, j] = sum over tokens t of group g of <h_i[t], h_j[t]> / (|h_i[t]| |h_j[t]|)
//
// Every element of the input is read once. The dots of a token, its diagonal included, come first;
// the diagonal gives the norms; the cosines go to a buffer [tokens, pairs]. Then every pair is
// added up in fp64, token after token. So no result depends on the number of threads.
#include "cpu/layer_similarity.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace interlace {
namespace {

constexpr float kEps = 1e-8f;
// of all rows at a time, as they lie in memory: small enough to stay near the processor while the
// next ones come in
constexpr int64_t kPanelBytes = 28 * 1024;
constexpr int64_t kMinBlock = 64, kMaxBlock = 1024;
// cosines held before they are added up
constexpr int64_t kBufferBytes = 4 << 20;
// less work than this is not worth a thread
constexpr int64_t kFlopsPerThread = 1 << 22;

// The pairs (row, row + offset) that are asked for, numbered by offset, then by row.
struct Band {
  int64_t num_rows;
  int64_t max_offset;

  bool holds(int64_t row, int64_t offset) const {
    return offset <= max_offset && row + offset < num_rows;
  }
  int64_t index(int64_t row, int64_t offset) const {
    return offset * num_rows - offset * (offset - 1) / 2 + row;
  }
  int64_t num_pairs() const { return index(0, max_offset + 1); }
  int64_t num_tiles(int64_t rows, int64_t offsets) const {
    int64_t count = 0;
    for (int64_t offset = 0; offset <= max_offset; offset += offsets) {
      count += (num_rows - offset + rows - 1) / rows;
    }
    return count;
  }
};

struct Token {
  const void* const* rows;  // S pointers to D elements each; null: no token
  DType dtype;
};

// A block of all rows of one token, in fp32.
struct Panel {
  float* data;
  int64_t num_rows;
  int64_t stride;  // largest block, in elements, a multiple of 16
  int64_t used;    // elements of this block
  int64_t filled;  // the same with the zeros behind them

  const float* row(int64_t i) const { return data + (i < num_rows ? i : num_rows - 1) * stride; }
};

// The block that is wanted next, brought near line by line while the current one is worked on. The
// processor's own prefetching does not follow S rows in turn.
class Stream {
 public:
  Stream(const Token& token, int64_t num_rows, int64_t start, int64_t width, int64_t block)
      : rows_(token.rows), num_rows_(token.rows ? num_rows : 0) {
    const int64_t size = size_of(token.dtype);
    begin_ = start * size;
    end_ = (start + block < width ? start + block : width) * size;
    enter_row();
  }

  // Shares the lines out to a number of steps.
  void spread(int64_t num_steps) {
    const int64_t lines = num_rows_ * ((end_ - begin_) / kLine + 1);
    lines_per_step = (lines + num_steps - 1) / num_steps;
  }

  void fetch_line() {
    if (row_ == num_rows_) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += kLine;
    if (at_ >= stop_) {
      ++row_;
      enter_row();
    }
  }

  int64_t lines_per_step = 0;

 private:
  static constexpr int64_t kLine = 64;

  void enter_row() {
    if (row_ == num_rows_) return;
    at_ = static_cast<const char*>(rows_[row_]) + begin_;
    stop_ = static_cast<const char*>(rows_[row_]) + end_;
  }

  const void* const* rows_;
  int64_t num_rows_, row_ = 0, begin_, end_;
  const char* at_ = nullptr;
  const char* stop_ = nullptr;
};

}  // namespace

#define INTERLACE_BODY "cpu/layer_similarity_body.h"
#include "cpu/isa.h"

namespace {

struct Variant {
  void (*token_dots)(const Token&, const Token&, int64_t, const Band&, Panel&, void*, float*);
  int64_t rows, offsets, tile_bytes;
};

// The best variant that this processor runs, within a limit that lets tests reach the others.
Variant choose_variant(int max_lanes) {
  switch (usable_lanes(max_lanes)) {
#if defined(__x86_64__)
    case avx512::kLanes:
      return {avx512::token_dots, avx512::kRows, avx512::kOffsets, sizeof(avx512::Tile)};
    case avx2::kLanes:
      return {avx2::token_dots, avx2::kRows, avx2::kOffsets, sizeof(avx2::Tile)};
#endif
    default:
      return {plain::token_dots, plain::kRows, plain::kOffsets, sizeof(plain::Tile)};
  }
}

struct alignas(64) CacheLine {
  char bytes[64];
};

// What one worker needs for one token.
class Workspace {
 public:
  Workspace(int64_t num_states, int64_t width, DType dtype, const Band& band,
            const Variant& variant)
      : rows(num_states), next_rows(num_states) {
    const int64_t fitting = kPanelBytes / (num_states * size_of(dtype));
    const int64_t block = std::clamp((fitting + 15) / 16 * 16, kMinBlock, kMaxBlock);
    const int64_t stride = std::max<int64_t>(16, std::min(block, (width + 15) / 16 * 16));
    const int64_t panel_bytes = num_states * stride * sizeof(float);
    const int64_t tile_bytes = band.num_tiles(variant.rows, variant.offsets) * variant.tile_bytes;
    panel_memory_.resize((panel_bytes + 63) / 64);
    tile_memory_.resize((tile_bytes + 63) / 64);
    panel = {reinterpret_cast<float*>(panel_memory_.data()), num_states, stride, 0, 0};
    tiles = tile_memory_.data();
  }

  std::vector<const void*> rows, next_rows;
  Panel panel;
  void* tiles;

 private:
  std::vector<CacheLine> panel_memory_, tile_memory_;
};

// dots -> cosines, in place. The norms are the first num_rows dots, those with offset 0.
void normalise(const Band& band, float* scale, float* dots) {
  for (int64_t i = 0; i < band.num_rows; ++i) {
    const float norm = std::sqrt(dots[i]);
    // written so that NaN stays NaN
    scale[i] = 1.0f / (norm < kEps ? kEps : norm);
  }
  for (int64_t offset = 0; offset <= band.max_offset; ++offset) {
    float* row = dots + band.index(0, offset);
    for (int64_t i = 0; i < band.num_rows - offset; ++i) {
      row[i] = row[i] * scale[i] * scale[i + offset];
    }
  }
}

void locate(const LayerSimilarityArgs& args, int64_t token, std::vector<const void*>& rows) {
  // rows without elements have no address
  if (args.width == 0) return;
  const int64_t size = size_of(args.dtype);
  for (int64_t i = 0; i < args.num_states; ++i) {
    rows[i] = static_cast<const char*>(args.states[i]) + token * args.row_strides[i] * size;
  }
}

}  // namespace

void layer_similarity(const LayerSimilarityArgs& args) {
  const Band band{args.num_states, args.max_offset};
  const int64_t num_states = args.num_states, num_pairs = band.num_pairs();

  std::vector<int64_t> tokens;
  std::fill_n(args.counts, args.num_groups, int64_t{0});
  for (int64_t t = 0; t < args.num_tokens; ++t) {
    if (args.groups[t] < 0 || args.groups[t] >= args.num_groups) continue;
    tokens.push_back(t);
    ++args.counts[args.groups[t]];
  }
  const int64_t num_tokens = static_cast<int64_t>(tokens.size());

  const Variant variant = choose_variant(args.max_lanes);
  const int64_t flops = 2 * num_tokens * num_pairs * args.width;
  const int num_threads =
      static_cast<int>(std::min<int64_t>(args.num_threads, 1 + flops / kFlopsPerThread));
  std::vector<std::unique_ptr<Workspace>> workspaces;
  for (int worker = 0; worker < num_threads; ++worker) {
    workspaces.push_back(
        std::make_unique<Workspace>(num_states, args.width, args.dtype, band, variant));
  }
  const int64_t chunk = std::max<int64_t>(
      1, std::min(num_tokens, kBufferBytes / (num_pairs * static_cast<int64_t>(sizeof(float)))));
  std::vector<float> cosines(chunk * num_pairs);
  std::vector<float> scales(num_threads * num_states);
  std::vector<double> totals(args.num_groups * num_pairs);

  for (int64_t start = 0; start < num_tokens; start += chunk) {
    const int64_t count = std::min(chunk, num_tokens - start);
    parallel_for(count, 16, num_threads, [&](int worker, int64_t begin, int64_t end) {
      Workspace& space = *workspaces[worker];
      locate(args, tokens[start + begin], space.rows);
      for (int64_t n = begin; n < end; ++n) {
        const bool last = n + 1 == end;
        if (!last) locate(args, tokens[start + n + 1], space.next_rows);
        float* row = cosines.data() + n * num_pairs;
        variant.token_dots({space.rows.data(), args.dtype},
                           {last ? nullptr : space.next_rows.data(), args.dtype}, args.width, band,
                           space.panel, space.tiles, row);
        std::swap(space.rows, space.next_rows);
        normalise(band, scales.data() + worker * num_states, row);
      }
    });
    for (int64_t n = 0; n < count; ++n) {
      const float* row = cosines.data() + n * num_pairs;
      double* total = totals.data() + args.groups[tokens[start + n]] * num_pairs;
      for (int64_t pair = 0; pair < num_pairs; ++pair) total[pair] += row[pair];
    }
  }

  std::fill_n(args.sums, args.num_groups * num_states * num_states, 0.0f);
  for (int64_t g = 0; g < args.num_groups; ++g) {
    for (int64_t offset = 0; offset <= args.max_offset; ++offset) {
      for (int64_t i = 0; i < num_states - offset; ++i) {
        const float sum = static_cast<float>(totals[g * num_pairs + band.index(i, offset)]);
        float* matrix = args.sums + g * num_states * num_states;
        matrix[i * num_states + i + offset] = sum;
        matrix[(i + offset) * num_states + i] = sum;
      }
    }
  }
}

}  // namespace interlace
