// Scalar arithmetic: SOP1, SOP2, SOPK and SOPC.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "semantics.h"
#include "wave.h"

namespace gfx942 {
namespace {

// Results that set SCC: to a given bit, or to whether the value is not zero.
template <class T>
struct Carry {
  T value;
  bool scc;
};
template <class T>
struct NonZero {
  T value;
};

template <class T>
T read(const Wave& wave, const Operand& operand) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<T>(wave.read_scalar_pair(operand));
  } else {
    return static_cast<T>(wave.read_scalar(operand));
  }
}

template <class T>
void write(Wave& wave, const Operand& operand, T value) {
  if constexpr (sizeof(T) == 8) {
    wave.write_scalar_pair(operand, static_cast<uint64_t>(value));
  } else {
    wave.write_scalar(operand, static_cast<uint32_t>(value));
  }
}
template <class T>
void write(Wave& wave, const Operand& operand, Carry<T> result) {
  write(wave, operand, result.value);
  wave.scc = result.scc;
}
template <class T>
void write(Wave& wave, const Operand& operand, NonZero<T> result) {
  write(wave, operand, result.value);
  wave.scc = result.value != 0;
}

template <class R, class F, class... A>
constexpr auto signature_of(R (F::*)(A...) const) -> R (*)(A...);

// A function whose first source is operand `first`; comparisons have no destination.
template <auto F, class R, class... A, size_t... N>
void apply(Wave& wave, const Instruction& i, size_t first, R (*)(A...), std::index_sequence<N...>) {
  const R result = F(read<A>(wave, i.operand[first + N])...);
  if constexpr (std::is_same_v<R, bool>) {
    wave.scc = result;
  } else {
    write(wave, i.operand[0], result);
  }
}

template <auto F>
void op(Wave& wave, const Instruction& i) {
  using Signature = decltype(signature_of(&decltype(F)::operator()));
  [&]<class R, class... A>(R (*signature)(A...)) {
    apply<F>(wave, i, std::is_same_v<R, bool> ? 0 : 1, signature, std::index_sequence_for<A...>());
  }(Signature{nullptr});
}

// SOPK reads its destination and its immediate.
template <auto F>
void op_k(Wave& wave, const Instruction& i) {
  const auto old = static_cast<int32_t>(wave.read_scalar(i.operand[0]));
  write(wave, i.operand[0], F(old, int32_t{i.simm16()}));
}
template <auto F>
void compare_k(Wave& wave, const Instruction& i) {
  wave.scc = F(wave.read_scalar(i.operand[0]), i.simm16());
}

template <auto F>
void with_scc(Wave& wave, const Instruction& i) {
  const uint32_t a = wave.read_scalar(i.operand[1]);
  const uint32_t b = wave.read_scalar(i.operand[2]);
  write(wave, i.operand[0], F(a, b, wave.scc));
}

template <class T>
void select(Wave& wave, const Instruction& i) {
  write(wave, i.operand[0], read<T>(wave, i.operand[wave.scc ? 1 : 2]));
}

template <class T>
void move_if(Wave& wave, const Instruction& i) {
  if (wave.scc) write(wave, i.operand[0], read<T>(wave, i.operand[1]));
}

void cmovk(Wave& wave, const Instruction& i) {
  if (wave.scc) write(wave, i.operand[0], int32_t{i.simm16()});
}

void movk(Wave& wave, const Instruction& i) { write(wave, i.operand[0], int32_t{i.simm16()}); }

// exec becomes F(source, exec); the old exec is kept in the destination.
template <auto F>
void save_exec(Wave& wave, const Instruction& i) {
  const uint64_t source = wave.read_scalar_pair(i.operand[1]);
  const uint64_t old = wave.exec();
  wave.set_exec(F(source, old));
  wave.write_scalar_pair(i.operand[0], old);
  wave.scc = wave.exec() != 0;
}
// exec and the destination become F(source, exec).
template <auto F>
void write_exec(Wave& wave, const Instruction& i) {
  const uint64_t result = F(wave.read_scalar_pair(i.operand[1]), wave.exec());
  wave.set_exec(result);
  wave.write_scalar_pair(i.operand[0], result);
  wave.scc = result != 0;
}

template <class T>
void bit_set(Wave& wave, const Instruction& i, bool bit) {
  const T mask = T{1} << (wave.read_scalar(i.operand[1]) & (8 * sizeof(T) - 1));
  const T old = read<T>(wave, i.operand[0]);
  write<T>(wave, i.operand[0], bit ? old | mask : old & ~mask);
}

void absolute_difference(Wave& wave, const Instruction& i) {
  const uint32_t difference = wave.read_scalar(i.operand[1]) - wave.read_scalar(i.operand[2]);
  const uint32_t magnitude = static_cast<int32_t>(difference) < 0 ? -difference : difference;
  write(wave, i.operand[0], NonZero<uint32_t>{magnitude});
}

void indexed_move(Wave& wave, const Instruction& i, bool source) {
  Operand to = i.operand[0];
  Operand from = i.operand[1];
  Operand& moved = source ? from : to;
  moved.index = static_cast<uint16_t>(moved.index + wave.s[kM0]);
  if (to.index >= kFlatScratch || from.index >= kFirstComputed) {
    throw FaultError(FaultCode::kIllegalInstruction, "M0 leads beyond the scalar registers");
  }
  if (i.mnemonic.ends_with("b64")) {
    wave.write_scalar_pair(to, wave.read_scalar_pair(from));
  } else {
    wave.write_scalar(to, wave.read_scalar(from));
  }
}

using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

template <class T>
T reverse_bits(T value) {
  T out = 0;
  for (size_t k = 0; k < 8 * sizeof(T); ++k) out |= (value >> k & 1) << (8 * sizeof(T) - 1 - k);
  return out;
}

// The number of equal leading bits below the sign, or -1 for 0 and -1.
template <class T>
u32 leading_sign_bits(T value) {
  const std::make_unsigned_t<T> folded = value < 0 ? ~value : value;
  return folded == 0 ? ~0u : static_cast<u32>(std::countl_zero(folded));
}

template <class T>
T whole_quads(T value) {
  T out = 0;
  for (size_t k = 0; k < 8 * sizeof(T); k += 4) out |= T{(value >> k & 0xf) != 0} * (T{0xf} << k);
  return out;
}
template <class T>
T quad_mask(T value) {
  T out = 0;
  for (size_t k = 0; k < 2 * sizeof(T); ++k) out |= T{(value >> 4 * k & 0xf) != 0} << k;
  return out;
}

template <class T>
T field(T value, u32 control) {
  const u32 width = control >> 16 & 0x7f;
  const T shifted = value >> (control & (8 * sizeof(T) - 1));
  if (width == 0) return 0;
  if (width >= 8 * sizeof(T)) return shifted;
  // For signed types both shifts are arithmetic, which extends the field's sign.
  const auto up = static_cast<std::make_unsigned_t<T>>(shifted) << (8 * sizeof(T) - width);
  return static_cast<T>(up) >> (8 * sizeof(T) - width);
}

u32 ones(u32 count) { return (1u << (count & 31)) - 1; }

constexpr Semantics kTable[] = {
    {"s_mov_b32", op<[](u32 a) { return a; }>},
    {"s_mov_b64", op<[](u64 a) { return a; }>},
    {"s_cmov_b32", move_if<u32>},
    {"s_cmov_b64", move_if<u64>},
    {"s_not_b32", op<[](u32 a) { return NonZero<u32>{~a}; }>},
    {"s_not_b64", op<[](u64 a) { return NonZero<u64>{~a}; }>},
    {"s_wqm_b32", op<[](u32 a) { return NonZero<u32>{whole_quads(a)}; }>},
    {"s_wqm_b64", op<[](u64 a) { return NonZero<u64>{whole_quads(a)}; }>},
    {"s_quadmask_b32", op<[](u32 a) { return NonZero<u32>{quad_mask(a)}; }>},
    {"s_quadmask_b64", op<[](u64 a) { return NonZero<u64>{quad_mask(a)}; }>},
    {"s_brev_b32", op<[](u32 a) { return reverse_bits(a); }>},
    {"s_brev_b64", op<[](u64 a) { return reverse_bits(a); }>},
    {"s_bcnt0_i32_b32", op<[](u32 a) { return NonZero<u32>{32u - std::popcount(a)}; }>},
    {"s_bcnt0_i32_b64", op<[](u64 a) { return NonZero<u32>{64u - std::popcount(a)}; }>},
    {"s_bcnt1_i32_b32", op<[](u32 a) { return NonZero<u32>{u32(std::popcount(a))}; }>},
    {"s_bcnt1_i32_b64", op<[](u64 a) { return NonZero<u32>{u32(std::popcount(a))}; }>},
    {"s_ff0_i32_b32", op<[](u32 a) { return ~a == 0 ? ~0u : u32(std::countr_one(a)); }>},
    {"s_ff0_i32_b64", op<[](u64 a) { return ~a == 0 ? ~0u : u32(std::countr_one(a)); }>},
    {"s_ff1_i32_b32", op<[](u32 a) { return a == 0 ? ~0u : u32(std::countr_zero(a)); }>},
    {"s_ff1_i32_b64", op<[](u64 a) { return a == 0 ? ~0u : u32(std::countr_zero(a)); }>},
    {"s_flbit_i32_b32", op<[](u32 a) { return a == 0 ? ~0u : u32(std::countl_zero(a)); }>},
    {"s_flbit_i32_b64", op<[](u64 a) { return a == 0 ? ~0u : u32(std::countl_zero(a)); }>},
    {"s_flbit_i32", op<[](i32 a) { return leading_sign_bits(a); }>},
    {"s_flbit_i32_i64", op<[](i64 a) { return leading_sign_bits(a); }>},
    {"s_sext_i32_i8", op<[](i32 a) { return i32(int8_t(a)); }>},
    {"s_sext_i32_i16", op<[](i32 a) { return i32(int16_t(a)); }>},
    {"s_abs_i32", op<[](u32 a) { return NonZero<u32>{i32(a) < 0 ? -a : a}; }>},
    {"s_bitset0_b32", [](Wave& w, const Instruction& i) { bit_set<u32>(w, i, false); }},
    {"s_bitset0_b64", [](Wave& w, const Instruction& i) { bit_set<u64>(w, i, false); }},
    {"s_bitset1_b32", [](Wave& w, const Instruction& i) { bit_set<u32>(w, i, true); }},
    {"s_bitset1_b64", [](Wave& w, const Instruction& i) { bit_set<u64>(w, i, true); }},
    {"s_bitreplicate_b64_b32", op<[](u32 a) {
       u64 out = 0;
       for (int k = 0; k < 32; ++k) out |= u64{(a >> k) & 1} * (u64{3} << 2 * k);
       return out;
     }>},
    {"s_movrels_b32", [](Wave& w, const Instruction& i) { indexed_move(w, i, true); }},
    {"s_movrels_b64", [](Wave& w, const Instruction& i) { indexed_move(w, i, true); }},
    {"s_movreld_b32", [](Wave& w, const Instruction& i) { indexed_move(w, i, false); }},
    {"s_movreld_b64", [](Wave& w, const Instruction& i) { indexed_move(w, i, false); }},

    {"s_and_saveexec_b64", save_exec<[](u64 s, u64 e) { return s & e; }>},
    {"s_or_saveexec_b64", save_exec<[](u64 s, u64 e) { return s | e; }>},
    {"s_xor_saveexec_b64", save_exec<[](u64 s, u64 e) { return s ^ e; }>},
    {"s_andn2_saveexec_b64", save_exec<[](u64 s, u64 e) { return s & ~e; }>},
    {"s_orn2_saveexec_b64", save_exec<[](u64 s, u64 e) { return s | ~e; }>},
    {"s_nand_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~(s & e); }>},
    {"s_nor_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~(s | e); }>},
    {"s_xnor_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~(s ^ e); }>},
    {"s_andn1_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~s & e; }>},
    {"s_orn1_saveexec_b64", save_exec<[](u64 s, u64 e) { return ~s | e; }>},
    {"s_andn1_wrexec_b64", write_exec<[](u64 s, u64 e) { return ~s & e; }>},
    {"s_andn2_wrexec_b64", write_exec<[](u64 s, u64 e) { return s & ~e; }>},

    {"s_add_u32", op<[](u32 a, u32 b) { return Carry<u32>{a + b, a + b < a}; }>},
    {"s_sub_u32", op<[](u32 a, u32 b) { return Carry<u32>{a - b, a < b}; }>},
    {"s_add_i32", op<[](i32 a, i32 b) {
       i32 sum;
       const bool overflow = __builtin_add_overflow(a, b, &sum);
       return Carry<i32>{sum, overflow};
     }>},
    {"s_sub_i32", op<[](i32 a, i32 b) {
       i32 difference;
       const bool overflow = __builtin_sub_overflow(a, b, &difference);
       return Carry<i32>{difference, overflow};
     }>},
    {"s_addc_u32", with_scc<[](u32 a, u32 b, bool carry) {
       const u64 sum = u64{a} + b + carry;
       return Carry<u32>{u32(sum), (sum >> 32) != 0};
     }>},
    {"s_subb_u32", with_scc<[](u32 a, u32 b, bool borrow) {
       return Carry<u32>{a - b - borrow, a < u64{b} + borrow};
     }>},
    {"s_min_i32", op<[](i32 a, i32 b) { return Carry<i32>{std::min(a, b), a < b}; }>},
    {"s_min_u32", op<[](u32 a, u32 b) { return Carry<u32>{std::min(a, b), a < b}; }>},
    {"s_max_i32", op<[](i32 a, i32 b) { return Carry<i32>{std::max(a, b), b < a}; }>},
    {"s_max_u32", op<[](u32 a, u32 b) { return Carry<u32>{std::max(a, b), b < a}; }>},
    {"s_cselect_b32", select<u32>},
    {"s_cselect_b64", select<u64>},
    {"s_and_b32", op<[](u32 a, u32 b) { return NonZero<u32>{a & b}; }>},
    {"s_and_b64", op<[](u64 a, u64 b) { return NonZero<u64>{a & b}; }>},
    {"s_or_b32", op<[](u32 a, u32 b) { return NonZero<u32>{a | b}; }>},
    {"s_or_b64", op<[](u64 a, u64 b) { return NonZero<u64>{a | b}; }>},
    {"s_xor_b32", op<[](u32 a, u32 b) { return NonZero<u32>{a ^ b}; }>},
    {"s_xor_b64", op<[](u64 a, u64 b) { return NonZero<u64>{a ^ b}; }>},
    {"s_andn2_b32", op<[](u32 a, u32 b) { return NonZero<u32>{a & ~b}; }>},
    {"s_andn2_b64", op<[](u64 a, u64 b) { return NonZero<u64>{a & ~b}; }>},
    {"s_orn2_b32", op<[](u32 a, u32 b) { return NonZero<u32>{a | ~b}; }>},
    {"s_orn2_b64", op<[](u64 a, u64 b) { return NonZero<u64>{a | ~b}; }>},
    {"s_nand_b32", op<[](u32 a, u32 b) { return NonZero<u32>{~(a & b)}; }>},
    {"s_nand_b64", op<[](u64 a, u64 b) { return NonZero<u64>{~(a & b)}; }>},
    {"s_nor_b32", op<[](u32 a, u32 b) { return NonZero<u32>{~(a | b)}; }>},
    {"s_nor_b64", op<[](u64 a, u64 b) { return NonZero<u64>{~(a | b)}; }>},
    {"s_xnor_b32", op<[](u32 a, u32 b) { return NonZero<u32>{~(a ^ b)}; }>},
    {"s_xnor_b64", op<[](u64 a, u64 b) { return NonZero<u64>{~(a ^ b)}; }>},
    {"s_lshl_b32", op<[](u32 a, u32 b) { return NonZero<u32>{a << (b & 31)}; }>},
    {"s_lshl_b64", op<[](u64 a, u32 b) { return NonZero<u64>{a << (b & 63)}; }>},
    {"s_lshr_b32", op<[](u32 a, u32 b) { return NonZero<u32>{(a >> (b & 31))}; }>},
    {"s_lshr_b64", op<[](u64 a, u32 b) { return NonZero<u64>{(a >> (b & 63))}; }>},
    {"s_ashr_i32", op<[](i32 a, u32 b) { return NonZero<i32>{(a >> (b & 31))}; }>},
    {"s_ashr_i64", op<[](i64 a, u32 b) { return NonZero<i64>{(a >> (b & 63))}; }>},
    {"s_bfm_b32", op<[](u32 a, u32 b) { return ones(a) << (b & 31); }>},
    {"s_bfm_b64", op<[](u32 a, u32 b) { return ((u64{1} << (a & 63)) - 1) << (b & 63); }>},
    {"s_bfe_u32", op<[](u32 a, u32 b) { return NonZero<u32>{field(a, b)}; }>},
    {"s_bfe_i32", op<[](i32 a, u32 b) { return NonZero<i32>{field(a, b)}; }>},
    {"s_bfe_u64", op<[](u64 a, u32 b) { return NonZero<u64>{field(a, b)}; }>},
    {"s_bfe_i64", op<[](i64 a, u32 b) { return NonZero<i64>{field(a, b)}; }>},
    {"s_mul_i32", op<[](u32 a, u32 b) { return a * b; }>},
    {"s_mul_hi_u32", op<[](u32 a, u32 b) { return u32(u64{a} * b >> 32); }>},
    {"s_mul_hi_i32", op<[](i32 a, i32 b) { return i32(i64{a} * b >> 32); }>},
    {"s_absdiff_i32", absolute_difference},
    {"s_lshl1_add_u32", op<[](u32 a, u32 b) {
       const u64 sum = (u64{a} << 1) + b;
       return Carry<u32>{u32(sum), (sum >> 32) != 0};
     }>},
    {"s_lshl2_add_u32", op<[](u32 a, u32 b) {
       const u64 sum = (u64{a} << 2) + b;
       return Carry<u32>{u32(sum), (sum >> 32) != 0};
     }>},
    {"s_lshl3_add_u32", op<[](u32 a, u32 b) {
       const u64 sum = (u64{a} << 3) + b;
       return Carry<u32>{u32(sum), (sum >> 32) != 0};
     }>},
    {"s_lshl4_add_u32", op<[](u32 a, u32 b) {
       const u64 sum = (u64{a} << 4) + b;
       return Carry<u32>{u32(sum), (sum >> 32) != 0};
     }>},
    {"s_pack_ll_b32_b16", op<[](u32 a, u32 b) { return (a & 0xffff) | b << 16; }>},
    {"s_pack_lh_b32_b16", op<[](u32 a, u32 b) { return (a & 0xffff) | (b & 0xffff0000); }>},
    {"s_pack_hh_b32_b16", op<[](u32 a, u32 b) { return (a >> 16) | (b & 0xffff0000); }>},

    {"s_movk_i32", movk},
    {"s_cmovk_i32", cmovk},
    {"s_addk_i32", op_k<[](i32 a, i32 b) {
       i32 sum;
       const bool overflow = __builtin_add_overflow(a, b, &sum);
       return Carry<i32>{sum, overflow};
     }>},
    {"s_mulk_i32", op_k<[](i32 a, i32 b) { return u32(a) * u32(b); }>},
    {"s_cmpk_eq_i32", compare_k<[](u32 a, int16_t b) { return i32(a) == b; }>},
    {"s_cmpk_lg_i32", compare_k<[](u32 a, int16_t b) { return i32(a) != b; }>},
    {"s_cmpk_gt_i32", compare_k<[](u32 a, int16_t b) { return b < i32(a); }>},
    {"s_cmpk_ge_i32", compare_k<[](u32 a, int16_t b) { return b <= i32(a); }>},
    {"s_cmpk_lt_i32", compare_k<[](u32 a, int16_t b) { return i32(a) < b; }>},
    {"s_cmpk_le_i32", compare_k<[](u32 a, int16_t b) { return i32(a) <= b; }>},
    {"s_cmpk_eq_u32", compare_k<[](u32 a, int16_t b) { return a == uint16_t(b); }>},
    {"s_cmpk_lg_u32", compare_k<[](u32 a, int16_t b) { return a != uint16_t(b); }>},
    {"s_cmpk_gt_u32", compare_k<[](u32 a, int16_t b) { return uint16_t(b) < a; }>},
    {"s_cmpk_ge_u32", compare_k<[](u32 a, int16_t b) { return uint16_t(b) <= a; }>},
    {"s_cmpk_lt_u32", compare_k<[](u32 a, int16_t b) { return a < uint16_t(b); }>},
    {"s_cmpk_le_u32", compare_k<[](u32 a, int16_t b) { return a <= uint16_t(b); }>},

    {"s_cmp_eq_i32", op<[](i32 a, i32 b) { return a == b; }>},
    {"s_cmp_lg_i32", op<[](i32 a, i32 b) { return a != b; }>},
    {"s_cmp_gt_i32", op<[](i32 a, i32 b) { return b < a; }>},
    {"s_cmp_ge_i32", op<[](i32 a, i32 b) { return b <= a; }>},
    {"s_cmp_lt_i32", op<[](i32 a, i32 b) { return a < b; }>},
    {"s_cmp_le_i32", op<[](i32 a, i32 b) { return a <= b; }>},
    {"s_cmp_eq_u32", op<[](u32 a, u32 b) { return a == b; }>},
    {"s_cmp_lg_u32", op<[](u32 a, u32 b) { return a != b; }>},
    {"s_cmp_gt_u32", op<[](u32 a, u32 b) { return b < a; }>},
    {"s_cmp_ge_u32", op<[](u32 a, u32 b) { return b <= a; }>},
    {"s_cmp_lt_u32", op<[](u32 a, u32 b) { return a < b; }>},
    {"s_cmp_le_u32", op<[](u32 a, u32 b) { return a <= b; }>},
    {"s_cmp_eq_u64", op<[](u64 a, u64 b) { return a == b; }>},
    {"s_cmp_lg_u64", op<[](u64 a, u64 b) { return a != b; }>},
    {"s_bitcmp0_b32", op<[](u32 a, u32 b) { return (a >> (b & 31) & 1) == 0; }>},
    {"s_bitcmp1_b32", op<[](u32 a, u32 b) { return (a >> (b & 31) & 1) == 1; }>},
    {"s_bitcmp0_b64", op<[](u64 a, u32 b) { return (a >> (b & 63) & 1) == 0; }>},
    {"s_bitcmp1_b64", op<[](u64 a, u32 b) { return (a >> (b & 63) & 1) == 1; }>},
};

}  // namespace

Table scalar_table() { return kTable; }

}  // namespace gfx942
