// ragged_decode on the GPU. The meaning is the reference in interlace/ops/ragged_decode.py.
//
// Letters: B sequences, N new tokens, Hq query heads, Hkv key-value heads, D width, L capacity,
// S splits.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace interlace {

// rows (new token, query head) of one kv head, and kv heads that serve query heads, at most; with
// more rows the products, which run on the cores, would take longer than the memory
constexpr int kMaxDecodeRows = 4;
constexpr int kMaxDecodeHeads = 256;
// splits at most
constexpr int kMaxDecodeSplits = 128;

struct RaggedDecodeCudaArgs {
  DType dtype;    // of queries, cache and output
  const void* q;  // [B, N, Hq, D]; strides in elements, elements of a row side by side
  int64_t q_sequence_stride, q_token_stride, q_head_stride;
  // keys and values: contiguous [B, Hkv, L, D], outer is a sequence; paged [blocks, size, Hkv, D],
  // outer is a block. Every row of D elements begins at a multiple of 16 bytes.
  const void* k;
  int64_t k_outer_stride, k_head_stride, k_key_stride;
  const void* v;
  int64_t v_outer_stride, v_head_stride, v_key_stride;
  const int32_t* lengths;      // [B]
  const int32_t* starts;       // [B]; null: 0
  const int32_t* block_table;  // [B, L / block_size]; null: contiguous
  int64_t table_stride;
  int block_size;
  int num_sequences, num_tokens, num_heads;
  int width;  // a multiple of 16 bytes, at most 128
  int capacity;
  int window;  // keys that a token sees, >= 1
  int num_splits;
  float scale;        // of the scores
  const float* gate;  // [Hq]; null: 1
  void* out;          // [B, N, Hq, D], side by side; every element is written
  float* parts;       // with several splits: B * N * Hq * S * (D + 2) floats, to work with
  int device;
  void* stream;
  bool overlap;  // the kernels may start before those in front of them have ended
};

// Kv heads that serve query heads: handed over by value, so that nothing has to be copied before.
struct DecodeHeads {
  int count;
  int16_t kv_head[kMaxDecodeHeads], first_head[kMaxDecodeHeads], group[kMaxDecodeHeads];
};

void ragged_decode_cuda(const RaggedDecodeCudaArgs& args, const DecodeHeads& heads);

}  // namespace interlace
