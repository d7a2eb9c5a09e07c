#include "convert.h"

#include <algorithm>
#include <array>
#include <cfenv>
#include <cmath>

namespace gfx942 {
namespace {

struct Format {
  int mantissa_bits;
  int bias;
  double largest;
};

constexpr Format kHalf = {10, 15, 65504.0};
constexpr Format kFp8 = {3, 8, 240.0};
constexpr Format kBf8 = {2, 16, 57344.0};

// Independent of the host's rounding mode, which follows the wave's while a float instruction runs.
double round_to_integer(double value, Rounding rounding) {
  const double below = std::floor(value);
  const double rest = value - below;
  switch (rounding) {
    case Rounding::kUp:
      return std::ceil(value);
    case Rounding::kDown:
      return below;
    case Rounding::kZero:
      return std::trunc(value);
    case Rounding::kNearest:
      break;
  }
  if (rest != 0.5) return rest < 0.5 ? below : below + 1;
  return std::fmod(below, 2.0) == 0 ? below : below + 1;
}

// The encoding without sign of a finite, not negative number; may round up to beyond `largest`.
uint32_t encode(const Format& format, double magnitude, Rounding rounding) {
  if (magnitude == 0) return 0;
  const int smallest_exponent = 1 - format.bias;
  const int exponent = std::max(std::ilogb(magnitude), smallest_exponent);
  const double scaled = std::ldexp(magnitude, format.mantissa_bits - exponent);
  const auto integer = static_cast<uint32_t>(round_to_integer(scaled, rounding));
  // A carry out of the mantissa raises the exponent by itself; a denormal has no implicit bit.
  return integer + (static_cast<uint32_t>(exponent - smallest_exponent) << format.mantissa_bits);
}

const Format& format_of(Small format) { return format == Small::kFp8 ? kFp8 : kBf8; }

float decode_small(const Format& format, uint8_t value) {
  if (value == 0x80) return std::nanf("");
  const int mantissa = value & ((1 << format.mantissa_bits) - 1);
  const int exponent = (value & 0x7f) >> format.mantissa_bits;
  const int implicit = exponent == 0 ? 0 : 1 << format.mantissa_bits;
  const int scale = std::max(exponent, 1) - format.bias - format.mantissa_bits;
  const double magnitude = std::ldexp(mantissa + implicit, scale);
  return static_cast<float>(value & 0x80 ? -magnitude : magnitude);
}

std::array<float, 256> table_of(const Format& format) {
  std::array<float, 256> table;
  for (int value = 0; value < 256; ++value) {
    table[value] = decode_small(format, static_cast<uint8_t>(value));
  }
  return table;
}

constexpr uint8_t kSmallNan = 0x80;

uint8_t finish_small(const Format& format, double value, uint32_t magnitude, bool saturate) {
  const uint32_t largest = encode(format, format.largest, Rounding::kNearest);
  if (magnitude > largest) {
    if (!saturate) return kSmallNan;
    magnitude = largest;
  }
  // There is no negative zero: its encoding is the NaN.
  if (magnitude == 0) return 0;
  return static_cast<uint8_t>(magnitude | (std::signbit(value) ? 0x80 : 0));
}

}  // namespace

uint16_t double_to_half(double value, Rounding rounding) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return sign | 0x7e00;
  if (std::isinf(value)) return sign | 0x7c00;
  if (sign != 0 && rounding == Rounding::kUp) {
    rounding = Rounding::kZero;
  } else if (sign != 0 && rounding == Rounding::kDown) {
    rounding = Rounding::kUp;
  }
  const uint32_t magnitude = encode(kHalf, std::fabs(value), rounding);
  if (magnitude < 0x7c00) return static_cast<uint16_t>(sign | magnitude);
  const bool towards_zero = rounding == Rounding::kZero || rounding == Rounding::kDown;
  return sign | (towards_zero ? 0x7bff : 0x7c00);
}

uint16_t float_to_half(float value, Rounding rounding) {
#ifdef __F16C__
  if (rounding == Rounding::kZero) return _cvtss_sh(value, _MM_FROUND_TO_ZERO);
#endif
  return double_to_half(value, rounding);
}

uint16_t double_to_half(double value) {
  switch (std::fegetround()) {
    case FE_UPWARD:
      return double_to_half(value, Rounding::kUp);
    case FE_DOWNWARD:
      return double_to_half(value, Rounding::kDown);
    case FE_TOWARDZERO:
      return double_to_half(value, Rounding::kZero);
  }
  return double_to_half(value, Rounding::kNearest);
}

uint16_t float_to_half(float value) {
#ifdef __F16C__
  return _cvtss_sh(value, _MM_FROUND_CUR_DIRECTION);
#else
  return double_to_half(value);
#endif
}

uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float small_to_float(Small format, uint8_t value) {
  static const std::array<float, 256> fp8 = table_of(kFp8);
  static const std::array<float, 256> bf8 = table_of(kBf8);
  return (format == Small::kFp8 ? fp8 : bf8)[value];
}

uint8_t float_to_small(Small small, float value, bool saturate) {
  if (std::isnan(value)) return kSmallNan;
  const Format& format = format_of(small);
  if (std::isinf(value)) return finish_small(format, value, UINT32_MAX, saturate);
  const uint32_t magnitude = encode(format, std::fabs(double{value}), Rounding::kNearest);
  return finish_small(format, value, magnitude, saturate);
}

uint8_t float_to_small_stochastic(Small small, float value, uint32_t random, bool saturate) {
  if (std::isnan(value)) return kSmallNan;
  const Format& format = format_of(small);
  if (std::isinf(value)) return finish_small(format, value, UINT32_MAX, saturate);
  // The random number's upper bits are added below the last bit that is kept, then the rest is cut
  // off.
  const double magnitude = std::fabs(double{value});
  const int exponent =
      magnitude == 0 ? 1 - format.bias : std::max(std::ilogb(magnitude), 1 - format.bias);
  const int discarded = 23 - format.mantissa_bits;
  const double dither = std::ldexp(static_cast<double>(random >> (32 - discarded)), exponent - 23);
  return finish_small(format, value, encode(format, magnitude + dither, Rounding::kZero), saturate);
}

}  // namespace gfx942
