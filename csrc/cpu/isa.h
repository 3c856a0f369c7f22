// Compiles the inner part of a kernel once per instruction set, and chooses among them at run time.
//
// A kernel puts what works on vectors into a file of its own, `X_body.h`. It includes cpu/lanes.h
// at its top and, inside namespace interlace,
//
//   #define INTERLACE_BODY "cpu/X_body.h"
//   #include "cpu/isa.h"
//
// That gives the namespaces `plain`, `avx2` and `avx512` (x86-64) or `plain` alone (elsewhere; NEON
// on arm64), each with the body, the types and functions of cpu/vector.h, and `kLanes`. Functions
// of the body are marked INTERLACE_TARGET. `usable_lanes` then tells which of the namespaces this
// processor can run.
//
// No include guard: a file may have several bodies.

#ifndef INTERLACE_BODY
#error "define INTERLACE_BODY before including cpu/isa.h"
#endif

namespace plain {
constexpr int kLanes = 4;
#define INTERLACE_TARGET
#include "cpu/vector.h"
#include INTERLACE_BODY
#undef INTERLACE_TARGET
}  // namespace plain

#if defined(__x86_64__)
namespace avx2 {
constexpr int kLanes = 8;
#define INTERLACE_TARGET __attribute__((target("avx2,fma,f16c")))
#include "cpu/vector.h"
#include INTERLACE_BODY
#undef INTERLACE_TARGET
}  // namespace avx2

namespace avx512 {
constexpr int kLanes = 16;
#define INTERLACE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#include "cpu/vector.h"
#include INTERLACE_BODY
#undef INTERLACE_TARGET
}  // namespace avx512
#endif

#undef INTERLACE_BODY
