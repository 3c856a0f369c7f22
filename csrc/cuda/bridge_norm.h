// bridge_norm on a GPU, with every bridge but the low-rank one.
#pragma once

#include <cstdint>

#include "common/bridge_norm.h"

namespace interlace {

// All tensors lie on `device`; addresses, and strides in bytes, are multiples of 16, and so is the
// size of a row, at most 16384 elements. Runs on a stream (cudaStream_t) and does not wait for it;
// with `overlap` the kernel may start before those in front of it have ended.
void bridge_norm_cuda(const BridgeNormArgs& args, int device, std::uintptr_t stream, bool overlap);

}  // namespace interlace
