// Moving and adding rows, inside kernels. A lane handles words: 16 bytes where sizes and addresses
// allow it, else what one element takes.
#pragma once

#include "gpu_runtime.h"
#include "team.h"

namespace moriep::gpu {

inline constexpr int kThreads = 256;  // of a block that moves rows

// Words that a lane has on the way at once while it copies.
inline constexpr int kCopyWords = 4;
// Rows among which a wave looks for those to clear. With fewer most waves find none; with more the
// waves whose rows all have no owner write far longer than the others.
inline constexpr int kClearRows = 16;
// Rows that a lane reads at once while it adds.
inline constexpr int kSumRows = 8;

// A wave's place in its block; its place among all waves of the grid, and their number.
__device__ inline int32_t wave_of_block() {
  return uniform(static_cast<int32_t>(threadIdx.x / kWave));
}
__device__ inline int64_t wave_index() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWave) + wave_of_block();
}
__device__ inline int64_t num_waves() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x / kWave;
}

// Parts into which a row is cut, so that few long rows keep as many waves busy as many short ones.
__host__ __device__ inline uint32_t num_parts(int64_t row_bytes, int word_bytes, int words) {
  const int64_t part = static_cast<int64_t>(kWave) * words * word_bytes;
  const int64_t parts = (row_bytes + part - 1) / part;
  return static_cast<uint32_t>(parts > 0 ? parts : 1);
}

// How a word of a row type is taken apart and put together. Values are added in f32 and rounded
// once, to nearest even.
template <RowType kType>
struct Element;

template <>
struct Element<RowType::kF32> {
  using Bits = uint32_t;
  __device__ static float get(uint32_t bits) { return __uint_as_float(bits); }
  __device__ static uint32_t put(float value) { return __float_as_uint(value); }
};

template <>
struct Element<RowType::kBF16> {
  using Bits = uint16_t;
  __device__ static float get(uint16_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
  __device__ static uint16_t put(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

template <>
struct Element<RowType::kF16> {
  using Bits = uint16_t;
  __device__ static float get(uint16_t bits) { return half_to_float(bits); }
  __device__ static uint16_t put(float value) { return float_to_half(value); }
};

// One element at a time.
template <RowType kType>
struct NarrowWord {
  using Type = typename Element<kType>::Bits;
  static constexpr int kElements = 1;
  __device__ static void unpack(Type word, float* out) { out[0] = Element<kType>::get(word); }
  __device__ static Type pack(const float* in) { return Element<kType>::put(in[0]); }
};

// 16 bytes at a time.
template <RowType kType>
struct WideWord {
  using Type = uint4;
  static constexpr int kElements = 16 / static_cast<int>(sizeof(typename Element<kType>::Bits));
  __device__ static void unpack(uint4 word, float* out) {
    const uint32_t parts[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kElements == 4) {
        out[i] = Element<kType>::get(parts[i]);
      } else {
        out[2 * i] = Element<kType>::get(static_cast<uint16_t>(parts[i]));
        out[2 * i + 1] = Element<kType>::get(static_cast<uint16_t>(parts[i] >> 16));
      }
    }
  }
  __device__ static uint4 pack(const float* in) {
    uint32_t parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kElements == 4) {
        parts[i] = Element<kType>::put(in[i]);
      } else {
        parts[i] = static_cast<uint32_t>(Element<kType>::put(in[2 * i])) |
                   static_cast<uint32_t>(Element<kType>::put(in[2 * i + 1])) << 16;
      }
    }
    return make_uint4(parts[0], parts[1], parts[2], parts[3]);
  }
};

// The sum of several words in f32; the first term is taken as it is, so that a sum of one row is
// that row to the bit.
template <typename Word>
struct Sum {
  float at[Word::kElements];
  bool empty = true;

  __device__ void add(typename Word::Type word) {
    float term[Word::kElements];
    Word::unpack(word, term);
#pragma unroll
    for (int i = 0; i < Word::kElements; ++i) at[i] = empty ? term[i] : at[i] + term[i];
    empty = false;
  }

  __device__ typename Word::Type rounded() const {
    float value[Word::kElements];
#pragma unroll
    for (int i = 0; i < Word::kElements; ++i) value[i] = empty ? 0.0f : at[i];
    return Word::pack(value);
  }
};

// Adds this rank's rows of one token in the order of k, at one word of the row. All lanes of a wave
// come here together; lanes beyond the row's end pass `inside` = false.
template <typename Word>
__device__ inline void add_routes(const int32_t* routes, const Sizes& sizes, const std::byte* rows,
                                  int64_t word, bool inside, Sum<Word>& sum) {
  using Type = typename Word::Type;
  for (int k0 = 0; k0 < sizes.top_k; k0 += kSumRows) {
    const int lane = lane_id();
    const bool named = lane < kSumRows && k0 + lane < sizes.top_k;
    int32_t route = named ? routes[k0 + lane] : -1;
    if (route >= sizes.capacity) route = -1;
    const auto here = static_cast<uint32_t>(ballot(route >= 0));
    Type read[kSumRows];
#pragma unroll
    for (int j = 0; j < kSumRows; ++j) {
      const int32_t row = from_lane(route, j);
      if (row >= 0 && inside) {
        read[j] = reinterpret_cast<const Type*>(rows + row * sizes.row_bytes)[word];
      }
    }
#pragma unroll
    for (int j = 0; j < kSumRows; ++j) {
      if ((here >> j & 1) != 0 && inside) sum.add(read[j]);
    }
  }
}

// Calls f<type>().
template <typename F>
void with_row_type(RowType type, F f) {
  if (type == RowType::kF32) f.template operator()<RowType::kF32>();
  if (type == RowType::kBF16) f.template operator()<RowType::kBF16>();
  if (type == RowType::kF16) f.template operator()<RowType::kF16>();
}

// The first error of f<Word>() over the words of all row types.
template <typename F>
gpuError_t for_all_words(F f) {
  for (const gpuError_t error : {f.template operator()<WideWord<RowType::kF32>>(),
                                 f.template operator()<NarrowWord<RowType::kF32>>(),
                                 f.template operator()<WideWord<RowType::kBF16>>(),
                                 f.template operator()<NarrowWord<RowType::kBF16>>(),
                                 f.template operator()<WideWord<RowType::kF16>>(),
                                 f.template operator()<NarrowWord<RowType::kF16>>()}) {
    if (error != gpuSuccess) return error;
  }
  return gpuSuccess;
}

}  // namespace moriep::gpu
