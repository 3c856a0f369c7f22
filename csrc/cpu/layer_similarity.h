// layer_similarity on the CPU. The meaning is the reference in interlace/ops/layer_similarity.py.
//
// Letters: S states, T tokens, D width, G groups.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace interlace {

struct LayerSimilarityArgs {
  const void* const* states;  // S pointers, each to [T, D] of dtype, elements of a row side by side
  const int64_t* row_strides;  // S, in elements
  DType dtype;
  const int32_t* groups;  // [T]; outside 0..G-1: ignored
  int64_t num_states;
  int64_t num_tokens;
  int64_t width;
  int64_t num_groups;
  int64_t max_offset;  // 0..S-1
  float* sums;         // [G, S, S], every element is written
  int64_t* counts;     // [G], every element is written
  int num_threads;     // >= 1
  int max_lanes;       // widest vectors to use, in floats: 16 AVX-512, 8 AVX2, 4 what all have
};

void layer_similarity(const LayerSimilarityArgs& args);

}  // namespace interlace
