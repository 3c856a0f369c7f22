// The widest vectors that this processor works on.
#pragma once

#include <cstring>

#include "common/dtype.h"
#include "cpu/scalar.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace interlace {

#if defined(__x86_64__)
// __builtin_cpu_supports knows no "f16c" in Clang before 18, nor in older versions of GCC.
inline bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// Floats in the widest usable vector, at most `max_lanes`: 16 (AVX-512), 8 (AVX2) or 4 (what every
// processor has). The limit lets tests reach the narrower ones.
inline int usable_lanes(int max_lanes) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // asked once: a virtual machine may take long to answer
  static const bool f16c = has_f16c();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (max_lanes >= 16 && avx512) return 16;
  if (max_lanes >= 8 && avx2) return 8;
#endif
  (void)max_lanes;
  return 4;
}

}  // namespace interlace
