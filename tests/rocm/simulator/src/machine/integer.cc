// Vector integer arithmetic that needs no more than its lane's operands.
#include <algorithm>
#include <bit>

#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

using u8 = uint8_t;
using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

u32 low24(u32 value) { return value & 0xffffff; }
i32 signed24(i32 value) { return i32(u32(value) << 8) >> 8; }
u32 byte_of(u64 value, u32 number) { return u32(value >> 8 * number) & 0xff; }

u32 extract(u32 value, u32 offset, u32 width) {
  return value >> (offset & 31) & ((1u << (width & 31)) - 1);
}
i32 extract_signed(i32 value, u32 offset, u32 width) {
  width &= 31;
  if (width == 0) return 0;
  const i32 shifted = value >> (offset & 31);
  return i32(u32(shifted) << (32 - width)) >> (32 - width);
}

u32 reverse_bits(u32 value) {
  u32 out = 0;
  for (int k = 0; k < 32; ++k) out |= (value >> k & 1) << (31 - k);
  return out;
}

// The number of equal leading bits below the sign, or -1 for 0 and -1.
i32 leading_sign_bits(i32 value) {
  const u32 folded = u32(value < 0 ? ~value : value);
  return folded == 0 ? -1 : std::countl_zero(folded);
}

template <class T>
T median(T a, T b, T c) {
  return std::max(std::min(a, b), std::min(std::max(a, b), c));
}

u32 absolute_difference(u32 a, u32 b) { return a > b ? a - b : b - a; }

u32 sum_of_differences(u32 a, u32 b, u32 sum, bool masked) {
  for (u32 k = 0; k < 4; ++k) {
    // The masked form leaves out bytes that are zero in the reference.
    if (masked && byte_of(b, k) == 0) continue;
    sum += absolute_difference(byte_of(a, k), byte_of(b, k));
  }
  return sum;
}

// Four 16-bit sums of the 4 bytes of b against the 4 windows that start at each byte of a's lower
// half.
u64 windows(u64 a, u32 b, u64 sums, bool masked) {
  u64 out = 0;
  for (u32 k = 0; k < 4; ++k) {
    const u32 sum = sum_of_differences(u32(a >> 8 * k), b, u32(sums >> 16 * k) & 0xffff, masked);
    out |= u64{sum & 0xffff} << 16 * k;
  }
  return out;
}

// Each byte of the selector names one of eight bytes, a sign or a constant.
u32 permute_bytes(u32 high, u32 low, u32 selector) {
  const u64 bytes = u64{high} << 32 | low;
  u32 out = 0;
  for (u32 k = 0; k < 4; ++k) {
    const u32 select = byte_of(selector, k);
    u32 value = 0xff;
    if (select < 8) {
      value = byte_of(bytes, select);
    } else if (select < 12) {
      value = byte_of(bytes, 2 * (select - 8) + 1) >> 7 != 0 ? 0xff : 0;
    } else if (select == 12) {
      value = 0;
    }
    out |= value << 8 * k;
  }
  return out;
}

u32 average_bytes(u32 a, u32 b, u32 round) {
  u32 out = 0;
  for (u32 k = 0; k < 4; ++k) {
    out |= ((byte_of(a, k) + byte_of(b, k) + (byte_of(round, k) & 1)) >> 1) << 8 * k;
  }
  return out;
}

template <class T, unsigned bits>
i64 dot(u32 a, u32 b) {
  i64 sum = 0;
  for (unsigned k = 0; k < 32; k += bits) {
    // At the top of the word, the shift back extends the sign of signed types.
    const i64 x = T(a << (32 - bits - k)) >> (32 - bits);
    const i64 y = T(b << (32 - bits - k)) >> (32 - bits);
    sum += x * y;
  }
  return sum;
}

constexpr Handler kMove = each<[](u32 a) { return a; }>;
constexpr Handler kMultiplyLow = each<[](u32 a, u32 b) { return a * b; }>;

constexpr Semantics kTable[] = {
    {"v_mov_b32", kMove},
    {"v_accvgpr_read_b32", kMove},
    {"v_accvgpr_write_b32", kMove},
    {"v_accvgpr_mov_b32", kMove},
    {"v_mov_b64", each<[](u64 a) { return a; }>},
    {"v_not_b32", each<[](u32 a) { return ~a; }>},
    {"v_bfrev_b32", each<[](u32 a) { return reverse_bits(a); }>},
    {"v_ffbh_u32", each<[](u32 a) { return a == 0 ? -1 : std::countl_zero(a); }>},
    {"v_ffbl_b32", each<[](u32 a) { return a == 0 ? -1 : std::countr_zero(a); }>},
    {"v_ffbh_i32", each<[](i32 a) { return leading_sign_bits(a); }>},
    {"v_sat_pk_u8_i16", each<[](u32 a) {
       const auto saturate = [](i16 v) { return u32(std::clamp<int>(v, 0, 255)); };
       return saturate(i16(a)) | saturate(i16(a >> 16)) << 8;
     }>},

    {"v_add_u32", each<[](u32 a, u32 b) { return Wide<u32>(i64{a} + b); }>},
    {"v_sub_u32", each<[](u32 a, u32 b) { return Wide<u32>(i64{a} - b); }>},
    {"v_subrev_u32", each<[](u32 a, u32 b) { return Wide<u32>(i64{b} - a); }>},
    {"v_add_i32", each<[](i32 a, i32 b) { return Wide<i32>(i64{a} + b); }>},
    {"v_sub_i32", each<[](i32 a, i32 b) { return Wide<i32>(i64{a} - b); }>},
    {"v_mul_i32_i24", each<[](i32 a, i32 b) { return u32(signed24(a)) * u32(signed24(b)); }>},
    {"v_mul_u32_u24", each<[](u32 a, u32 b) { return low24(a) * low24(b); }>},
    {"v_mul_hi_i32_i24",
     each<[](i32 a, i32 b) { return i32(i64{signed24(a)} * signed24(b) >> 32); }>},
    {"v_mul_hi_u32_u24", each<[](u32 a, u32 b) { return u32(u64{low24(a)} * low24(b) >> 32); }>},
    {"v_mul_lo_u32", kMultiplyLow},
    {"v_mul_lo_i32", kMultiplyLow},
    {"v_mul_hi_u32", each<[](u32 a, u32 b) { return u32(u64{a} * b >> 32); }>},
    {"v_mul_hi_i32", each<[](i32 a, i32 b) { return i32(i64{a} * b >> 32); }>},
    {"v_min_i32", each<[](i32 a, i32 b) { return std::min(a, b); }>},
    {"v_max_i32", each<[](i32 a, i32 b) { return std::max(a, b); }>},
    {"v_min_u32", each<[](u32 a, u32 b) { return std::min(a, b); }>},
    {"v_max_u32", each<[](u32 a, u32 b) { return std::max(a, b); }>},
    {"v_and_b32", each<[](u32 a, u32 b) { return a & b; }>},
    {"v_or_b32", each<[](u32 a, u32 b) { return a | b; }>},
    {"v_xor_b32", each<[](u32 a, u32 b) { return a ^ b; }>},
    {"v_xnor_b32", each<[](u32 a, u32 b) { return ~(a ^ b); }>},
    {"v_lshlrev_b32", each<[](u32 a, u32 b) { return b << (a & 31); }>},
    {"v_lshrrev_b32", each<[](u32 a, u32 b) { return (b >> (a & 31)); }>},
    {"v_ashrrev_i32", each<[](u32 a, i32 b) { return (b >> (a & 31)); }>},
    {"v_lshlrev_b64", each<[](u32 a, u64 b) { return b << (a & 63); }>},
    {"v_lshrrev_b64", each<[](u32 a, u64 b) { return (b >> (a & 63)); }>},
    {"v_ashrrev_i64", each<[](u32 a, i64 b) { return (b >> (a & 63)); }>},
    {"v_bfm_b32", each<[](u32 a, u32 b) { return ((1u << (a & 31)) - 1) << (b & 31); }>},
    {"v_bcnt_u32_b32", each<[](u32 a, u32 b) { return u32(std::popcount(a)) + b; }>},

    {"v_bfe_u32", each<[](u32 a, u32 b, u32 c) { return extract(a, b, c); }>},
    {"v_bfe_i32", each<[](i32 a, u32 b, u32 c) { return extract_signed(a, b, c); }>},
    {"v_bfi_b32", each<[](u32 a, u32 b, u32 c) { return (a & b) | (~a & c); }>},
    {"v_alignbit_b32",
     each<[](u32 a, u32 b, u32 c) { return u32((u64{a} << 32 | b) >> (c & 31)); }>},
    {"v_alignbyte_b32",
     each<[](u32 a, u32 b, u32 c) { return u32((u64{a} << 32 | b) >> 8 * (c & 3)); }>},
    {"v_perm_b32", each<[](u32 a, u32 b, u32 c) { return permute_bytes(a, b, c); }>},
    {"v_lerp_u8", each<[](u32 a, u32 b, u32 c) { return average_bytes(a, b, c); }>},
    {"v_mad_i32_i24",
     each<[](i32 a, i32 b, i32 c) { return Wide<i32>(i64{signed24(a)} * signed24(b) + c); }>},
    {"v_mad_u32_u24",
     each<[](u32 a, u32 b, u32 c) { return Wide<u32>(i64(u64{low24(a)} * low24(b) + c)); }>},
    {"v_min3_i32", each<[](i32 a, i32 b, i32 c) { return std::min({a, b, c}); }>},
    {"v_min3_u32", each<[](u32 a, u32 b, u32 c) { return std::min({a, b, c}); }>},
    {"v_max3_i32", each<[](i32 a, i32 b, i32 c) { return std::max({a, b, c}); }>},
    {"v_max3_u32", each<[](u32 a, u32 b, u32 c) { return std::max({a, b, c}); }>},
    {"v_med3_i32", each<[](i32 a, i32 b, i32 c) { return median(a, b, c); }>},
    {"v_med3_u32", each<[](u32 a, u32 b, u32 c) { return median(a, b, c); }>},
    {"v_add3_u32", each<[](u32 a, u32 b, u32 c) { return a + b + c; }>},
    {"v_add_lshl_u32", each<[](u32 a, u32 b, u32 c) { return (a + b) << (c & 31); }>},
    {"v_lshl_add_u32", each<[](u32 a, u32 b, u32 c) { return (a << (b & 31)) + c; }>},
    {"v_lshl_add_u64", each<[](u64 a, u32 b, u64 c) { return (a << (b & 7)) + c; }>},
    {"v_lshl_or_b32", each<[](u32 a, u32 b, u32 c) { return a << (b & 31) | c; }>},
    {"v_and_or_b32", each<[](u32 a, u32 b, u32 c) { return (a & b) | c; }>},
    {"v_or3_b32", each<[](u32 a, u32 b, u32 c) { return a | b | c; }>},
    {"v_xad_u32", each<[](u32 a, u32 b, u32 c) { return (a ^ b) + c; }>},
    {"v_sad_u8", each<[](u32 a, u32 b, u32 c) { return sum_of_differences(a, b, c, false); }>},
    {"v_msad_u8", each<[](u32 a, u32 b, u32 c) { return sum_of_differences(a, b, c, true); }>},
    {"v_sad_hi_u8",
     each<[](u32 a, u32 b, u32 c) { return (sum_of_differences(a, b, 0, false) << 16) + c; }>},
    {"v_sad_u16", each<[](u32 a, u32 b, u32 c) {
       return absolute_difference(a & 0xffff, b & 0xffff) + absolute_difference(a >> 16, b >> 16) +
              c;
     }>},
    {"v_sad_u32", each<[](u32 a, u32 b, u32 c) { return absolute_difference(a, b) + c; }>},
    {"v_qsad_pk_u16_u8", each<[](u64 a, u32 b, u64 c) { return windows(a, b, c, false); }>},
    {"v_mqsad_pk_u16_u8", each<[](u64 a, u32 b, u64 c) { return windows(a, b, c, true); }>},
    {"v_dot4_i32_i8", each<[](u32 a, u32 b, i32 c) { return Wide<i32>(dot<i32, 8>(a, b) + c); }>},
    {"v_dot4_u32_u8", each<[](u32 a, u32 b, u32 c) { return Wide<u32>(dot<u32, 8>(a, b) + c); }>},
    {"v_dot8_i32_i4", each<[](u32 a, u32 b, i32 c) { return Wide<i32>(dot<i32, 4>(a, b) + c); }>},
    {"v_dot8_u32_u4", each<[](u32 a, u32 b, u32 c) { return Wide<u32>(dot<u32, 4>(a, b) + c); }>},
    {"v_dot2_i32_i16", each<[](u32 a, u32 b, i32 c) { return Wide<i32>(dot<i32, 16>(a, b) + c); }>},
    {"v_dot2_u32_u16", each<[](u32 a, u32 b, u32 c) { return Wide<u32>(dot<u32, 16>(a, b) + c); }>},
    {"v_dot4c_i32_i8",
     each_tied<[](u32 a, u32 b, i32 c) { return Wide<i32>(dot<i32, 8>(a, b) + c); }>},
    {"v_dot8c_i32_i4",
     each_tied<[](u32 a, u32 b, i32 c) { return Wide<i32>(dot<i32, 4>(a, b) + c); }>},
    {"v_dot2c_i32_i16",
     each_tied<[](u32 a, u32 b, i32 c) { return Wide<i32>(dot<i32, 16>(a, b) + c); }>},

    {"v_add_u16", each<[](u16 a, u16 b) { return Wide<u16>(a + b); }>},
    {"v_sub_u16", each<[](u16 a, u16 b) { return Wide<u16>(a - b); }>},
    {"v_subrev_u16", each<[](u16 a, u16 b) { return Wide<u16>(b - a); }>},
    {"v_add_i16", each<[](i16 a, i16 b) { return Wide<i16>(a + b); }>},
    {"v_sub_i16", each<[](i16 a, i16 b) { return Wide<i16>(a - b); }>},
    {"v_mul_lo_u16", each<[](u16 a, u16 b) { return u16(u32{a} * b); }>},
    {"v_lshlrev_b16", each<[](u16 a, u16 b) { return u16(b << (a & 15)); }>},
    {"v_lshrrev_b16", each<[](u16 a, u16 b) { return u16(b >> (a & 15)); }>},
    {"v_ashrrev_i16", each<[](u16 a, i16 b) { return i16(b >> (a & 15)); }>},
    {"v_min_i16", each<[](i16 a, i16 b) { return std::min(a, b); }>},
    {"v_max_i16", each<[](i16 a, i16 b) { return std::max(a, b); }>},
    {"v_min_u16", each<[](u16 a, u16 b) { return std::min(a, b); }>},
    {"v_max_u16", each<[](u16 a, u16 b) { return std::max(a, b); }>},
    {"v_mad_u16", each<[](u16 a, u16 b, u16 c) { return Wide<u16>(i64{a} * b + c); }>},
    {"v_mad_i16", each<[](i16 a, i16 b, i16 c) { return Wide<i16>(i64{a} * b + c); }>},
    {"v_mad_legacy_u16",
     each_legacy<[](u16 a, u16 b, u16 c) { return Wide<u16>(i64{a} * b + c); }>},
    {"v_mad_legacy_i16",
     each_legacy<[](i16 a, i16 b, i16 c) { return Wide<i16>(i64{a} * b + c); }>},
    {"v_mad_u32_u16", each<[](u16 a, u16 b, u32 c) { return Wide<u32>(i64{a} * b + c); }>},
    {"v_mad_i32_i16", each<[](i16 a, i16 b, i32 c) { return Wide<i32>(i64{a} * b + c); }>},
    {"v_min3_i16", each<[](i16 a, i16 b, i16 c) { return std::min({a, b, c}); }>},
    {"v_min3_u16", each<[](u16 a, u16 b, u16 c) { return std::min({a, b, c}); }>},
    {"v_max3_i16", each<[](i16 a, i16 b, i16 c) { return std::max({a, b, c}); }>},
    {"v_max3_u16", each<[](u16 a, u16 b, u16 c) { return std::max({a, b, c}); }>},
    {"v_med3_i16", each<[](i16 a, i16 b, i16 c) { return median(a, b, c); }>},
    {"v_med3_u16", each<[](u16 a, u16 b, u16 c) { return median(a, b, c); }>},
};

}  // namespace

Table integer_table() { return kTable; }

}  // namespace gfx942
