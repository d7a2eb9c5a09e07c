// Arithmetic on halves: computed as floats, or as doubles where a float would round twice.
#pragma once

#include <cmath>

#include "convert.h"

namespace gfx942 {

inline Half half(float value) { return Half(float_to_half(value)); }

// The product of two halves is exact as a double, and so is its sum with a third as far as rounding
// sees.
inline Half fused(Half a, Half b, Half c) {
  return Half(double_to_half(double{float{a}} * float{b} + double{float{c}}));
}

// A NaN loses against a number, and -0 is smaller than +0.
inline Half smaller(Half x, Half y) {
  const float a = x;
  const float b = y;
  if (std::isnan(a)) return y;
  if (std::isnan(b)) return x;
  if (a == b) return std::signbit(a) ? x : y;
  return a < b ? x : y;
}
inline Half larger(Half x, Half y) {
  const float a = x;
  const float b = y;
  if (std::isnan(a)) return y;
  if (std::isnan(b)) return x;
  if (a == b) return std::signbit(a) ? y : x;
  return a < b ? y : x;
}

}  // namespace gfx942
