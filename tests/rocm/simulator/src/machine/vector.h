// Lifts a function of one lane to an instruction: operands are read as the types of its arguments,
// with their modifiers, and its result is written to the active lanes.
#pragma once

#include <xmmintrin.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>

#include "convert.h"
#include "wave.h"

namespace gfx942 {

// An integer result that the clamp modifier saturates to T, and that wraps without it.
template <class T>
struct Wide {
  int64_t value;
  explicit Wide(int64_t exact) : value(exact) {}
};

// While it lives, the host rounds and flushes as the wave's mode says.
class FloatScope {
 public:
  FloatScope(uint32_t rounding, uint32_t denormals) {
    if (rounding == 0 && denormals == 3) return;
    static constexpr uint32_t kHostRounding[] = {0, 2, 1, 3};
    saved_ = _mm_getcsr();
    changed_ = true;
    flush_outputs_ = (denormals & 2) == 0;
    const uint32_t flush_inputs = (denormals & 1) == 0 ? 1u << 6 : 0;
    _mm_setcsr((saved_ & ~0xe040u) | kHostRounding[rounding] << 13 | flush_inputs);
  }
  ~FloatScope() {
    if (changed_) _mm_setcsr(saved_);
  }
  FloatScope(const FloatScope&) = delete;
  FloatScope& operator=(const FloatScope&) = delete;

  // The host would flush before it rounds, which makes zeros of the largest denormals.
  template <class T>
  void flush(T* values) const {
    if constexpr (std::is_floating_point_v<T>) {
      for (int lane = 0; lane < kLanes && flush_outputs_; ++lane) {
        const T magnitude = std::fabs(values[lane]);
        if (magnitude < std::numeric_limits<T>::min())
          values[lane] = std::copysign(T{0}, values[lane]);
      }
    }
  }

  // Of operations on floats, and of those on halves and doubles.
  static FloatScope single(const Wave& wave) { return {wave.mode & 3, wave.mode >> 4 & 3}; }
  static FloatScope other(const Wave& wave) { return {wave.mode >> 2 & 3, wave.mode >> 6 & 3}; }

 private:
  uint32_t saved_ = 0;
  bool changed_ = false;
  bool flush_outputs_ = false;
};

// One dword of a source for all lanes, before modifiers that depend on its type. May point into the
// register file; uses `buffer` if it cannot.
const uint32_t* read_words(Wave& wave, const Instruction& i, const Operand& operand, unsigned dword,
                           Lanes& buffer);
// The active lanes, without those that DPP keeps from being written.
uint64_t write_mask(const Wave& wave, const Instruction& i);
void write_words(Wave& wave, const Operand& operand, unsigned dword, const uint32_t* values,
                 uint64_t mask);
// A narrow result with SDWA's destination select, or a 16-bit one into the half that op_sel names.
void write_selected(Wave& wave, const Instruction& i, const uint32_t* values, uint64_t mask);
enum class Half16 : uint8_t { kLow, kLowPreserving, kHigh };
void write_halves(Wave& wave, const Instruction& i, const uint16_t* values, uint64_t mask,
                  Half16 half);

template <class T>
class Source {
 public:
  // `position` counts sources only, as op_sel does.
  Source(Wave& wave, const Instruction& i, size_t operand_number, size_t position) {
    const Operand& operand = i.operand[operand_number];
    if constexpr (sizeof(T) == 4) {
      const uint32_t* words = read_words(wave, i, operand, 0, first_);
      if (operand.negate || operand.absolute) {
        for (int lane = 0; lane < kLanes; ++lane) {
          first_[lane] = (words[lane] & (operand.absolute ? 0x7fffffffu : ~0u)) ^
                         (operand.negate ? 0x80000000u : 0u);
        }
        words = first_;
      }
      data = reinterpret_cast<const T*>(words);
    } else if constexpr (sizeof(T) == 8) {
      read_quads(wave, i, operand);
    } else {
      read_halves(wave, i, operand, (i.op_sel >> position & 1) != 0);
    }
  }

  Source(const Source&) = delete;  // it may point into itself
  Source& operator=(const Source&) = delete;

  const T* data;

 private:
  void read_quads(Wave& wave, const Instruction& i, const Operand& operand) {
    auto* quads = reinterpret_cast<uint64_t*>(own_);
    if (operand.is_vector()) {
      const uint32_t* low = read_words(wave, i, operand, 0, first_);
      Lanes second;
      const uint32_t* high = read_words(wave, i, operand, 1, second);
      for (int lane = 0; lane < kLanes; ++lane) {
        quads[lane] = low[lane] | uint64_t{high[lane]} << 32;
      }
    } else {
      // A literal is the upper half of a double, and the lower half of an integer.
      uint64_t value = wave.read_scalar_pair(operand);
      if (std::is_floating_point_v<T> && operand.literal) {
        value <<= 32;
      }
      std::fill_n(quads, kLanes, value);
    }
    if (operand.negate || operand.absolute) {
      for (int lane = 0; lane < kLanes; ++lane) {
        quads[lane] = (quads[lane] & (operand.absolute ? ~uint64_t{0} >> 1 : ~uint64_t{0})) ^
                      (operand.negate ? uint64_t{1} << 63 : 0);
      }
    }
    data = reinterpret_cast<const T*>(quads);
  }

  void read_halves(Wave& wave, const Instruction& i, const Operand& operand, bool high) {
    auto* halves = reinterpret_cast<uint16_t*>(own_);
    const uint32_t* words = read_words(wave, i, operand, 0, first_);
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t word = operand.bank == Bank::kConstant ? operand.half : words[lane];
      halves[lane] = static_cast<uint16_t>(high ? word >> 16 : word);
    }
    if (operand.negate || operand.absolute) {
      for (int lane = 0; lane < kLanes; ++lane) {
        halves[lane] = static_cast<uint16_t>((halves[lane] & (operand.absolute ? 0x7fff : 0xffff)) ^
                                             (operand.negate ? 0x8000 : 0));
      }
    }
    data = reinterpret_cast<const T*>(halves);
  }

  alignas(64) Lanes first_;
  alignas(64) std::byte own_[sizeof(T) == 4 ? 1 : sizeof(T) * kLanes];
};

template <class T>
T clamp_float(const Wave& wave, T value) {
  if (std::isnan(value)) return wave.dx10_clamp ? T{0} : value;
  // Negative zero becomes zero too.
  return value > 0 ? std::min(value, T{1}) : T{0};
}

template <class R>
void write_result(Wave& wave, const Instruction& i, R* values, uint64_t mask,
                  Half16 half = Half16::kLow) {
  if constexpr (std::is_floating_point_v<R>) {
    if (i.multiplier != 1) {
      for (int lane = 0; lane < kLanes; ++lane) values[lane] *= i.multiplier;
    }
    if (i.clamp) {
      for (int lane = 0; lane < kLanes; ++lane) values[lane] = clamp_float(wave, values[lane]);
    }
  } else if constexpr (std::is_same_v<R, Half>) {
    for (int lane = 0; lane < kLanes && (i.multiplier != 1 || i.clamp); ++lane) {
      float value = values[lane] * i.multiplier;
      if (i.clamp) value = clamp_float(wave, value);
      values[lane] = Half(float_to_half(value));
    }
  }
  if constexpr (sizeof(R) == 8) {
    Lanes part;
    const auto* quads = reinterpret_cast<const uint64_t*>(values);
    for (unsigned dword = 0; dword < 2; ++dword) {
      for (int lane = 0; lane < kLanes; ++lane) {
        part[lane] = static_cast<uint32_t>(quads[lane] >> 32 * dword);
      }
      write_words(wave, i.operand[0], dword, part, mask);
    }
  } else if constexpr (sizeof(R) == 4) {
    const auto* words = reinterpret_cast<const uint32_t*>(values);
    if (i.sdwa) {
      write_selected(wave, i, words, mask);
    } else {
      write_words(wave, i.operand[0], 0, words, mask);
    }
  } else {
    static_assert(sizeof(R) == 2);
    write_halves(wave, i, reinterpret_cast<const uint16_t*>(values), mask, half);
  }
}

template <class T>
struct ResultOf {
  using type = T;
};
template <class T>
struct ResultOf<Wide<T>> {
  using type = T;
};

template <class T>
T finish(const Instruction&, T value) {
  return value;
}
template <class T>
T finish(const Instruction& i, Wide<T> wide) {
  using Limits = std::numeric_limits<T>;
  const int64_t value = wide.value;
  return static_cast<T>(i.clamp ? std::clamp<int64_t>(value, Limits::min(), Limits::max()) : value);
}

template <class T>
constexpr bool kIsOther = std::is_same_v<T, double> || std::is_same_v<T, Half>;

template <class R, class... A>
FloatScope scope_of(const Wave& wave) {
  if constexpr (std::is_same_v<R, float> || (std::is_same_v<A, float> || ...)) {
    return FloatScope::single(wave);
  } else if constexpr (kIsOther<R> || (kIsOther<A> || ...)) {
    return FloatScope::other(wave);
  } else {
    return FloatScope(0, 3);
  }
}

// Where the sources stand among the operands: after the destination, or with the destination as the
// last.
enum class Tied : uint8_t { kNo, kYes };

// The sources of an instruction, each in its place: a tuple would have to move them.
template <size_t position, class T>
struct Slot {
  Slot(Wave& wave, const Instruction& i, size_t operand) : source(wave, i, operand, position) {}
  Source<T> source;
};
template <class Positions, class... A>
struct Sources;
template <size_t... N, class... A>
struct Sources<std::index_sequence<N...>, A...> : Slot<N, A>... {
  Sources(Wave& wave, const Instruction& i, bool tied)
      : Slot<N, A>(wave, i, tied && N + 1 == sizeof...(A) ? 0 : N + 1)... {}
};

template <auto F, Tied tied, Half16 low_half, class R, class... A, size_t... N>
void apply_each(Wave& wave, const Instruction& i, R (*)(A...), std::index_sequence<N...>) {
  constexpr size_t kCount = sizeof...(A);
  const Sources<std::index_sequence<N...>, A...> sources(wave, i, tied == Tied::kYes);
  const uint64_t mask = write_mask(wave, i);
  const FloatScope scope = scope_of<R, A...>(wave);
  if constexpr (std::is_same_v<R, bool>) {
    alignas(64) uint8_t results[kLanes];
    [&](const A*... data) {
      for (int lane = 0; lane < kLanes; ++lane) results[lane] = F(data[lane]...);
    }(static_cast<const Slot<N, A>&>(sources).source.data...);
    uint64_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= uint64_t{results[lane]} << lane;
    wave.write_scalar_pair(i.operand[0], bits & mask);
    if (i.mnemonic.starts_with("v_cmpx")) wave.set_exec(bits & mask);
  } else {
    using Result = typename ResultOf<R>::type;
    alignas(64) Result results[kLanes];
    [&](const A*... data) {
      for (int lane = 0; lane < kLanes; ++lane) results[lane] = finish(i, F(data[lane]...));
    }(static_cast<const Slot<N, A>&>(sources).source.data...);
    scope.flush(results);
    const Half16 half = (i.op_sel >> kCount & 1) != 0 ? Half16::kHigh : low_half;
    write_result(wave, i, results, mask, half);
  }
}

template <class R, class F, class... A>
constexpr auto signature_of(R (F::*)(A...) const) -> R (*)(A...);

// Instructions with three sources keep the other half of a 16-bit destination; others clear it.
template <class... A>
constexpr Half16 kOtherHalf = sizeof...(A) >= 3 ? Half16::kLowPreserving : Half16::kLow;

template <auto F, Tied tied, bool legacy>
void apply_function(Wave& wave, const Instruction& i) {
  using Signature = decltype(signature_of(&decltype(F)::operator()));
  [&]<class R, class... A>(R (*signature)(A...)) {
    constexpr Half16 kHalf = legacy || tied == Tied::kYes ? Half16::kLow : kOtherHalf<A...>;
    apply_each<F, tied, kHalf>(wave, i, signature, std::index_sequence_for<A...>());
  }(Signature{nullptr});
}

// destination = F(source, ...); the legacy form clears the other half of a 16-bit destination in
// any case.
template <auto F>
void each(Wave& wave, const Instruction& i) {
  apply_function<F, Tied::kNo, false>(wave, i);
}
template <auto F>
void each_legacy(Wave& wave, const Instruction& i) {
  apply_function<F, Tied::kNo, true>(wave, i);
}
// destination = F(source, ..., destination).
template <auto F>
void each_tied(Wave& wave, const Instruction& i) {
  apply_function<F, Tied::kYes, false>(wave, i);
}

// Calls f(lane) for every active lane.
template <class F>
void for_lanes(uint64_t mask, F f) {
  for (; mask != 0; mask &= mask - 1) f(__builtin_ctzll(mask));
}

}  // namespace gfx942
