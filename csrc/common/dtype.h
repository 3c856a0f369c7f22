// Element types that kernels take, with the numbers that Python passes.
#pragma once

#include <cstdint>

namespace interlace {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace interlace
