// Atomics on device memory, buffers and LDS: real ones of the host, because other processes share
// the memory.
#include <algorithm>
#include <bit>
#include <cmath>

#include "memory.h"
#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

// Two halves or bfloat16s of a dword.
struct TwoHalves {
  u32 bits;
};
struct TwoBf16 {
  u32 bits;
};

u32 sum_of(TwoHalves a, TwoHalves b) {
  u32 out = 0;
  for (unsigned shift : {0u, 16u}) {
    const float sum = half_to_float(u16(a.bits >> shift)) + half_to_float(u16(b.bits >> shift));
    out |= u32{float_to_half(sum)} << shift;
  }
  return out;
}
u32 sum_of(TwoBf16 a, TwoBf16 b) {
  u32 out = 0;
  for (unsigned shift : {0u, 16u}) {
    const float sum = bf16_to_float(u16(a.bits >> shift)) + bf16_to_float(u16(b.bits >> shift));
    out |= u32{float_to_bf16(sum)} << shift;
  }
  return out;
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
T gather(Wave& wave, const Operand& operand, uint32_t first, int lane) {
  const Lanes* words = wave.vector(operand.index, first + sizeof(T) / 4) + first;
  Bits<T> bits = words[0][lane];
  if constexpr (sizeof(T) == 8) bits |= u64{words[1][lane]} << 32;
  return std::bit_cast<T>(bits);
}

template <class T>
void scatter(Wave& wave, const Operand& operand, int lane, T value) {
  Lanes* words = wave.vector(operand.index, sizeof(T) / 4);
  const auto bits = std::bit_cast<Bits<T>>(value);
  words[0][lane] = static_cast<u32>(bits);
  if constexpr (sizeof(T) == 8) words[1][lane] = static_cast<u32>(bits >> 32);
}

// Applies F(old, operand) in each lane's memory; compares swap where the old value is the expected
// one.
template <class T, auto F>
T exchange(std::byte* at, T operand) {
  auto* memory = reinterpret_cast<Bits<T>*>(at);
  Bits<T> old = __atomic_load_n(memory, __ATOMIC_RELAXED);
  Bits<T> desired;
  do {
    desired = std::bit_cast<Bits<T>>(F(std::bit_cast<T>(old), operand));
  } while (!__atomic_compare_exchange_n(memory, &old, desired, false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_RELAXED));
  return std::bit_cast<T>(old);
}

template <class T>
T compare_exchange(std::byte* at, T desired, T expected) {
  __atomic_compare_exchange_n(reinterpret_cast<T*>(at), &expected, desired, false, __ATOMIC_SEQ_CST,
                              __ATOMIC_SEQ_CST);
  return expected;
}

// Where an atomic's operands stand.
struct Operands {
  Places places;
  const Operand* data;
  const Operand* result;  // null if the old value is not wanted
};

enum class Space : uint8_t { kFlat, kGlobal, kBuffer };

template <Space space>
Operands operands_of(Wave& wave, const Instruction& i, uint32_t bytes) {
  // With a result, it comes before the others; a buffer's data register is also its result.
  const int shift = space != Space::kBuffer && i.sc0 ? 1 : 0;
  const Operand* result = i.sc0 ? &i.operand[0] : nullptr;
  switch (space) {
    case Space::kFlat:
      return {flat_places(wave, i, shift, bytes, Use::kAtomic), &i.operand[shift + 1], result};
    case Space::kGlobal:
      return {global_places(wave, i, shift, shift + 2, bytes, Use::kAtomic), &i.operand[shift + 1],
              result};
    case Space::kBuffer:
      break;
  }
  return {buffer_places(wave, i, 1, bytes, Use::kAtomic), &i.operand[0], result};
}

template <class T, class Apply>
void for_each_place(Wave& wave, const Operands& operands, Apply apply) {
  for_lanes(operands.places.mask, [&](int lane) {
    const Place& place = operands.places.of[static_cast<size_t>(lane)];
    if (place.cached) {
      wave.memory->caches()->prepare_atomic(wave.group->xcd, reinterpret_cast<uint64_t>(place.at));
    }
    const T old = place.at != nullptr ? apply(lane, place.at) : T{};
    if (operands.result != nullptr) scatter(wave, *operands.result, lane, old);
  });
}

template <Space space, class T, auto F>
void atomic(Wave& wave, const Instruction& i) {
  const Operands operands = operands_of<space>(wave, i, sizeof(T));
  for_each_place<T>(wave, operands, [&](int lane, std::byte* at) {
    return exchange<T, F>(at, gather<T>(wave, *operands.data, 0, lane));
  });
}

// The new value stands before the expected one.
template <Space space, class T>
void compare_swap(Wave& wave, const Instruction& i) {
  const Operands operands = operands_of<space>(wave, i, sizeof(T));
  for_each_place<T>(wave, operands, [&](int lane, std::byte* at) {
    return compare_exchange(at, gather<T>(wave, *operands.data, 0, lane),
                            gather<T>(wave, *operands.data, sizeof(T) / 4, lane));
  });
}

template <class T>
Operands lds_operands(Wave& wave, const Instruction& i, bool returns) {
  const int shift = returns ? 1 : 0;
  const auto offset = static_cast<u32>(i.offset);
  return {lds_places(wave, i, shift, offset, sizeof(T), Use::kAtomic), &i.operand[shift + 1],
          returns ? &i.operand[0] : nullptr};
}

template <class T, auto F, bool returns>
void lds_atomic(Wave& wave, const Instruction& i) {
  const Operands operands = lds_operands<T>(wave, i, returns);
  for_each_place<T>(wave, operands, [&](int lane, std::byte* at) {
    return exchange<T, F>(at, gather<T>(wave, *operands.data, 0, lane));
  });
}

// In LDS, the expected value comes first, in an operand of its own.
template <class T, bool returns>
void lds_compare_swap(Wave& wave, const Instruction& i) {
  const Operands operands = lds_operands<T>(wave, i, returns);
  for_each_place<T>(wave, operands, [&](int lane, std::byte* at) {
    return compare_exchange(at, gather<T>(wave, operands.data[1], 0, lane),
                            gather<T>(wave, *operands.data, 0, lane));
  });
}

// The bits of the first operand are replaced by the second.
template <class T, bool returns>
void lds_masked_or(Wave& wave, const Instruction& i) {
  const Operands operands = lds_operands<T>(wave, i, returns);
  for_each_place<T>(wave, operands, [&](int lane, std::byte* at) {
    const T keep = ~gather<T>(wave, *operands.data, 0, lane);
    const T old = exchange<T, [](T before, T mask) { return before & mask; }>(at, keep);
    exchange<T, [](T before, T bits) { return before | bits; }>(
        at, gather<T>(wave, operands.data[1], 0, lane));
    return old;
  });
}

// Releases and acquires. Without caches, all memory is coherent anyway.
void write_back(Wave& wave, const Instruction& i) {
  if (Caches* caches = wave.memory->caches()) {
    caches->write_back(wave.group->xcd, scope_of_bits(i.sc0, i.sc1));
  }
}
void invalidate(Wave& wave, const Instruction& i) {
  if (Caches* caches = wave.memory->caches()) {
    caches->invalidate(wave.group->xcd, scope_of_bits(i.sc0, i.sc1));
  }
}

constexpr auto kSwap = [](auto, auto b) { return b; };
constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSubtract = [](auto a, auto b) { return a - b; };
constexpr auto kReverseSubtract = [](auto a, auto b) { return b - a; };
constexpr auto kAnd = [](auto a, auto b) { return a & b; };
constexpr auto kOr = [](auto a, auto b) { return a | b; };
constexpr auto kXor = [](auto a, auto b) { return a ^ b; };
constexpr auto kMin = [](auto a, auto b) { return std::min(a, b); };
constexpr auto kMax = [](auto a, auto b) { return std::max(a, b); };
// Counters that wrap at the operand.
constexpr auto kIncrement = [](auto a, auto b) { return a >= b ? a - a : a + 1; };
constexpr auto kDecrement = [](auto a, auto b) { return a == 0 || a > b ? b : a - 1; };
constexpr auto kFloatMin = [](auto a, auto b) { return std::fmin(a, b); };
constexpr auto kFloatMax = [](auto a, auto b) { return std::fmax(a, b); };
constexpr auto kPackedAdd = [](auto a, auto b) { return decltype(a){sum_of(a, b)}; };

#define GFX942_ATOMIC(name, T, F)                              \
  {"flat_atomic_" name, atomic<Space::kFlat, T, F>},           \
      {"global_atomic_" name, atomic<Space::kGlobal, T, F>}, { \
    "buffer_atomic_" name, atomic<Space::kBuffer, T, F>        \
  }
#define GFX942_COMPARE_SWAP(name, T)                              \
  {"flat_atomic_" name, compare_swap<Space::kFlat, T>},           \
      {"global_atomic_" name, compare_swap<Space::kGlobal, T>}, { \
    "buffer_atomic_" name, compare_swap<Space::kBuffer, T>        \
  }
#define GFX942_LDS(name, type, T, F)                \
  {"ds_" name "_" type, lds_atomic<T, F, false>}, { \
    "ds_" name "_rtn_" type, lds_atomic<T, F, true> \
  }

constexpr Semantics kTable[] = {
    GFX942_ATOMIC("swap", u32, kSwap),
    GFX942_ATOMIC("add", u32, kAdd),
    GFX942_ATOMIC("sub", u32, kSubtract),
    GFX942_ATOMIC("smin", i32, kMin),
    GFX942_ATOMIC("umin", u32, kMin),
    GFX942_ATOMIC("smax", i32, kMax),
    GFX942_ATOMIC("umax", u32, kMax),
    GFX942_ATOMIC("and", u32, kAnd),
    GFX942_ATOMIC("or", u32, kOr),
    GFX942_ATOMIC("xor", u32, kXor),
    GFX942_ATOMIC("inc", u32, kIncrement),
    GFX942_ATOMIC("dec", u32, kDecrement),
    GFX942_ATOMIC("swap_x2", u64, kSwap),
    GFX942_ATOMIC("add_x2", u64, kAdd),
    GFX942_ATOMIC("sub_x2", u64, kSubtract),
    GFX942_ATOMIC("smin_x2", i64, kMin),
    GFX942_ATOMIC("umin_x2", u64, kMin),
    GFX942_ATOMIC("smax_x2", i64, kMax),
    GFX942_ATOMIC("umax_x2", u64, kMax),
    GFX942_ATOMIC("and_x2", u64, kAnd),
    GFX942_ATOMIC("or_x2", u64, kOr),
    GFX942_ATOMIC("xor_x2", u64, kXor),
    GFX942_ATOMIC("inc_x2", u64, kIncrement),
    GFX942_ATOMIC("dec_x2", u64, kDecrement),
    GFX942_ATOMIC("add_f32", float, kAdd),
    GFX942_ATOMIC("add_f64", double, kAdd),
    GFX942_ATOMIC("min_f64", double, kFloatMin),
    GFX942_ATOMIC("max_f64", double, kFloatMax),
    GFX942_ATOMIC("pk_add_f16", TwoHalves, kPackedAdd),
    GFX942_ATOMIC("pk_add_bf16", TwoBf16, kPackedAdd),
    GFX942_COMPARE_SWAP("cmpswap", u32),
    GFX942_COMPARE_SWAP("cmpswap_x2", u64),

    GFX942_LDS("add", "u32", u32, kAdd),
    GFX942_LDS("sub", "u32", u32, kSubtract),
    GFX942_LDS("rsub", "u32", u32, kReverseSubtract),
    GFX942_LDS("inc", "u32", u32, kIncrement),
    GFX942_LDS("dec", "u32", u32, kDecrement),
    GFX942_LDS("min", "i32", i32, kMin),
    GFX942_LDS("max", "i32", i32, kMax),
    GFX942_LDS("min", "u32", u32, kMin),
    GFX942_LDS("max", "u32", u32, kMax),
    GFX942_LDS("and", "b32", u32, kAnd),
    GFX942_LDS("or", "b32", u32, kOr),
    GFX942_LDS("xor", "b32", u32, kXor),
    GFX942_LDS("add", "u64", u64, kAdd),
    GFX942_LDS("sub", "u64", u64, kSubtract),
    GFX942_LDS("rsub", "u64", u64, kReverseSubtract),
    GFX942_LDS("inc", "u64", u64, kIncrement),
    GFX942_LDS("dec", "u64", u64, kDecrement),
    GFX942_LDS("min", "i64", i64, kMin),
    GFX942_LDS("max", "i64", i64, kMax),
    GFX942_LDS("min", "u64", u64, kMin),
    GFX942_LDS("max", "u64", u64, kMax),
    GFX942_LDS("and", "b64", u64, kAnd),
    GFX942_LDS("or", "b64", u64, kOr),
    GFX942_LDS("xor", "b64", u64, kXor),
    GFX942_LDS("add", "f32", float, kAdd),
    GFX942_LDS("add", "f64", double, kAdd),
    GFX942_LDS("min", "f32", float, kFloatMin),
    GFX942_LDS("max", "f32", float, kFloatMax),
    GFX942_LDS("min", "f64", double, kFloatMin),
    GFX942_LDS("max", "f64", double, kFloatMax),
    GFX942_LDS("pk_add", "f16", TwoHalves, kPackedAdd),
    GFX942_LDS("pk_add", "bf16", TwoBf16, kPackedAdd),
    {"ds_wrxchg_rtn_b32", lds_atomic<u32, kSwap, true>},
    {"ds_wrxchg_rtn_b64", lds_atomic<u64, kSwap, true>},
    {"ds_cmpst_b32", lds_compare_swap<u32, false>},
    {"ds_cmpst_rtn_b32", lds_compare_swap<u32, true>},
    {"ds_cmpst_b64", lds_compare_swap<u64, false>},
    {"ds_cmpst_rtn_b64", lds_compare_swap<u64, true>},
    {"ds_mskor_b32", lds_masked_or<u32, false>},
    {"ds_mskor_rtn_b32", lds_masked_or<u32, true>},
    {"ds_mskor_b64", lds_masked_or<u64, false>},
    {"ds_mskor_rtn_b64", lds_masked_or<u64, true>},
    {"buffer_wbl2", write_back},
    {"buffer_inv", invalidate},
};

}  // namespace

Table atomic_table() { return kTable; }

}  // namespace gfx942
