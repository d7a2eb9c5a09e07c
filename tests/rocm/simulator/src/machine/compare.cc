// Vector comparisons: one bit for each lane.
#include <cmath>

#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

// Bits of the class mask, from the lowest.
template <class T>
uint32_t class_of(T value, bool signalling, T smallest_normal) {
  if (std::isnan(value)) return signalling ? 1 << 0 : 1 << 1;
  const bool negative = std::signbit(value);
  const T magnitude = std::fabs(value);
  if (std::isinf(value)) return negative ? 1 << 2 : 1 << 9;
  if (magnitude == 0) return negative ? 1 << 5 : 1 << 6;
  if (magnitude < smallest_normal) return negative ? 1 << 4 : 1 << 7;
  return negative ? 1 << 3 : 1 << 8;
}

bool is_class(float value, uint32_t mask) {
  const bool signalling = (std::bit_cast<uint32_t>(value) >> 22 & 1) == 0;
  return (class_of(value, signalling, 0x1p-126f) & mask) != 0;
}
bool is_class(double value, uint32_t mask) {
  const bool signalling = (std::bit_cast<uint64_t>(value) >> 51 & 1) == 0;
  return (class_of(value, signalling, 0x1p-1022) & mask) != 0;
}
bool is_class(Half value, uint32_t mask) {
  const bool signalling = (value.bits >> 9 & 1) == 0;
  return (class_of(float{value}, signalling, 0x1p-14f) & mask) != 0;
}

template <class T>
bool unordered(T a, T b) {
  return std::isnan(a) || std::isnan(b);
}

#define GFX942_BOTH(name, function) \
  {"v_cmp_" name, function}, { "v_cmpx_" name, function }

#define GFX942_COMPARE_INTEGERS(suffix, T)                                \
  GFX942_BOTH("f_" suffix, (each<[](T, T) { return false; }>)),           \
      GFX942_BOTH("lt_" suffix, (each<[](T a, T b) { return a < b; }>)),  \
      GFX942_BOTH("eq_" suffix, (each<[](T a, T b) { return a == b; }>)), \
      GFX942_BOTH("le_" suffix, (each<[](T a, T b) { return a <= b; }>)), \
      GFX942_BOTH("gt_" suffix, (each<[](T a, T b) { return b < a; }>)),  \
      GFX942_BOTH("ne_" suffix, (each<[](T a, T b) { return a != b; }>)), \
      GFX942_BOTH("ge_" suffix, (each<[](T a, T b) { return b <= a; }>)), \
      GFX942_BOTH("t_" suffix, (each<[](T, T) { return true; }>))

// The forms with an n are true for NaNs.
#define GFX942_COMPARE_FLOATS(suffix, T, V)                                                 \
  GFX942_BOTH("f_" suffix, (each<[](T, T) { return false; }>)),                             \
      GFX942_BOTH("lt_" suffix, (each<[](T a, T b) { return V(a) < V(b); }>)),              \
      GFX942_BOTH("eq_" suffix, (each<[](T a, T b) { return V(a) == V(b); }>)),             \
      GFX942_BOTH("le_" suffix, (each<[](T a, T b) { return V(a) <= V(b); }>)),             \
      GFX942_BOTH("gt_" suffix, (each<[](T a, T b) { return V(b) < V(a); }>)),              \
      GFX942_BOTH("lg_" suffix,                                                             \
                  (each<[](T a, T b) { return V(a) != V(b) && !unordered(V(a), V(b)); }>)), \
      GFX942_BOTH("ge_" suffix, (each<[](T a, T b) { return V(b) <= V(a); }>)),             \
      GFX942_BOTH("o_" suffix, (each<[](T a, T b) { return !unordered(V(a), V(b)); }>)),    \
      GFX942_BOTH("u_" suffix, (each<[](T a, T b) { return unordered(V(a), V(b)); }>)),     \
      GFX942_BOTH("nge_" suffix, (each<[](T a, T b) { return !(V(b) <= V(a)); }>)),         \
      GFX942_BOTH("nlg_" suffix,                                                            \
                  (each<[](T a, T b) { return V(a) == V(b) || unordered(V(a), V(b)); }>)),  \
      GFX942_BOTH("ngt_" suffix, (each<[](T a, T b) { return !(V(b) < V(a)); }>)),          \
      GFX942_BOTH("nle_" suffix, (each<[](T a, T b) { return !(V(a) <= V(b)); }>)),         \
      GFX942_BOTH("neq_" suffix, (each<[](T a, T b) { return V(a) != V(b); }>)),            \
      GFX942_BOTH("nlt_" suffix, (each<[](T a, T b) { return !(V(a) < V(b)); }>)),          \
      GFX942_BOTH("tru_" suffix, (each<[](T, T) { return true; }>)),                        \
      GFX942_BOTH("class_" suffix, (each<[](T a, uint32_t b) { return is_class(a, b); }>))

constexpr Semantics kTable[] = {
    GFX942_COMPARE_INTEGERS("i16", int16_t),      GFX942_COMPARE_INTEGERS("u16", uint16_t),
    GFX942_COMPARE_INTEGERS("i32", int32_t),      GFX942_COMPARE_INTEGERS("u32", uint32_t),
    GFX942_COMPARE_INTEGERS("i64", int64_t),      GFX942_COMPARE_INTEGERS("u64", uint64_t),
    GFX942_COMPARE_FLOATS("f16", Half, float),    GFX942_COMPARE_FLOATS("f32", float, float),
    GFX942_COMPARE_FLOATS("f64", double, double),
};

}  // namespace

Table compare_table() { return kTable; }

}  // namespace gfx942
