// ragged_decode on the CPU. The meaning is the reference in interlace/ops/ragged_decode.py.
//
// Letters: B sequences, N new tokens, Hq query heads, Hkv key-value heads, D width, L capacity.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace interlace {

struct RaggedDecodeArgs {
  DType dtype;    // of queries, cache and output
  const void* q;  // [B, N, Hq, D]; strides in elements, elements of a row side by side
  int64_t q_sequence_stride, q_token_stride, q_head_stride;
  // keys and values: contiguous [B, Hkv, L, D], outer is a sequence; paged [blocks, size, Hkv, D],
  // outer is a block
  const void* k;
  int64_t k_outer_stride, k_head_stride, k_key_stride;
  const void* v;
  int64_t v_outer_stride, v_head_stride, v_key_stride;
  const int32_t* lengths;      // [B], 0..L
  const int32_t* starts;       // [B], >= 0; null: 0
  const int32_t* block_table;  // [B, L / block_size]; null: contiguous
  int64_t table_stride, block_size;
  const int64_t* q_start;  // [Hkv + 1]
  int64_t num_sequences, num_tokens, num_heads, num_kv_heads, width;
  int64_t window;     // keys that a token sees, >= 1
  float scale;        // of the scores
  const float* gate;  // [Hq]; null: 1
  void* out;          // [B, N, Hq, D], side by side; every element is written
  int num_threads;    // >= 1
  int max_lanes;      // widest vectors to use, in floats: 16 AVX-512, 8 AVX2, 4 what all have
};

void ragged_decode(const RaggedDecodeArgs& args);

}  // namespace interlace
