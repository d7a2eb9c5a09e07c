// What a wave does with its part of a token on the way to another rank and from there, inside
// kernels. A part is kCopyWords words of each lane; all lanes of a wave come here together.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "fp8.h"
#include "gpu_runtime.h"
#include "kernels.h"
#include "rows.h"

namespace moriep::gpu {

// The words of a part that belong to the calling lane.
struct Part {
  int64_t first;
  int64_t row_words;

  __device__ int64_t word(int i) const { return first + i * kWave; }
  __device__ bool has(int i) const { return word(i) < row_words; }
};

__device__ inline Part part_of_row(uint32_t part, int64_t row_bytes, int word_bytes) {
  return {static_cast<int64_t>(part) * kCopyWords * kWave + lane_id(), row_bytes / word_bytes};
}

// Tokens travel as they are.
template <typename WordType>
struct AsRows {
  using Word = WordType;

  Word words[kCopyWords];

  // From the token to registers.
  __device__ void read(const std::byte* token, const Part& part) {
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      if (part.has(i)) words[i] = reinterpret_cast<const Word*>(token)[part.word(i)];
    }
  }
  // From registers to an arena, where a row's scales, if it has any, have this offset.
  __device__ void send(std::byte* staged, int64_t, const Part& part) const {
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      if (part.has(i)) reinterpret_cast<Word*>(staged)[part.word(i)] = words[i];
    }
  }
  // From an arena to registers.
  __device__ void receive(const std::byte* staged, int64_t, const Part& part) {
    read(staged, part);
  }
  // The same of a row whose scales, if it has any, lie elsewhere.
  __device__ void receive_apart(const std::byte* row, const float*, const Part& part) {
    read(row, part);
  }
  // After `read` or `receive`: `words` are those of a row.
  __device__ void restore() {}
};

// Tokens travel as float8 with a scale for each group.
template <RowType kType, bool kWide, Fp8Format kFormat>
struct AsFp8 {
  using RowWord = std::conditional_t<kWide, WideWord<kType>, NarrowWord<kType>>;
  using Word = typename RowWord::Type;
  static constexpr int kElements = RowWord::kElements;
  using Codes = std::conditional_t<kElements == 8, uint2,
                                   std::conditional_t<kElements == 4, uint32_t, uint8_t>>;
  // A group is so many lanes beside each other, and so many words of each.
  static constexpr int kGroupLanes = kFp8Group / kElements < kWave ? kFp8Group / kElements : kWave;
  static constexpr int kGroupWords = kFp8Group / kElements / kGroupLanes;
  static constexpr int kGroups = kCopyWords / kGroupWords;  // that a lane has a share of
  static_assert(kCopyWords % kGroupWords == 0 && kGroups <= kGroupLanes);
  // A larger value could be rounded to one that the row type does not have.
  static constexpr uint32_t kLargestBits = kType == RowType::kF16 ? 0x47700000u : 0x7f700000u;

  Word words[kCopyWords];
  Codes codes[kCopyWords];
  uint32_t scales[kGroups];
  // Lane g of a group's lanes moves the g-th scale. Chosen among `scales` later, it would make them
  // an array in memory.
  uint32_t scale_to_move;

  __device__ void read(const std::byte* token, const Part& part) {
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      words[i] = Word{};
      if (part.has(i)) words[i] = reinterpret_cast<const Word*>(token)[part.word(i)];
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const Fp8Scale scale = fp8_scale<kFormat>(largest(words + g * kGroupWords));
      scales[g] = scale.scale;
      if (g == 0 || place_in_group() == g) scale_to_move = scale.scale;
#pragma unroll
      for (int i = g * kGroupWords; i < (g + 1) * kGroupWords; ++i) {
        codes[i] = scale.inverse == 0 ? Codes{} : encode(words[i], scale.inverse);
      }
    }
  }

  __device__ void send(std::byte* staged, int64_t row_scales, const Part& part) const {
    write(reinterpret_cast<Codes*>(staged), reinterpret_cast<uint32_t*>(staged + row_scales), part);
  }
  __device__ void write(Codes* to, uint32_t* scales_to, const Part& part) const {
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      if (part.has(i)) to[part.word(i)] = codes[i];
    }
    // All scales of the wave with one store.
    if (const int64_t group = group_of_lane(part); group >= 0) scales_to[group] = scale_to_move;
  }

  __device__ void receive(const std::byte* staged, int64_t row_scales, const Part& part) {
    receive_apart(staged, reinterpret_cast<const float*>(staged + row_scales), part);
  }
  __device__ void receive_apart(const std::byte* row, const float* row_scales, const Part& part) {
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) {
      codes[i] = Codes{};
      if (part.has(i)) codes[i] = reinterpret_cast<const Codes*>(row)[part.word(i)];
    }
    const int64_t group = group_of_lane(part);
    const int32_t scale = group >= 0 ? reinterpret_cast<const int32_t*>(row_scales)[group] : 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      scales[g] = static_cast<uint32_t>(from_lane(scale, lane_id() - place_in_group() + g));
    }
  }

  __device__ void restore() {
#pragma unroll
    for (int i = 0; i < kCopyWords; ++i) words[i] = decode(codes[i], scales[i / kGroupWords]);
  }

 private:
  __device__ static int place_in_group() { return lane_id() % kGroupLanes; }
  // The group whose scale the calling lane moves, or -1.
  __device__ static int64_t group_of_lane(const Part& part) {
    const int place = place_in_group();
    // The first word of the group that this lane's words number `place` belong to.
    const int64_t word = part.word(place * kGroupWords) - place;
    return place < kGroups && word < part.row_words ? word * kElements / kFp8Group : -1;
  }

  // The bits of the largest magnitude in a group; as integers infinity and NaN are largest of all.
  __device__ static uint32_t largest(const Word* group) {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < kGroupWords; ++i) {
      float values[kElements];
      RowWord::unpack(group[i], values);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        found = max(found, __float_as_uint(values[j]) & 0x7fffffffu);
      }
    }
#pragma unroll
    for (int reach = 1; reach < kGroupLanes; reach *= 2) {
      const int32_t other = from_lane(static_cast<int32_t>(found), lane_id() ^ reach);
      found = max(found, static_cast<uint32_t>(other));
    }
    return found;
  }

  __device__ static Codes encode(Word word, uint32_t inverse) {
    const float most = __uint_as_float(kLargestBits);
    float values[kElements];
    RowWord::unpack(word, values);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      values[j] = fminf(fmaxf(values[j], -most), most) * __uint_as_float(inverse);
    }
    const auto four = [&](int j) {
      return fp8_encode<kFormat>(values[j], values[j + 1]) |
             fp8_encode<kFormat>(values[j + 2], values[j + 3]) << 16;
    };
    if constexpr (kElements == 8) {
      return make_uint2(four(0), four(4));
    } else if constexpr (kElements == 4) {
      return four(0);
    } else {
      return static_cast<uint8_t>(fp8_encode<kFormat>(values[0], 0.0f));
    }
  }

  __device__ static Word decode(Codes word, uint32_t scale) {
    float values[kElements];
    const auto four = [&](uint32_t bits, int j) {
      const float2 low = fp8_decode<kFormat>(bits & 0xffffu);
      const float2 high = fp8_decode<kFormat>(bits >> 16);
      values[j] = low.x;
      values[j + 1] = low.y;
      values[j + 2] = high.x;
      values[j + 3] = high.y;
    };
    if constexpr (kElements == 8) {
      four(word.x, 0);
      four(word.y, 4);
    } else if constexpr (kElements == 4) {
      four(word, 0);
    } else {
      values[0] = fp8_decode<kFormat>(word).x;
    }
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] *= __uint_as_float(scale);
    return RowWord::pack(values);
  }
};

// Calls f<Move>() with what copies rows at these addresses, in the widest words that fit.
template <typename F>
void with_copy(int64_t row_bytes, const void* a, const void* b, F f) {
  if (fits_words(16, row_bytes, a, b)) {
    f.template operator()<AsRows<uint4>>();
  } else if (fits_words(2, row_bytes, a, b)) {
    f.template operator()<AsRows<uint16_t>>();
  } else {
    f.template operator()<AsRows<uint8_t>>();
  }
}

// The same with what moves rows of a type on a wire.
template <typename F>
void with_move(RowType type, Wire wire, int64_t row_bytes, const void* a, const void* b, F f) {
  if (wire == Wire::kRows) return with_copy(row_bytes, a, b, f);
  const bool wide = fits_words(16, row_bytes, a, b);
  with_row_type(type, [&]<RowType kType>() {
    if (wide) {
      f.template operator()<AsFp8<kType, true, kWireFormat>>();
    } else {
      f.template operator()<AsFp8<kType, false, kWireFormat>>();
    }
  });
}

inline gpuError_t first_error(std::initializer_list<gpuError_t> errors) {
  for (const gpuError_t error : errors) {
    if (error != gpuSuccess) return error;
  }
  return gpuSuccess;
}

// The first error of f<Move>() over all that copy.
template <typename F>
gpuError_t for_all_copies(F f) {
  return first_error({f.template operator()<AsRows<uint4>>(),
                      f.template operator()<AsRows<uint16_t>>(),
                      f.template operator()<AsRows<uint8_t>>()});
}

// The same over all that move rows on a wire.
template <typename F>
gpuError_t for_all_moves(Wire wire, F f) {
  if (wire == Wire::kRows) return for_all_copies(f);
  constexpr Fp8Format kFormat = kWireFormat;
  return first_error({f.template operator()<AsFp8<RowType::kF32, true, kFormat>>(),
                      f.template operator()<AsFp8<RowType::kF32, false, kFormat>>(),
                      f.template operator()<AsFp8<RowType::kBF16, true, kFormat>>(),
                      f.template operator()<AsFp8<RowType::kBF16, false, kFormat>>(),
                      f.template operator()<AsFp8<RowType::kF16, true, kFormat>>(),
                      f.template operator()<AsFp8<RowType::kF16, false, kFormat>>()});
}

}  // namespace moriep::gpu
