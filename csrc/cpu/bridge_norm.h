// bridge_norm on the CPU, with every bridge.
//
// Letters: D width, R rank of a low-rank bridge.
#pragma once

#include <cstdint>

#include "common/bridge_norm.h"

namespace interlace {

// A low-rank bridge in the dtype of x; null where there is none.
struct LowRank {
  const void* down;  // [R, D]
  const void* up;    // [D, R]
  int64_t rank;
};

// num_threads: at least 1. max_lanes: widest vectors to use, in floats: 16 AVX-512, 8 AVX2, 4 what
// all have.
void bridge_norm(const BridgeNormArgs& args, const LowRank& low, int num_threads, int max_lanes);

}  // namespace interlace
