// Vector instructions that see more than one lane's operands: carries and conditions in scalar
// registers, moves between scalar and vector registers, counts of active lanes.
#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

struct WithCarry {
  u32 value;
  bool carry;
};

// destination, carry out, two sources and perhaps a carry in.
template <auto F>
void carry(Wave& wave, const Instruction& i) {
  const Source<u32> a(wave, i, 2, 0);
  const Source<u32> b(wave, i, 3, 1);
  const u64 carry_in = i.num_operands > 4 ? wave.read_scalar_pair(i.operand[4]) : 0;
  const u64 mask = write_mask(wave, i);
  Lanes result = {};
  u64 carry_out = 0;
  for_lanes(mask, [&](int lane) {
    const WithCarry sum = F(a.data[lane], b.data[lane], (carry_in >> lane & 1) != 0);
    result[lane] = i.clamp && sum.carry ? ~0u : sum.value;
    carry_out |= u64{sum.carry} << lane;
  });
  write_result(wave, i, result, mask);
  wave.write_scalar_pair(i.operand[1], carry_out);
}

WithCarry subtract(u32 a, u32 b, bool borrow) { return {a - b - borrow, u64{b} + borrow > a}; }

// 64-bit results whose carry goes to the second operand.
template <auto F>
void wide_product(Wave& wave, const Instruction& i) {
  const Source<u32> a(wave, i, 2, 0);
  const Source<u32> b(wave, i, 3, 1);
  const Source<u64> c(wave, i, 4, 2);
  alignas(64) u64 result[kLanes] = {};
  u64 carry_out = 0;
  for_lanes(wave.exec(), [&](int lane) {
    bool overflow = false;
    result[lane] = F(a.data[lane], b.data[lane], c.data[lane], &overflow);
    carry_out |= u64{overflow} << lane;
  });
  write_result(wave, i, result, wave.exec());
  wave.write_scalar_pair(i.operand[1], carry_out);
}

u64 unsigned_product(u32 a, u32 b, u64 c, bool* overflow) {
  u64 sum;
  *overflow = __builtin_add_overflow(u64{a} * b, c, &sum);
  return sum;
}
u64 signed_product(u32 a, u32 b, u64 c, bool* overflow) {
  i64 sum;
  const i64 product = i64{static_cast<int32_t>(a)} * static_cast<int32_t>(b);
  *overflow = __builtin_add_overflow(product, static_cast<i64>(c), &sum);
  return static_cast<u64>(sum);
}

void select(Wave& wave, const Instruction& i) {
  const Source<u32> a(wave, i, 1, 0);
  const Source<u32> b(wave, i, 2, 1);
  const u64 condition = i.num_operands > 3 ? wave.read_scalar_pair(i.operand[3]) : wave.vcc();
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = (condition >> lane & 1) != 0 ? b.data[lane] : a.data[lane];
  }
  write_result(wave, i, result, write_mask(wave, i));
}

void read_first_lane(Wave& wave, const Instruction& i) {
  const u64 exec = wave.exec();
  const int lane = exec == 0 ? 0 : __builtin_ctzll(exec);
  wave.write_scalar(i.operand[0], (*wave.vector(i.operand[1].index))[lane]);
}
void read_lane(Wave& wave, const Instruction& i) {
  const u32 lane = wave.read_scalar(i.operand[2]) % kLanes;
  wave.write_scalar(i.operand[0], (*wave.vector(i.operand[1].index))[lane]);
}
void write_lane(Wave& wave, const Instruction& i) {
  const u32 lane = wave.read_scalar(i.operand[2]) % kLanes;
  (*wave.vector(i.operand[0].index))[lane] = wave.read_scalar(i.operand[1]);
}

// How many of the lanes below this one are set in the mask's half.
template <int half>
void count_lower_lanes(Wave& wave, const Instruction& i) {
  const Source<u32> mask(wave, i, 1, 0);
  const Source<u32> start(wave, i, 2, 1);
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const u64 below = (u64{1} << lane) - 1;
    const u32 considered = mask.data[lane] & static_cast<u32>(below >> 32 * half);
    result[lane] = start.data[lane] + static_cast<u32>(__builtin_popcount(considered));
  }
  write_result(wave, i, result, write_mask(wave, i));
}

void swap(Wave& wave, const Instruction& i) {
  u32* a = *wave.vector(i.operand[0].index);
  u32* b = *wave.vector(i.operand[1].index);
  for_lanes(wave.exec(), [&](int lane) { std::swap(a[lane], b[lane]); });
}

constexpr Handler kAddCarry = carry<[](u32 a, u32 b, bool c) {
  const u64 sum = u64{a} + b + c;
  return WithCarry{u32(sum), (sum >> 32) != 0};
}>;
constexpr Handler kSubtractBorrow = carry<[](u32 a, u32 b, bool c) { return subtract(a, b, c); }>;
constexpr Handler kReverseSubtractBorrow =
    carry<[](u32 a, u32 b, bool c) { return subtract(b, a, c); }>;

constexpr Semantics kTable[] = {
    {"v_nop", [](Wave&, const Instruction&) {}},
    {"v_add_co_u32", kAddCarry},
    {"v_addc_co_u32", kAddCarry},
    {"v_sub_co_u32", kSubtractBorrow},
    {"v_subb_co_u32", kSubtractBorrow},
    {"v_subrev_co_u32", kReverseSubtractBorrow},
    {"v_subbrev_co_u32", kReverseSubtractBorrow},
    {"v_mad_u64_u32", wide_product<unsigned_product>},
    {"v_mad_i64_i32", wide_product<signed_product>},
    {"v_cndmask_b32", select},
    {"v_readfirstlane_b32", read_first_lane},
    {"v_readlane_b32", read_lane},
    {"v_writelane_b32", write_lane},
    {"v_mbcnt_lo_u32_b32", count_lower_lanes<0>},
    {"v_mbcnt_hi_u32_b32", count_lower_lanes<1>},
    {"v_swap_b32", swap},
};

}  // namespace

Table lane_table() { return kTable; }

}  // namespace gfx942
