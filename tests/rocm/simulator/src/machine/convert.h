// Number formats that the host's compiler does not have. gfx942's 8-bit formats are the "fnuz"
// ones: no infinity, no negative zero, one NaN (0x80).
#pragma once

#include <bit>
#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace gfx942 {

enum class Rounding : uint8_t { kNearest = 0, kUp = 1, kDown = 2, kZero = 3 };

uint16_t float_to_half(float value, Rounding rounding);
// From the sum or product itself, so that nothing is rounded twice.
uint16_t double_to_half(double value, Rounding rounding);
// As the host rounds at the moment, which is the wave's mode inside a FloatScope.
uint16_t float_to_half(float value);
uint16_t double_to_half(double value);
uint16_t float_to_bf16(float value);

inline float half_to_float(uint16_t half) {
#ifdef __F16C__
  return _cvtsh_ss(half);
#else
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
  // The exponent's bias differs by 112; the product also normalises denormals.
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t bits =
      (half & 0x7c00) != 0x7c00 ? std::bit_cast<uint32_t>(scaled) : magnitude | 0x7f800000u;
  return std::bit_cast<float>(bits | static_cast<uint32_t>(half & 0x8000) << 16);
#endif
}

inline float bf16_to_float(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

enum class Small : uint8_t { kFp8, kBf8 };  // e4m3fnuz, e5m2fnuz

float small_to_float(Small format, uint8_t value);
// Rounds to nearest even; what is too large becomes the largest number if `saturate` is set, else
// NaN.
uint8_t float_to_small(Small format, float value, bool saturate);
// Rounds up with the probability that the discarded bits state, by adding the random number to
// them.
uint8_t float_to_small_stochastic(Small format, float value, uint32_t random, bool saturate);

// A number of the host that holds the bits of a half; arithmetic goes through float.
struct Half {
  uint16_t bits = 0;
  Half() = default;
  explicit Half(uint16_t raw) : bits(raw) {}
  operator float() const { return half_to_float(bits); }
};

}  // namespace gfx942
