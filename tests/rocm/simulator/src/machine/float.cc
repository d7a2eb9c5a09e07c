// Vector arithmetic on floats and doubles.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>

#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

using u32 = uint32_t;
using i32 = int32_t;

// A NaN loses against a number, and -0 is smaller than +0.
template <class T>
T smaller(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a < b ? b : a;
}
template <class T>
T median(T a, T b, T c) {
  if (std::isnan(a) || std::isnan(b) || std::isnan(c)) return smaller(smaller(a, b), c);
  return larger(smaller(a, b), smaller(larger(a, b), c));
}

// Zero times anything is zero.
float legacy_product(float a, float b) { return a == 0 || b == 0 ? 0.0f : a * b; }

template <class T>
T fraction(T value) {
  const T rest = value - std::floor(value);
  // The largest fraction stays below one; -tiny would round to it.
  const T largest = T{1} - std::numeric_limits<T>::epsilon() / 2;
  return std::isnan(rest) ? rest : std::min(rest, largest);
}

template <class T>
T scale(T value, i32 exponent) {
  return std::scalbn(value, std::clamp(exponent, -8192, 8191));
}

template <class T>
T mantissa(T value) {
  int exponent = 0;
  return std::isfinite(value) ? std::frexp(value, &exponent) : value;
}
template <class T>
i32 exponent(T value) {
  int result = 0;
  if (std::isfinite(value)) std::frexp(value, &result);
  return result;
}

// Sine and cosine take revolutions, up to 256 of them.
float sine(float turns) {
  if (std::fabs(turns) > 256) return 0;
  return static_cast<float>(std::sin(double{turns} * 2 * std::numbers::pi));
}
float cosine(float turns) {
  if (std::fabs(turns) > 256) return 1;
  return static_cast<float>(std::cos(double{turns} * 2 * std::numbers::pi));
}

// Whatever the rounding mode is.
float round_to_even(float value) { return __builtin_roundevenf(value); }
double round_to_even(double value) { return __builtin_roundeven(value); }

float exp2_of(float value) { return static_cast<float>(std::exp2(double{value})); }
float log2_of(float value) { return static_cast<float>(std::log2(double{value})); }
float reciprocal_root(float value) { return static_cast<float>(1 / std::sqrt(double{value})); }

// By the exponents as they are encoded, in which all denormals have the same.
template <class T>
bool underflows(T numerator, T denominator) {
  using Limits = std::numeric_limits<T>;
  const auto encoded = [](T value) {
    return std::fabs(value) < Limits::min() ? Limits::min_exponent - 2 : exponent(value);
  };
  return encoded(numerator) - encoded(denominator) < Limits::min_exponent - Limits::digits - 1;
}

// The special cases of a division whose quotient was refined by Newton steps: quotient,
// denominator, numerator.
template <class T>
T fix_quotient(T quotient, T denominator, T numerator) {
  const bool negative = std::signbit(denominator) != std::signbit(numerator);
  const T infinity = std::numeric_limits<T>::infinity();
  if (std::isnan(numerator)) return numerator;
  if (std::isnan(denominator)) return denominator;
  if ((numerator == 0 && denominator == 0) || (std::isinf(numerator) && std::isinf(denominator))) {
    return std::numeric_limits<T>::quiet_NaN();
  }
  T magnitude = std::fabs(quotient);
  if (denominator == 0 || std::isinf(numerator)) {
    magnitude = infinity;
  } else if (std::isinf(denominator) || numerator == 0 || underflows<T>(numerator, denominator)) {
    magnitude = 0;
  } else if (std::isnan(quotient)) {
    // The refinement of a quotient that overflows subtracts infinities.
    magnitude = infinity;
  }
  return negative ? -magnitude : magnitude;
}

// Moves the operands of a division away from overflow and denormals; the flag says that the
// quotient must be scaled back. Sources: what is scaled, denominator, numerator.
template <class T>
struct Scaled {
  T value;
  bool flag;
};
template <class T>
Scaled<T> scale_division(T source, T denominator, T numerator) {
  using Limits = std::numeric_limits<T>;
  constexpr i32 kStep = std::is_same_v<T, float> ? 64 : 128;
  constexpr i32 kFarLarger = std::is_same_v<T, float> ? 96 : 768;
  if (numerator == 0 || denominator == 0) return {Limits::quiet_NaN(), false};
  const auto denormal = [](T value) { return std::fabs(value) < Limits::min(); };
  const bool denormal_reciprocal = denormal(T{1} / denominator);
  const bool denormal_quotient = denormal(numerator / denominator);
  if (exponent(numerator) - exponent(denominator) >= kFarLarger) {
    return {source == denominator ? scale(source, kStep) : source, true};
  }
  if (denormal(denominator)) return {scale(source, kStep), false};
  if (denormal_reciprocal && denormal_quotient) {
    // Documents say that the denominator, which is huge here, is scaled up; only down makes sense.
    return {source == denominator ? scale(source, -kStep) : source, true};
  }
  if (denormal_reciprocal) return {scale(source, -kStep), false};
  if (denormal_quotient) return {source == numerator ? scale(source, kStep) : source, true};
  const bool tiny_numerator = exponent(numerator) < Limits::min_exponent + Limits::digits - 1;
  return {tiny_numerator ? scale(source, kStep) : source, false};
}

template <class T>
void division_scale(Wave& wave, const Instruction& i) {
  const Source<T> source(wave, i, 2, 0);
  const Source<T> denominator(wave, i, 3, 1);
  const Source<T> numerator(wave, i, 4, 2);
  const FloatScope scope = scope_of<T>(wave);
  alignas(64) T result[kLanes];
  uint64_t flags = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Scaled<T> scaled =
        scale_division(source.data[lane], denominator.data[lane], numerator.data[lane]);
    result[lane] = scaled.value;
    flags |= uint64_t{scaled.flag} << lane;
  }
  write_result(wave, i, result, wave.exec());
  wave.write_scalar_pair(i.operand[1], flags & wave.exec());
}

template <class T>
using Wider = std::conditional_t<std::is_same_v<T, float>, double, __float128>;

// The last step of a division: scaled back where VCC says so.
template <class T>
void division_fma(Wave& wave, const Instruction& i) {
  constexpr i32 kStep = std::is_same_v<T, float> ? 64 : 128;
  const Source<T> a(wave, i, 1, 0);
  const Source<T> b(wave, i, 2, 1);
  const Source<T> c(wave, i, 3, 2);
  const FloatScope scope = scope_of<T>(wave);
  alignas(64) T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((wave.vcc() >> lane & 1) == 0) {
      result[lane] = std::fma(a.data[lane], b.data[lane], c.data[lane]);
      continue;
    }
    // Towards which side follows from the addend, whose magnitude is the quotient's. In a wider
    // type the scaled sum is rounded once only, also where it is denormal.
    const Wider<T> sum = static_cast<Wider<T>>(a.data[lane]) * b.data[lane] + c.data[lane];
    const int step = exponent(c.data[lane]) > 0 ? kStep : -kStep;
    result[lane] = static_cast<T>(sum * static_cast<Wider<T>>(scale(T{1}, step)));
  }
  write_result(wave, i, result, wave.exec());
}

double trigonometric_preoperation(double value, i32 segment) {
  // The first 1201 bits of 2/pi, which fix how much of a huge argument matters.
  static constexpr u32 kTwoOverPi[] = {
      0xa2f9836e, 0x4e441529, 0xfc2757d1, 0xf534ddc0, 0xdb629599, 0x3c439041, 0xfe5163ab,
      0xdebbc561, 0xb7246e3a, 0x424dd2e0, 0x06492eea, 0x09d1921c, 0xfe1deb1c, 0xb129a73e,
      0xe88235f5, 0x2ebb4484, 0xe99c7026, 0xb45f7e41, 0x3991d639, 0x835339f4, 0x9c845f8b,
      0xbdf9283b, 0x1ff897ff, 0xde05980f, 0xef2f118b, 0x5a0a6d1f, 0x6d367ecf, 0x27cb09b7,
      0x4f463f66, 0x9e5fea2d, 0x7527bac7, 0xebe5f17b, 0x3d0739f7, 0x8a5292ea, 0x6bfb5fb1,
      0x1f8d5d08, 0x56033046, 0xfc7b0000};
  const auto biased = static_cast<i32>(std::bit_cast<uint64_t>(value) >> 52 & 0x7ff);
  i32 shift = (segment & 31) * 53;
  if (biased > 1077) shift += biased - 1077;
  double bits = 0;
  for (i32 k = 0; k < 53; ++k) {
    const i32 position = shift + k;
    const u32 word = position / 32 < 38 ? kTwoOverPi[position / 32] : 0;
    bits = 2 * bits + static_cast<double>(word >> (31 - position % 32) & 1);
  }
  i32 scaling = -53 - shift;
  if (biased >= 1968) scaling += 128;
  return std::scalbn(bits, scaling);
}

constexpr Semantics kTable[] = {
    {"v_add_f32", each<[](float a, float b) { return a + b; }>},
    {"v_sub_f32", each<[](float a, float b) { return a - b; }>},
    {"v_subrev_f32", each<[](float a, float b) { return b - a; }>},
    {"v_mul_f32", each<[](float a, float b) { return a * b; }>},
    {"v_mul_legacy_f32", each<[](float a, float b) { return legacy_product(a, b); }>},
    {"v_min_f32", each<[](float a, float b) { return smaller(a, b); }>},
    {"v_max_f32", each<[](float a, float b) { return larger(a, b); }>},
    {"v_fma_f32", each<[](float a, float b, float c) { return std::fma(a, b, c); }>},
    {"v_mad_f32", each<[](float a, float b, float c) { return a * b + c; }>},
    {"v_mad_legacy_f32", each<[](float a, float b, float c) { return legacy_product(a, b) + c; }>},
    {"v_fmac_f32", each_tied<[](float a, float b, float c) { return std::fma(a, b, c); }>},
    {"v_mac_f32", each_tied<[](float a, float b, float c) { return a * b + c; }>},
    {"v_fmaak_f32", each<[](float a, float b, float k) { return std::fma(a, b, k); }>},
    {"v_fmamk_f32", each<[](float a, float k, float b) { return std::fma(a, k, b); }>},
    {"v_madak_f32", each<[](float a, float b, float k) { return a * b + k; }>},
    {"v_madmk_f32", each<[](float a, float k, float b) { return a * k + b; }>},
    {"v_min3_f32", each<[](float a, float b, float c) { return smaller(smaller(a, b), c); }>},
    {"v_max3_f32", each<[](float a, float b, float c) { return larger(larger(a, b), c); }>},
    {"v_med3_f32", each<[](float a, float b, float c) { return median(a, b, c); }>},
    {"v_fract_f32", each<[](float a) { return fraction(a); }>},
    {"v_trunc_f32", each<[](float a) { return std::trunc(a); }>},
    {"v_ceil_f32", each<[](float a) { return std::ceil(a); }>},
    {"v_rndne_f32", each<[](float a) { return round_to_even(a); }>},
    {"v_floor_f32", each<[](float a) { return std::floor(a); }>},
    {"v_exp_f32", each<[](float a) { return exp2_of(a); }>},
    {"v_log_f32", each<[](float a) { return log2_of(a); }>},
    {"v_exp_legacy_f32", each<[](float a) { return exp2_of(a); }>},
    {"v_log_legacy_f32", each<[](float a) { return log2_of(a); }>},
    {"v_rcp_f32", each<[](float a) { return 1 / a; }>},
    {"v_rcp_iflag_f32", each<[](float a) { return 1 / a; }>},
    {"v_rsq_f32", each<[](float a) { return reciprocal_root(a); }>},
    {"v_sqrt_f32", each<[](float a) { return std::sqrt(a); }>},
    {"v_sin_f32", each<[](float a) { return sine(a); }>},
    {"v_cos_f32", each<[](float a) { return cosine(a); }>},
    {"v_ldexp_f32", each<[](float a, i32 b) { return scale(a, b); }>},
    {"v_frexp_mant_f32", each<[](float a) { return mantissa(a); }>},
    {"v_frexp_exp_i32_f32", each<[](float a) { return exponent(a); }>},
    {"v_div_fixup_f32", each<[](float a, float b, float c) { return fix_quotient(a, b, c); }>},
    {"v_div_fixup_f64", each<[](double a, double b, double c) { return fix_quotient(a, b, c); }>},
    {"v_div_scale_f32", division_scale<float>},
    {"v_div_scale_f64", division_scale<double>},
    {"v_div_fmas_f32", division_fma<float>},
    {"v_div_fmas_f64", division_fma<double>},

    {"v_add_f64", each<[](double a, double b) { return a + b; }>},
    {"v_mul_f64", each<[](double a, double b) { return a * b; }>},
    {"v_min_f64", each<[](double a, double b) { return smaller(a, b); }>},
    {"v_max_f64", each<[](double a, double b) { return larger(a, b); }>},
    {"v_fma_f64", each<[](double a, double b, double c) { return std::fma(a, b, c); }>},
    {"v_fmac_f64", each_tied<[](double a, double b, double c) { return std::fma(a, b, c); }>},
    {"v_fract_f64", each<[](double a) { return fraction(a); }>},
    {"v_trunc_f64", each<[](double a) { return std::trunc(a); }>},
    {"v_ceil_f64", each<[](double a) { return std::ceil(a); }>},
    {"v_rndne_f64", each<[](double a) { return round_to_even(a); }>},
    {"v_floor_f64", each<[](double a) { return std::floor(a); }>},
    {"v_rcp_f64", each<[](double a) { return 1 / a; }>},
    {"v_rsq_f64", each<[](double a) { return 1 / std::sqrt(a); }>},
    {"v_sqrt_f64", each<[](double a) { return std::sqrt(a); }>},
    {"v_ldexp_f64", each<[](double a, i32 b) { return scale(a, b); }>},
    {"v_frexp_mant_f64", each<[](double a) { return mantissa(a); }>},
    {"v_frexp_exp_i32_f64", each<[](double a) { return exponent(a); }>},
    {"v_trig_preop_f64", each<[](double a, i32 b) { return trigonometric_preoperation(a, b); }>},
};

}  // namespace

Table float_table() { return kTable; }

}  // namespace gfx942
