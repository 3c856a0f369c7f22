// What the CUDA kernels share: element types, 16-byte access, warp reductions, launching.
//
// Kernels take raw pointers, compute in fp32, and address in int64. They run on the stream and the
// device that the caller names, and synchronise nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace interlace {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes a device current as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class Element>
__device__ Element from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// 16 bytes of elements: the widest access of one thread. The address is a multiple of 16.
template <class Element>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(Element);
  Element element[kSize];
};

template <class Element>
__device__ inline Pack<Element> load_pack(const Element* from) {
  return *reinterpret_cast<const Pack<Element>*>(from);
}

template <class Element>
__device__ inline void store_pack(Element* to, const Pack<Element>& pack) {
  *reinterpret_cast<Pack<Element>*>(to) = pack;
}

constexpr int kWarp = 32;

// Every lane gets the sum over the warp, added up in a fixed order.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

// First thing in a kernel that may overlap the one before it: lets the next kernel start, and waits
// until those before have ended. Where nothing overlaps it does nothing.
__device__ inline void enter() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

// Launches a kernel that begins with `enter`, on Hopper or later before those in front have ended.
template <class... Parameters, class... Args>
void launch_kernel(void (*kernel)(Parameters...), unsigned blocks, int threads, cudaStream_t stream,
                   bool overlap, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), "a launch");
}

// Calls visit with a null pointer of the C++ type that stands for a dtype.
template <class Visit>
void dispatch(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return visit(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16:
      return visit(static_cast<__half*>(nullptr));
  }
}

}  // namespace interlace
