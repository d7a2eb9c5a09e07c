// Conversions between number formats.
#include <algorithm>
#include <cmath>
#include <limits>

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

// Cut off towards zero; what is out of range becomes the nearest number and a NaN becomes zero.
template <class To, class From>
To integer_of(From value) {
  using Limits = std::numeric_limits<To>;
  if (std::isnan(value)) return 0;
  const double whole = std::trunc(static_cast<double>(value));
  if (whole <= static_cast<double>(Limits::min())) return Limits::min();
  if (whole >= static_cast<double>(Limits::max())) return Limits::max();
  return static_cast<To>(whole);
}

i16 normalised_i16(float value) {
  return integer_of<i16>(__builtin_roundevenf(std::clamp(value, -1.0f, 1.0f) * 32767.0f));
}
u16 normalised_u16(float value) {
  return integer_of<u16>(__builtin_roundevenf(std::clamp(value, 0.0f, 1.0f) * 65535.0f));
}

u32 pack(u16 low, u16 high) { return low | u32{high} << 16; }
u16 towards_zero(float value) { return float_to_half(value, Rounding::kZero); }

template <Small format>
u64 small_pair(u32 bytes) {
  const float low = small_to_float(format, static_cast<u8>(bytes));
  const float high = small_to_float(format, static_cast<u8>(bytes >> 8));
  return std::bit_cast<u32>(low) | u64{std::bit_cast<u32>(high)} << 32;
}

void half_of_float(Wave& wave, const Instruction& i) {
  const Source<float> source(wave, i, 1, 0);
  // The rounding is that of halves, although the source is a float.
  const FloatScope scope = FloatScope::other(wave);
  alignas(64) Half result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = Half(float_to_half(source.data[lane]));
  }
  write_result(wave, i, result, write_mask(wave, i));
}

bool saturates(const Wave& wave) { return (wave.mode & kModeFp16Overflow) != 0; }

// Two small floats into the half of the destination that op_sel names.
template <Small format>
void pack_small(Wave& wave, const Instruction& i) {
  const Source<float> a(wave, i, 1, 0);
  const Source<float> b(wave, i, 2, 1);
  u16 result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = static_cast<u16>(float_to_small(format, a.data[lane], saturates(wave)) |
                                    float_to_small(format, b.data[lane], saturates(wave)) << 8);
  }
  const bool high = (i.op_sel >> 2 & 1) != 0;
  write_halves(wave, i, result, wave.exec(), high ? Half16::kHigh : Half16::kLowPreserving);
}

// One stochastically rounded small float into the byte of the destination that op_sel names.
template <Small format>
void round_small(Wave& wave, const Instruction& i) {
  const Source<float> a(wave, i, 1, 0);
  const Source<u32> random(wave, i, 2, 1);
  u32* to = *wave.vector(i.operand[0].index);
  const unsigned shift = 8 * (i.op_sel >> 2 & 3u);
  for_lanes(wave.exec(), [&](int lane) {
    const u32 byte =
        float_to_small_stochastic(format, a.data[lane], random.data[lane], saturates(wave));
    to[lane] = (to[lane] & ~(0xffu << shift)) | byte << shift;
  });
}

// An unsigned byte of the old destination is replaced.
void pack_byte(Wave& wave, const Instruction& i) {
  const Source<float> a(wave, i, 1, 0);
  const Source<u32> position(wave, i, 2, 1);
  const Source<u32> old(wave, i, 3, 2);
  alignas(64) u32 result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const unsigned shift = 8 * (position.data[lane] & 3);
    const u32 byte = integer_of<u8>(a.data[lane]);
    result[lane] = (old.data[lane] & ~(0xffu << shift)) | byte << shift;
  }
  write_result(wave, i, result, wave.exec());
}

constexpr Semantics kTable[] = {
    {"v_cvt_f32_i32", each<[](i32 a) { return static_cast<float>(a); }>},
    {"v_cvt_f32_u32", each<[](u32 a) { return static_cast<float>(a); }>},
    {"v_cvt_f64_i32", each<[](i32 a) { return static_cast<double>(a); }>},
    {"v_cvt_f64_u32", each<[](u32 a) { return static_cast<double>(a); }>},
    {"v_cvt_i32_f32", each<[](float a) { return integer_of<i32>(a); }>},
    {"v_cvt_u32_f32", each<[](float a) { return integer_of<u32>(a); }>},
    {"v_cvt_i32_f64", each<[](double a) { return integer_of<i32>(a); }>},
    {"v_cvt_u32_f64", each<[](double a) { return integer_of<u32>(a); }>},
    {"v_cvt_f32_f64", each<[](double a) { return static_cast<float>(a); }>},
    {"v_cvt_f64_f32", each<[](float a) { return static_cast<double>(a); }>},
    {"v_cvt_rpi_i32_f32",
     each<[](float a) { return integer_of<i32>(std::floor(double{a} + 0.5)); }>},
    {"v_cvt_flr_i32_f32", each<[](float a) { return integer_of<i32>(std::floor(a)); }>},
    {"v_cvt_off_f32_i4", each<[](u32 a) { return static_cast<float>(i32(a << 28) >> 28) / 16; }>},
    {"v_cvt_f32_ubyte0", each<[](u32 a) { return static_cast<float>(a & 0xff); }>},
    {"v_cvt_f32_ubyte1", each<[](u32 a) { return static_cast<float>((a >> 8) & 0xff); }>},
    {"v_cvt_f32_ubyte2", each<[](u32 a) { return static_cast<float>((a >> 16) & 0xff); }>},
    {"v_cvt_f32_ubyte3", each<[](u32 a) { return static_cast<float>(a >> 24); }>},
    {"v_cvt_f16_f32", half_of_float},
    {"v_cvt_f32_f16", each<[](Half a) { return float{a}; }>},
    {"v_cvt_f16_i16", each<[](i16 a) { return Half(float_to_half(a)); }>},
    {"v_cvt_f16_u16", each<[](u16 a) { return Half(float_to_half(a)); }>},
    {"v_cvt_i16_f16", each<[](Half a) { return integer_of<i16>(float{a}); }>},
    {"v_cvt_u16_f16", each<[](Half a) { return integer_of<u16>(float{a}); }>},
    {"v_cvt_norm_i16_f16", each<[](Half a) { return normalised_i16(a); }>},
    {"v_cvt_norm_u16_f16", each<[](Half a) { return normalised_u16(a); }>},
    {"v_cvt_pkrtz_f16_f32",
     each<[](float a, float b) { return pack(towards_zero(a), towards_zero(b)); }>},
    {"v_cvt_pknorm_i16_f32",
     each<[](float a, float b) { return pack(u16(normalised_i16(a)), u16(normalised_i16(b))); }>},
    {"v_cvt_pknorm_u16_f32",
     each<[](float a, float b) { return pack(normalised_u16(a), normalised_u16(b)); }>},
    {"v_cvt_pknorm_i16_f16",
     each<[](Half a, Half b) { return pack(u16(normalised_i16(a)), u16(normalised_i16(b))); }>},
    {"v_cvt_pknorm_u16_f16",
     each<[](Half a, Half b) { return pack(normalised_u16(a), normalised_u16(b)); }>},
    {"v_cvt_pk_u16_u32",
     each<[](u32 a, u32 b) { return pack(u16(std::min(a, 0xffffu)), u16(std::min(b, 0xffffu))); }>},
    {"v_cvt_pk_i16_i32", each<[](i32 a, i32 b) {
       return pack(u16(std::clamp(a, -32768, 32767)), u16(std::clamp(b, -32768, 32767)));
     }>},
    {"v_cvt_pk_u8_f32", pack_byte},
    {"v_pack_b32_f16", each<[](Half a, Half b) { return pack(a.bits, b.bits); }>},
    {"v_cvt_f32_fp8", each<[](u32 a) { return small_to_float(Small::kFp8, u8(a)); }>},
    {"v_cvt_f32_bf8", each<[](u32 a) { return small_to_float(Small::kBf8, u8(a)); }>},
    {"v_cvt_pk_f32_fp8", each<[](u32 a) { return small_pair<Small::kFp8>(a); }>},
    {"v_cvt_pk_f32_bf8", each<[](u32 a) { return small_pair<Small::kBf8>(a); }>},
    {"v_cvt_pk_fp8_f32", pack_small<Small::kFp8>},
    {"v_cvt_pk_bf8_f32", pack_small<Small::kBf8>},
    {"v_cvt_sr_fp8_f32", round_small<Small::kFp8>},
    {"v_cvt_sr_bf8_f32", round_small<Small::kBf8>},
};

}  // namespace

Table conversion_table() { return kTable; }

}  // namespace gfx942
