// Vector arithmetic on halves.
#include "half.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

Half median(Half a, Half b, Half c) {
  if (std::isnan(a) || std::isnan(b) || std::isnan(c)) return smaller(smaller(a, b), c);
  return larger(smaller(a, b), smaller(larger(a, b), c));
}

Half fraction(Half a) {
  const float rest = float{a} - std::floor(float{a});
  const uint16_t below_one = 0x3bff;
  const Half rounded = half(rest);
  return float{rounded} >= 1 ? Half(below_one) : rounded;
}

int16_t exponent(Half a) {
  int result = 0;
  if (std::isfinite(float{a})) std::frexp(float{a}, &result);
  return static_cast<int16_t>(result);
}
Half mantissa(Half a) {
  int unused = 0;
  return std::isfinite(float{a}) ? half(std::frexp(float{a}, &unused)) : a;
}

float turns_to_radians(Half turns) { return float{turns} * 2 * std::numbers::pi_v<float>; }

// Quotient, denominator, numerator.
Half fix_quotient(Half quotient, Half denominator, Half numerator) {
  const float d = denominator;
  const float n = numerator;
  const uint16_t sign = (denominator.bits ^ numerator.bits) & 0x8000;
  if (std::isnan(n)) return numerator;
  if (std::isnan(d)) return denominator;
  if ((n == 0 && d == 0) || (std::isinf(n) && std::isinf(d))) return Half(uint16_t{0x7e00});
  if (d == 0 || std::isinf(n)) return Half(static_cast<uint16_t>(sign | 0x7c00));
  if (std::isinf(d) || n == 0) return Half(sign);
  if (std::isnan(float{quotient})) return Half(static_cast<uint16_t>(sign | 0x7c00));
  return Half(static_cast<uint16_t>(sign | (quotient.bits & 0x7fff)));
}

constexpr Handler kFusedTied = each_tied<[](Half a, Half b, Half c) { return fused(a, b, c); }>;
constexpr Handler kFused = each<[](Half a, Half b, Half c) { return fused(a, b, c); }>;

constexpr Semantics kTable[] = {
    {"v_add_f16", each<[](Half a, Half b) { return half(a + b); }>},
    {"v_sub_f16", each<[](Half a, Half b) { return half(a - b); }>},
    {"v_subrev_f16", each<[](Half a, Half b) { return half(b - a); }>},
    {"v_mul_f16", each<[](Half a, Half b) { return half(a * b); }>},
    {"v_min_f16", each<[](Half a, Half b) { return smaller(a, b); }>},
    {"v_max_f16", each<[](Half a, Half b) { return larger(a, b); }>},
    {"v_fma_f16", kFused},
    {"v_fmac_f16", kFusedTied},
    {"v_mad_f16", each<[](Half a, Half b, Half c) { return half(half(a * b) + c); }>},
    {"v_mac_f16", each_tied<[](Half a, Half b, Half c) { return half(half(a * b) + c); }>},
    {"v_madak_f16", each<[](Half a, Half b, Half k) { return half(half(a * b) + k); }>},
    {"v_madmk_f16", each<[](Half a, Half k, Half b) { return half(half(a * k) + b); }>},
    {"v_fma_legacy_f16", each_legacy<[](Half a, Half b, Half c) { return fused(a, b, c); }>},
    {"v_mad_legacy_f16", each_legacy<[](Half a, Half b, Half c) { return half(half(a * b) + c); }>},
    {"v_div_fixup_legacy_f16",
     each_legacy<[](Half a, Half b, Half c) { return fix_quotient(a, b, c); }>},
    {"v_min3_f16", each<[](Half a, Half b, Half c) { return smaller(smaller(a, b), c); }>},
    {"v_max3_f16", each<[](Half a, Half b, Half c) { return larger(larger(a, b), c); }>},
    {"v_med3_f16", each<[](Half a, Half b, Half c) { return median(a, b, c); }>},
    {"v_rcp_f16", each<[](Half a) { return half(1 / float{a}); }>},
    {"v_sqrt_f16", each<[](Half a) { return half(std::sqrt(float{a})); }>},
    {"v_rsq_f16", each<[](Half a) { return half(1 / std::sqrt(float{a})); }>},
    {"v_log_f16", each<[](Half a) { return half(std::log2(float{a})); }>},
    {"v_exp_f16", each<[](Half a) { return half(std::exp2(float{a})); }>},
    {"v_sin_f16", each<[](Half a) { return half(std::sin(turns_to_radians(a))); }>},
    {"v_cos_f16", each<[](Half a) { return half(std::cos(turns_to_radians(a))); }>},
    {"v_floor_f16", each<[](Half a) { return half(std::floor(float{a})); }>},
    {"v_ceil_f16", each<[](Half a) { return half(std::ceil(float{a})); }>},
    {"v_trunc_f16", each<[](Half a) { return half(std::trunc(float{a})); }>},
    {"v_rndne_f16", each<[](Half a) { return half(__builtin_roundevenf(float{a})); }>},
    {"v_fract_f16", each<[](Half a) { return fraction(a); }>},
    {"v_ldexp_f16", each<[](Half a, int16_t b) { return half(std::scalbn(float{a}, b)); }>},
    {"v_frexp_mant_f16", each<[](Half a) { return mantissa(a); }>},
    {"v_frexp_exp_i16_f16", each<[](Half a) { return exponent(a); }>},
    {"v_div_fixup_f16", each<[](Half a, Half b, Half c) { return fix_quotient(a, b, c); }>},
};

}  // namespace

Table half_table() { return kTable; }

}  // namespace gfx942
