// Vectors of kLanes floats for one instruction set: load and store any element type, sum up,
// and take exponentials.
//
// Included by cpu/isa.h inside a namespace per instruction set, hence no include guard. Needs
// kLanes and INTERLACE_TARGET. Vector takes the operators of C, element by element.

typedef float Vector __attribute__((vector_size(4 * kLanes), may_alias, aligned(4)));
typedef uint32_t VectorBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes), may_alias, aligned(2)));

INTERLACE_TARGET static inline Vector broadcast(float value) { return Vector{} + value; }

INTERLACE_TARGET static inline Vector load(const float* from) {
  return *reinterpret_cast<const Vector*>(from);
}

INTERLACE_TARGET static inline Vector load(const BFloat16* from) {
  const HalfBits bits = *reinterpret_cast<const HalfBits*>(from);
  return (Vector)(__builtin_convertvector(bits, VectorBits) << 16);
}

INTERLACE_TARGET static inline Vector load(const Float16* from) {
  Vector result;
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512 wide = _mm512_cvtph_ps(bits);
    std::memcpy(&result, &wide, sizeof result);
    return result;
  } else if constexpr (kLanes == 8) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256 wide = _mm256_cvtph_ps(bits);
    std::memcpy(&result, &wide, sizeof result);
    return result;
  }
#endif
  for (int i = 0; i < kLanes; ++i) result[i] = half_to_float(from[i].bits);
  return result;
}

// The first `count` elements, 0..kLanes-1, and zeros behind them.
template <class Element>
INTERLACE_TARGET static inline Vector load_some(const Element* from, int64_t count) {
  Vector result = {};
  for (int64_t i = 0; i < count; ++i) result[i] = to_float(from[i]);
  return result;
}

// The same for any count, at most kLanes elements of it.
template <class Element>
INTERLACE_TARGET static inline Vector load_up_to(const Element* from, int64_t count) {
  return count >= kLanes ? load(from) : load_some(from, count);
}

INTERLACE_TARGET static inline void store(const Vector& vector, float* to) {
  *reinterpret_cast<Vector*>(to) = vector;
}

INTERLACE_TARGET static inline void store(const Vector& vector, BFloat16* to) {
  const VectorBits bits = (VectorBits)vector;
  const VectorBits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const VectorBits quiet = bits >> 16 | 0x40u;
  const VectorBits is_nan = (VectorBits)((bits & 0x7fffffffu) > 0x7f800000u);
  *reinterpret_cast<HalfBits*>(to) =
      __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), HalfBits);
}

INTERLACE_TARGET static inline void store(const Vector& vector, Float16* to) {
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    __m512 wide;
    std::memcpy(&wide, &vector, sizeof wide);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  } else if constexpr (kLanes == 8) {
    __m256 wide;
    std::memcpy(&wide, &vector, sizeof wide);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  for (int i = 0; i < kLanes; ++i) to[i].bits = float_to_half(vector[i]);
}

// Only the first `count` elements, 0..kLanes-1.
template <class Element>
INTERLACE_TARGET static inline void store_some(const Vector& vector, Element* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from_float(vector[i], to[i]);
}

INTERLACE_TARGET static inline float sum_of_lanes(const Vector& vector) {
  float lane[kLanes];
  std::memcpy(lane, &vector, sizeof lane);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

INTERLACE_TARGET static inline float largest_lane(const Vector& vector) {
  float largest = vector[0];
  for (int i = 1; i < kLanes; ++i) largest = vector[i] > largest ? vector[i] : largest;
  return largest;
}

// e^x for x <= 0, 0 below the normal numbers; NaN stays NaN. x = n ln 2 + rest, |rest| <= ln 2 / 2,
// and e^rest by its Taylor series.
INTERLACE_TARGET static inline Vector exp_of_negative(const Vector& x) {
  // adding it leaves a whole number in the lowest bits
  const Vector magic = broadcast(0x1.8p23f);
  const Vector shifted = x * 0x1.715476p0f + magic;
  const Vector n = shifted - magic;
  const Vector rest = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  Vector series = broadcast(1.0f / 5040);
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  const Vector power = (Vector)(((VectorBits)shifted + 127u) << 23);
  const VectorBits vanishes = (VectorBits)(x < -87.0f);
  return (Vector)((VectorBits)(series * power) & ~vanishes);
}
