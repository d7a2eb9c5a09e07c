// VOP3P: instructions on both halves of a register, or both registers of a pair. op_sel names the
// half of each source for the lower result, op_sel_hi the one for the upper.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "half.h"
#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;

// Sources are read without the sign modifiers, which each half applies by itself.
template <class T>
class PackedSource {
 public:
  PackedSource(Wave& wave, const Instruction& i, unsigned position)
      : operand_(i.operand[position + 1]) {
    const bool pair = sizeof(T) == 4;
    const unsigned low = i.op_sel >> position & 1;
    const unsigned high = i.op_sel_hi >> position & 1;
    const unsigned halves[] = {low, high};
    const bool negative[] = {(i.neg_lo >> position & 1) != 0, (i.neg_hi >> position & 1) != 0};
    for (unsigned part = 0; part < 2; ++part) {
      const uint32_t* words = read(wave, i, pair ? halves[part] : 0);
      for (int lane = 0; lane < kLanes; ++lane) {
        u32 value = words[lane];
        if (!pair) value = halves[part] != 0 ? value >> 16 : value & 0xffff;
        if (negative[part]) value ^= pair ? 0x80000000u : 0x8000u;
        if constexpr (sizeof(T) == 4) {
          values[part][lane] = std::bit_cast<T>(value);
        } else {
          values[part][lane] = T(static_cast<u16>(value));
        }
      }
    }
  }

  alignas(64) T values[2][kLanes];

 private:
  const uint32_t* read(Wave& wave, const Instruction& i, unsigned dword) {
    if (operand_.bank == Bank::kConstant) {
      // An inline constant stands in the lower half, or in both registers of a pair.
      const bool narrow = sizeof(T) == 2 && std::is_same_v<T, Half>;
      std::fill_n(buffer_, kLanes, narrow && !operand_.literal ? operand_.half : operand_.word);
      return buffer_;
    }
    return read_words(wave, i, operand_, dword, buffer_);
  }

  const Operand& operand_;
  alignas(64) Lanes buffer_;
};

template <class R>
R clamp_packed(const Wave& wave, const Instruction& i, R value) {
  if constexpr (std::is_same_v<R, float>) {
    return i.clamp ? clamp_float(wave, value) : value;
  } else if constexpr (std::is_same_v<R, Half>) {
    return i.clamp ? half(clamp_float(wave, float{value})) : value;
  } else {
    return value;
  }
}

template <auto F, class R, class... A, size_t... N>
void apply_packed(Wave& wave, const Instruction& i, R (*)(A...), std::index_sequence<N...>) {
  const std::tuple<PackedSource<A>...> sources{PackedSource<A>(wave, i, N)...};
  const FloatScope scope = scope_of<R, A...>(wave);
  using Result = typename ResultOf<R>::type;
  alignas(64) Result results[2][kLanes];
  for (unsigned part = 0; part < 2; ++part) {
    for (int lane = 0; lane < kLanes; ++lane) {
      results[part][lane] =
          clamp_packed(wave, i, finish(i, F(std::get<N>(sources).values[part][lane]...)));
    }
    scope.flush(results[part]);
  }
  Lanes words;
  for (unsigned part = 0; part < 2; ++part) {
    if constexpr (sizeof(Result) == 4) {
      std::memcpy(words, results[part], sizeof(words));
      write_words(wave, i.operand[0], part, words, wave.exec());
    } else if (part == 0) {
      for (int lane = 0; lane < kLanes; ++lane) {
        words[lane] =
            std::bit_cast<u16>(results[0][lane]) | u32{std::bit_cast<u16>(results[1][lane])} << 16;
      }
      write_words(wave, i.operand[0], 0, words, wave.exec());
    }
  }
}

template <auto F>
void packed(Wave& wave, const Instruction& i) {
  using Signature = decltype(signature_of(&decltype(F)::operator()));
  [&]<class R, class... A>(R (*signature)(A...)) {
    apply_packed<F>(wave, i, signature, std::index_sequence_for<A...>());
  }(Signature{nullptr});
}

// The lower result comes from the first source and the upper one from the second, each by op_sel.
void move_pair(Wave& wave, const Instruction& i) {
  const PackedSource<u32> a(wave, i, 0);
  const PackedSource<u32> b(wave, i, 1);
  write_words(wave, i.operand[0], 0, a.values[0], wave.exec());
  write_words(wave, i.operand[0], 1, b.values[0], wave.exec());
}

// A source of a mixed fma: a float, or the half that op_sel names if op_sel_hi says that it is one.
struct MixedSource {
  alignas(64) float values[kLanes];

  MixedSource(Wave& wave, const Instruction& i, unsigned position) {
    const Operand& operand = i.operand[position + 1];
    const bool is_half = (i.op_sel_hi >> position & 1) != 0;
    const bool high = (i.op_sel >> position & 1) != 0;
    Lanes buffer;
    const u32* words = read_words(wave, i, operand, 0, buffer);
    for (int lane = 0; lane < kLanes; ++lane) {
      float value = std::bit_cast<float>(words[lane]);
      if (is_half && operand.bank == Bank::kConstant) {
        value = half_to_float(operand.half);
      } else if (is_half) {
        value = half_to_float(static_cast<u16>(high ? words[lane] >> 16 : words[lane]));
      }
      if (operand.absolute) value = std::fabs(value);
      values[lane] = operand.negate ? -value : value;
    }
  }
};

enum class MixedResult : uint8_t { kFloat, kLowHalf, kHighHalf };

template <MixedResult to>
void mixed_fma(Wave& wave, const Instruction& i) {
  const MixedSource a(wave, i, 0);
  const MixedSource b(wave, i, 1);
  const MixedSource c(wave, i, 2);
  const FloatScope scope = FloatScope::single(wave);
  alignas(64) float results[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    results[lane] = std::fma(a.values[lane], b.values[lane], c.values[lane]);
    if (i.clamp) results[lane] = clamp_float(wave, results[lane]);
  }
  scope.flush(results);
  if constexpr (to == MixedResult::kFloat) {
    write_words(wave, i.operand[0], 0, reinterpret_cast<const u32*>(results), wave.exec());
  } else {
    const FloatScope half_scope = FloatScope::other(wave);
    u16 halves[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) halves[lane] = float_to_half(results[lane]);
    write_halves(wave, i, halves, wave.exec(),
                 to == MixedResult::kHighHalf ? Half16::kHigh : Half16::kLowPreserving);
  }
}

// A sum of products of two halves each; the products are exact as floats.
float dot2(u32 a, u32 b, float c) {
  const float low = half_to_float(u16(a)) * half_to_float(u16(b));
  const float high = half_to_float(u16(a >> 16)) * half_to_float(u16(b >> 16));
  return high + (low + c);
}

constexpr Semantics kTable[] = {
    {"v_pk_add_f16", packed<[](Half a, Half b) { return half(a + b); }>},
    {"v_pk_mul_f16", packed<[](Half a, Half b) { return half(a * b); }>},
    {"v_pk_fma_f16", packed<[](Half a, Half b, Half c) { return fused(a, b, c); }>},
    {"v_pk_min_f16", packed<[](Half a, Half b) { return smaller(a, b); }>},
    {"v_pk_max_f16", packed<[](Half a, Half b) { return larger(a, b); }>},
    {"v_pk_add_u16", packed<[](u16 a, u16 b) { return Wide<u16>(a + b); }>},
    {"v_pk_sub_u16", packed<[](u16 a, u16 b) { return Wide<u16>(a - b); }>},
    {"v_pk_add_i16", packed<[](i16 a, i16 b) { return Wide<i16>(a + b); }>},
    {"v_pk_sub_i16", packed<[](i16 a, i16 b) { return Wide<i16>(a - b); }>},
    {"v_pk_mul_lo_u16", packed<[](u16 a, u16 b) { return u16(u32{a} * b); }>},
    {"v_pk_mad_u16", packed<[](u16 a, u16 b, u16 c) { return Wide<u16>(int64_t{a} * b + c); }>},
    {"v_pk_mad_i16", packed<[](i16 a, i16 b, i16 c) { return Wide<i16>(int64_t{a} * b + c); }>},
    {"v_pk_min_i16", packed<[](i16 a, i16 b) { return std::min(a, b); }>},
    {"v_pk_max_i16", packed<[](i16 a, i16 b) { return std::max(a, b); }>},
    {"v_pk_min_u16", packed<[](u16 a, u16 b) { return std::min(a, b); }>},
    {"v_pk_max_u16", packed<[](u16 a, u16 b) { return std::max(a, b); }>},
    {"v_pk_lshlrev_b16", packed<[](u16 a, u16 b) { return u16(b << (a & 15)); }>},
    {"v_pk_lshrrev_b16", packed<[](u16 a, u16 b) { return u16(b >> (a & 15)); }>},
    {"v_pk_ashrrev_i16", packed<[](u16 a, i16 b) { return i16(b >> (a & 15)); }>},
    {"v_pk_add_f32", packed<[](float a, float b) { return a + b; }>},
    {"v_pk_mul_f32", packed<[](float a, float b) { return a * b; }>},
    {"v_pk_fma_f32", packed<[](float a, float b, float c) { return std::fma(a, b, c); }>},
    {"v_pk_mov_b32", move_pair},
    {"v_fma_mix_f32", mixed_fma<MixedResult::kFloat>},
    {"v_fma_mixlo_f16", mixed_fma<MixedResult::kLowHalf>},
    {"v_fma_mixhi_f16", mixed_fma<MixedResult::kHighHalf>},
    {"v_mad_mix_f32", mixed_fma<MixedResult::kFloat>},
    {"v_mad_mixlo_f16", mixed_fma<MixedResult::kLowHalf>},
    {"v_mad_mixhi_f16", mixed_fma<MixedResult::kHighHalf>},
    {"v_dot2_f32_f16", each<[](u32 a, u32 b, float c) { return dot2(a, b, c); }>},
    {"v_dot2c_f32_f16", each_tied<[](u32 a, u32 b, float c) { return dot2(a, b, c); }>},
};

}  // namespace

Table packed_table() { return kTable; }

}  // namespace gfx942
