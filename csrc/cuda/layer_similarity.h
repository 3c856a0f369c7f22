// layer_similarity on an NVIDIA GPU. The meaning is the reference in interlace/ops.
//
// Letters: S states, T tokens, D width, G groups.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace interlace {

constexpr int64_t kMostStates = 128;

struct LayerSimilarityCudaArgs {
  const void* const* states;  // S pointers, each to [T, D] of dtype, elements of a row side by side
  const int64_t* row_strides;  // S, in elements
  DType dtype;
  const int32_t* groups;  // [T]; outside 0..G-1: ignored
  int64_t num_states;     // 1..kMostStates
  int64_t num_tokens;     // below 2^31
  int64_t width;
  int64_t num_groups;  // >= 1
  int64_t max_offset;  // 0..S-1
  float* sums;         // [G, S, S], every element is written
  int64_t* counts;     // [G], every element is written
  void* scratch;       // layer_similarity_scratch bytes, at a multiple of 16
  int device;
  void* stream;
};

// Bytes of scratch that a call needs; of the arguments, pointers are not read.
int64_t layer_similarity_scratch(const LayerSimilarityCudaArgs& args);

void layer_similarity_cuda(const LayerSimilarityCudaArgs& args);

}  // namespace interlace
