// Rows to what AITER's kernels multiply: codes and their scales, by the rules of
// jax_moriep/schemes.py. Rows are bfloat16, or what the fp8 wire has brought. A wave has one row,
// whose address the scalar unit knows then, and a lane 16 values of it at a time.
#include "gpu/fp8.h"
#include "gpu/rows.h"
#include "kernels.h"

namespace moriep::aiter {
namespace {

using gpu::Fp8Scale;
using gpu::kThreads;
using gpu::kWave;

// Vectors of the compiler's, for which the processor has instructions.
using Halves = uint16_t __attribute__((ext_vector_type(2)));
using Floats = float __attribute__((ext_vector_type(2)));

constexpr int kElements = 16;  // that a lane handles at once
constexpr int kPairs = kElements / 2;
constexpr int kGroupLanes = kScaleBlock / kElements;
constexpr Fp8Format kFormat = Fp8Format::kE4M3FNUZ;
// A larger value could be rounded to one that bfloat16 does not have.
constexpr uint32_t kLargestBits = 0x7f700000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

__device__ Halves as_halves(uint32_t bits) { return __builtin_bit_cast(Halves, bits); }
__device__ Halves larger(Halves a, Halves b) { return __builtin_elementwise_max(a, b); }

#if defined(__HIP_DEVICE_COMPILE__)
// The bits of another lane among 16, in a way that the processor has for its operands.
enum Way : int { kNeighbour = 0xb1, kNextPair = 0x4e, kMirrored8 = 0x141, kRotated8 = 0x128 };
template <Way kWay>
__device__ uint32_t from_other(uint32_t bits) {
  return static_cast<uint32_t>(
      __builtin_amdgcn_update_dpp(0, static_cast<int>(bits), kWay, 0xf, 0xf, false));
}
__device__ uint32_t in_lane(uint32_t bits, int lane) {
  return static_cast<uint32_t>(__builtin_amdgcn_readlane(static_cast<int>(bits), lane));
}
__device__ uint32_t add_codes(Floats values, uint32_t codes, bool high) {
  const auto old = static_cast<int>(codes);
  return static_cast<uint32_t>(
      high ? __builtin_amdgcn_cvt_pk_fp8_f32(values.x, values.y, old, true)
           : __builtin_amdgcn_cvt_pk_fp8_f32(values.x, values.y, old, false));
}
#else
enum Way : int { kNeighbour, kNextPair, kMirrored8, kRotated8 };
template <Way kWay>
__device__ uint32_t from_other(uint32_t bits) {
  return bits;
}
__device__ uint32_t in_lane(uint32_t bits, int) { return bits; }
__device__ uint32_t add_codes(Floats, uint32_t codes, bool) { return codes; }
#endif

// The largest of the 8 lanes that have a group of columns, in all of them.
__device__ uint32_t largest_of_group(uint32_t bits) {
  static_assert(kGroupLanes == 8);
  bits = max(bits, from_other<kNeighbour>(bits));
  bits = max(bits, from_other<kNextPair>(bits));
  return max(bits, from_other<kMirrored8>(bits));
}

__device__ uint32_t largest_of_wave(uint32_t bits) {
  bits = largest_of_group(bits);
  bits = max(bits, from_other<kRotated8>(bits));
  return max(max(in_lane(bits, 0), in_lane(bits, 16)), max(in_lane(bits, 32), in_lane(bits, 48)));
}

// The row of an item, or -1.
__device__ int32_t row_of(const QuantiseArgs& args, int32_t item) {
  if (args.pairs == nullptr) {
    const int32_t count = args.count == nullptr ? args.num_rows : gpu::load_uniform(args.count);
    return item < min(count, args.num_rows) ? item : -1;
  }
  if (item >= gpu::load_uniform(args.valid)) return -1;
  const auto row = static_cast<int32_t>(gpu::load_uniform(args.pairs + item));
  return row >= 0 && row < args.num_rows ? row : -1;
}

__device__ Halves largest_halves(uint4 word, uint32_t mask) {
  return larger(larger(as_halves(word.x & mask), as_halves(word.y & mask)),
                larger(as_halves(word.z & mask), as_halves(word.w & mask)));
}

// Sixteen values of a row: bfloat16 in pairs, or codes of the wire and their scale.
template <bool kFromWire>
struct Values;

template <>
struct Values<false> {
  uint4 words[2];

  __device__ Values(const QuantiseArgs& args, uint64_t row, uint32_t i) {
    const auto* from = reinterpret_cast<const uint4*>(args.x + row * args.hidden * 2) + 2 * i;
    words[0] = from[0];
    words[1] = from[1];
  }
  // The bits of the largest magnitude; infinity and NaN are larger than all numbers.
  __device__ uint32_t largest() const {
    const uint32_t mask = 0x7fff7fffu;
    const Halves found = larger(largest_halves(words[0], mask), largest_halves(words[1], mask));
    return static_cast<uint32_t>(max(found.x, found.y)) << 16;
  }
  __device__ void scaled(float by, Floats* out) const {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t parts[4] = {words[w].x, words[w].y, words[w].z, words[w].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Floats pair{__uint_as_float(parts[i] << 16), __uint_as_float(parts[i] & 0xffff0000u)};
        out[4 * w + i] = pair * by;
      }
    }
  }
};

template <>
struct Values<true> {
  uint4 codes;
  float scale;

  __device__ Values(const QuantiseArgs& args, uint64_t row, uint32_t i) {
    codes = reinterpret_cast<const uint4*>(args.x + row * args.hidden)[i];
    scale = args.x_scales[row * (args.hidden / kScaleBlock) + i / kGroupLanes];
  }
  // Codes are ordered as their bits are; none of the wire's is a NaN.
  __device__ uint32_t largest() const {
    const uint32_t mask = 0x007f007fu;
    const uint4 shifted = make_uint4(codes.x >> 8, codes.y >> 8, codes.z >> 8, codes.w >> 8);
    const Halves found = larger(largest_halves(codes, mask), largest_halves(shifted, mask));
    const float value = gpu::fp8_decode<kFormat>(max(found.x, found.y)).x * scale;
    return __float_as_uint(value) & 0x7fffffffu;
  }
  __device__ void scaled(float by, Floats* out) const {
    const uint32_t parts[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 low = gpu::fp8_decode<kFormat>(parts[i] & 0xffffu);
      const float2 high = gpu::fp8_decode<kFormat>(parts[i] >> 16);
      out[2 * i] = Floats{low.x, low.y} * scale * by;
      out[2 * i + 1] = Floats{high.x, high.y} * scale * by;
    }
  }
};

template <typename Source>
__device__ uint4 as_fp8(const Source& source, uint32_t largest, Fp8Scale scale) {
  if (scale.inverse == 0) return make_uint4(0, 0, 0, 0);
  const float inverse = __uint_as_float(scale.inverse);
  Floats scaled[kPairs];
  source.scaled(inverse, scaled);
  if (largest > kLargestBits) {
    const float most = __uint_as_float(kLargestBits) * inverse;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      scaled[i].x = fminf(fmaxf(scaled[i].x, -most), most);
      scaled[i].y = fminf(fmaxf(scaled[i].y, -most), most);
    }
  }
  const auto four = [&](int i) {
    return add_codes(scaled[i + 1], add_codes(scaled[i], 0, false), true);
  };
  return make_uint4(four(0), four(2), four(4), four(6));
}

// By a division: a product with the reciprocal would be off by one code at times.
template <typename Source>
__device__ uint4 as_int8(const Source& source, float scale) {
  Floats values[kPairs];
  source.scaled(1.0f, values);
  const auto byte = [&](float value) {
    return static_cast<uint32_t>(static_cast<int32_t>(rintf(value / scale))) & 0xffu;
  };
  const auto four = [&](int i) {
    return byte(values[i].x) | byte(values[i].y) << 8 | byte(values[i + 1].x) << 16 |
           byte(values[i + 1].y) << 24;
  };
  return make_uint4(four(0), four(2), four(4), four(6));
}

template <Scheme kScheme, bool kFromWire>
__device__ void quantise_row(const QuantiseArgs& args, uint64_t row) {
  using Source = Values<kFromWire>;
  constexpr bool kBlocks = kScheme == Scheme::kFp8Block;
  constexpr bool kInt8 = kScheme == Scheme::kInt8Token;
  const auto lane = static_cast<uint32_t>(gpu::lane_id());
  const uint32_t num_words = args.hidden / kElements;
  auto* codes = reinterpret_cast<uint4*>(args.codes + row * args.hidden);
  auto* out = reinterpret_cast<uint4*>(args.out + row * args.hidden * 2);
  float* scales = args.scales + row * args.scales_per_row;
  uint32_t largest = 0;
  Fp8Scale scale{};
  uint32_t start = 0;
  bool starts = args.clear;
  if constexpr (!kBlocks) {
    for (uint32_t i = lane; i < num_words; i += kWave) {
      largest = max(largest, Source(args, row, i).largest());
    }
    largest = largest_of_wave(largest);
    scale = gpu::fp8_scale<kFormat>(largest);
    if (kInt8 && scale.inverse != 0) {
      scale.scale = __float_as_uint(__uint_as_float(largest) / 127.0f);
    }
    if (lane == 0) scales[0] = __uint_as_float(scale.scale);
    if (kInt8 && largest >= kInfinityBits) {
      start = ~0u;
      starts = true;
    }
  } else if constexpr (kFromWire) {
    // The wire has the same rule, so the codes are as they shall be.
    const uint32_t num_groups = args.hidden / kScaleBlock;
    for (uint32_t g = lane; g < num_groups; g += kWave) {
      scales[g * args.scales_per_group] = args.x_scales[row * num_groups + g];
    }
  }
  for (uint32_t i = lane; i < num_words; i += kWave) {
    if constexpr (!kBlocks || !kFromWire) {
      const Source source(args, row, i);
      if constexpr (kBlocks) {
        largest = largest_of_group(source.largest());
        scale = gpu::fp8_scale<kFormat>(largest);
        if (i % kGroupLanes == 0) {
          scales[i / kGroupLanes * args.scales_per_group] = __uint_as_float(scale.scale);
        }
      }
      if constexpr (kInt8) {
        const float step = __uint_as_float(scale.scale);
        codes[i] = scale.inverse == 0 ? make_uint4(0, 0, 0, 0) : as_int8(source, step);
      } else {
        codes[i] = as_fp8(source, largest, scale);
      }
    }
    if (starts) out[2 * i] = out[2 * i + 1] = make_uint4(start, start, start, start);
  }
}

template <Scheme kScheme, bool kFromWire>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const QuantiseArgs args) {
  const auto item = static_cast<int32_t>(blockIdx.x * (kThreads / kWave)) + gpu::wave_of_block();
  if (const int32_t row = row_of(args, item); row >= 0)
    quantise_row<kScheme, kFromWire>(args, static_cast<uint64_t>(row));
}

// Calls f<scheme, whether rows come over the wire>().
template <typename F>
void with_scheme(Scheme scheme, bool from_wire, F f) {
  const auto with_source = [&]<Scheme kScheme>() {
    if (from_wire) {
      f.template operator()<kScheme, true>();
    } else {
      f.template operator()<kScheme, false>();
    }
  };
  if (scheme == Scheme::kFp8Block) with_source.template operator()<Scheme::kFp8Block>();
  if (scheme == Scheme::kFp8Token) with_source.template operator()<Scheme::kFp8Token>();
  if (scheme == Scheme::kInt8Token) with_source.template operator()<Scheme::kInt8Token>();
}

}  // namespace

gpuError_t launch_quantise(gpuStream_t stream, Scheme scheme, int32_t num_items,
                           const QuantiseArgs& args) {
  constexpr int32_t kWavesPerBlock = kThreads / kWave;
  if (num_items == 0) return gpuSuccess;
  const int32_t blocks = (num_items + kWavesPerBlock - 1) / kWavesPerBlock;
  with_scheme(scheme, args.x_scales != nullptr, [&]<Scheme kScheme, bool kFromWire>() {
    quantise_kernel<kScheme, kFromWire><<<blocks, kThreads, 0, stream>>>(args);
  });
  return gpuGetLastError();
}

gpuError_t preload_quantise() {
  gpuError_t first = gpuSuccess;
  for (const Scheme scheme : {Scheme::kFp8Block, Scheme::kFp8Token, Scheme::kInt8Token}) {
    for (const bool from_wire : {false, true}) {
      with_scheme(scheme, from_wire, [&]<Scheme kScheme, bool kFromWire>() {
        gpuFuncAttributes found;
        const gpuError_t error = gpuFuncGetAttributes(
            &found, reinterpret_cast<const void*>(quantise_kernel<kScheme, kFromWire>));
        if (first == gpuSuccess) first = error;
      });
    }
  }
  return first;
}

}  // namespace moriep::aiter
