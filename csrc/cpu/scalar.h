// Conversions of single elements between fp32 and the 16-bit types, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace interlace {

// Elements as they lie in memory. They alias nothing but themselves; kernels copy them bit by bit.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | rest << 13);
  // below the normal range the bits count steps of 2^-24
  const float size = rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f
                                   : bits_to_float((rest << 13) + (112u << 23));
  return sign ? -size : size;
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u,
                 rest = bits & ~(1u << 31);
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // adding 0.5 leaves the count of steps of 2^-24 in the lowest bits, rounded to nearest even
    const uint32_t steps = float_to_bits(bits_to_float(rest) + 0.5f) - float_to_bits(0.5f);
    return static_cast<uint16_t>(sign | steps);
  }
  const uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13);
}

inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }
inline float to_float(Float16 value) { return half_to_float(value.bits); }

inline void from_float(float value, float& to) { to = value; }
inline void from_float(float value, BFloat16& to) { to.bits = float_to_bfloat(value); }
inline void from_float(float value, Float16& to) { to.bits = float_to_half(value); }

}  // namespace interlace
