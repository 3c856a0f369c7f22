// ragged_attention on the CPU. The meaning is the reference in interlace/ops/_ragged_reference.py.
//
// Letters: B sequences, Tq query tokens, Tk keys, Hq query heads, Hkv key-value heads, D width.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace interlace {

struct RaggedAttentionArgs {
  DType dtype;    // of queries, keys, values and output
  const void* q;  // [Tq, Hq, D]; strides in elements, elements of a row side by side
  int64_t q_token_stride, q_head_stride;
  const void* k;  // [Tk, Hkv, D], likewise
  int64_t k_token_stride, k_head_stride;
  const void* v;  // [Tk, Hkv, D], likewise
  int64_t v_token_stride, v_head_stride;
  const float* gate;         // [Hq]; null: 1
  const int32_t* q_tokens;   // [B + 1], first query of every sequence, and Tq
  const int32_t* kv_tokens;  // [B + 1], first key of every sequence, and Tk
  const int64_t* q_start;    // [Hkv + 1], first query head of every key-value head, and Hq
  int64_t num_sequences, num_queries, num_kv_heads, width;
  int64_t before, behind;  // keys that a query sees before and behind its own position, >= 0
  float scale;             // of the scores
  void* out;               // [Tq, Hq, D], side by side; every element is written
  float* lse;              // [Hq, Tq], likewise
  int num_threads;         // >= 1
  int max_lanes;           // widest vectors to use, in floats: 16 AVX-512, 8 AVX2, 4 what all have
};

void ragged_attention(const RaggedAttentionArgs& args);

}  // namespace interlace
