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

constexpr int kElements = 16;  // that a lane handles at once, which are a word
constexpr int kMostWords = 8;  // that a lane holds
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
// The bits of the last lane of the 16, or the 32, lanes before; 0 where these are none.
__device__ uint32_t from_last_of_16(uint32_t bits) {
  return static_cast<uint32_t>(
      __builtin_amdgcn_update_dpp(0, static_cast<int>(bits), 0x142, 0xa, 0xf, false));
}
__device__ uint32_t from_last_of_32(uint32_t bits) {
  return static_cast<uint32_t>(
      __builtin_amdgcn_update_dpp(0, static_cast<int>(bits), 0x143, 0xc, 0xf, false));
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
template <bool kHigh>
__device__ Floats decoded(uint32_t codes) {
  return __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), kHigh);
}
__device__ float near_inverse(float value) { return __builtin_amdgcn_rcpf(value); }
// The lowest bytes of four words.
__device__ uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t low = __builtin_amdgcn_perm(b, a, 0x0c0c0400u);
  const uint32_t high = __builtin_amdgcn_perm(d, c, 0x0c0c0400u);
  return __builtin_amdgcn_perm(high, low, 0x05040100u);
}
#else
enum Way : int { kNeighbour, kNextPair, kMirrored8, kRotated8 };
template <Way kWay>
__device__ uint32_t from_other(uint32_t bits) {
  return bits;
}
__device__ uint32_t from_last_of_16(uint32_t bits) { return bits; }
__device__ uint32_t from_last_of_32(uint32_t bits) { return bits; }
__device__ uint32_t in_lane(uint32_t bits, int) { return bits; }
__device__ uint32_t add_codes(Floats, uint32_t codes, bool) { return codes; }
template <bool kHigh>
__device__ Floats decoded(uint32_t) {
  return {};
}
__device__ float near_inverse(float value) { return value; }
__device__ uint32_t low_bytes(uint32_t a, uint32_t, uint32_t, uint32_t) { return a; }
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
  bits = max(bits, from_last_of_16(bits));
  bits = max(bits, from_last_of_32(bits));
  return in_lane(bits, kWave - 1);
}

// The row of an item, or -1.
__device__ int32_t row_of(const QuantiseArgs& args, int32_t item) {
  if (args.end != nullptr && item >= gpu::load_uniform(args.end)) return -1;
  auto row = static_cast<uint32_t>(item);
  if (args.pairs != nullptr) row = gpu::load_uniform(args.pairs + item);
  return row < static_cast<uint32_t>(args.num_rows) ? static_cast<int32_t>(row) : -1;
}

// Where something lies, by a number of bytes in 32 bits: AITER's kernels count rows so as well.
template <typename T>
__device__ T& at_byte(const std::byte* base, uint32_t offset) {
  return *reinterpret_cast<T*>(const_cast<std::byte*>(base) + offset);
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

  __device__ void load(const QuantiseArgs& args, uint32_t row, uint32_t i) {
    const uint32_t at = row * args.hidden * 2 + i * 32;
    words[0] = at_byte<const uint4>(args.x, at);
    words[1] = at_byte<const uint4>(args.x + 16, at);
  }
  // The bits of the largest magnitude; infinity and NaN are larger than all numbers.
  __device__ uint32_t largest() const {
    const uint32_t mask = 0x7fff7fffu;
    const Halves found = larger(largest_halves(words[0], mask), largest_halves(words[1], mask));
    return static_cast<uint32_t>(max(found.x, found.y)) << 16;
  }
  // Calls f(i, pair i of the values, what it is multiplied by).
  template <typename F>
  __device__ void each_pair(float by, F f) const {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint32_t parts[4] = {words[w].x, words[w].y, words[w].z, words[w].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(4 * w + i,
          Floats{__uint_as_float(parts[i] << 16), __uint_as_float(parts[i] & 0xffff0000u)}, by);
      }
    }
  }
};

template <>
struct Values<true> {
  uint4 codes;
  float scale;

  __device__ void load(const QuantiseArgs& args, uint32_t row, uint32_t i) {
    codes = at_byte<const uint4>(args.x, row * args.hidden + i * 16);
    scale = args.x_scales[row * (args.hidden / kScaleBlock) + i / kGroupLanes];
  }
  // Codes are ordered as their bits are; none of the wire's is a NaN.
  __device__ uint32_t largest() const {
    const Halves low = largest_halves(codes, 0x007f007fu);
    const Halves high = largest_halves(codes, 0x7f007f00u) >> 8;
    const Halves found = larger(low, high);
    const float value = gpu::fp8_decode<kFormat>(max(found.x, found.y)).x * scale;
    return __float_as_uint(value) & 0x7fffffffu;
  }
  template <typename F>
  __device__ void each_pair(float by, F f) const {
    // Codes that this makes nothing of become zeros in any case.
    by *= scale;
    const uint32_t parts[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f(2 * i, decoded<false>(parts[i]), by);
      f(2 * i + 1, decoded<true>(parts[i]), by);
    }
  }
};

template <typename Source>
__device__ uint4 as_fp8(const Source& source, uint32_t largest, Fp8Scale scale) {
  if (scale.inverse == 0) return make_uint4(0, 0, 0, 0);
  const float inverse = __uint_as_float(scale.inverse);
  Floats scaled[kPairs];
  source.each_pair(inverse, [&](int i, Floats pair, float by) { scaled[i] = pair * by; });
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

// What values are multiplied by, so that the product is rounded to the same whole number as the f32
// quotient value / step, where step = largest / 127 in f32.
//
// A value has 8 significant bits at most and so has the largest. So the exact quotient is half an
// odd number, or further from each of these than 2^-16 of itself, which neither this factor's error
// nor the f32 quotient's makes up for. It is half an odd number for values of half the
// largest, 63.5, where step's own rounding decides: the factor is moved to the side of the f32
// quotient. With more values it is where the largest is 254 * 2^n, and there step is a power of two
// and all is exact.
__device__ float int8_factor(float largest, float step) {
  const uint32_t bits = __float_as_uint(step);
  if ((bits & 0x7fffffu) == 0) return __uint_as_float((254u << 23) - bits);
  // The f32 quotient is 63.5 unless it is more than half of its last bit, 2^-19, below.
  const bool below = fmaf(-127.0f, step, largest) < step * -0x1p-18f;
  return near_inverse(step) * (below ? 1.0f - 0x1p-20f : 1.0f + 0x1p-20f);
}

template <typename Source>
__device__ uint4 as_int8(const Source& source, float factor) {
  // Sums with it have no bits below 1, and whole numbers in their last byte.
  constexpr float kWhole = 0x1.8p23f;
  uint32_t bytes[kElements];
  source.each_pair(factor, [&](int i, Floats pair, float by) {
    const Floats sums = __builtin_elementwise_fma(pair, Floats{by, by}, Floats{kWhole, kWhole});
    bytes[2 * i] = __float_as_uint(sums.x);
    bytes[2 * i + 1] = __float_as_uint(sums.y);
  });
  const auto four = [&](int i) {
    return low_bytes(bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]);
  };
  return make_uint4(four(0), four(4), four(8), four(12));
}

// Sixteen results, to which AITER's kernels add.
__device__ void start_sums(const QuantiseArgs& args, uint32_t row, uint32_t i, uint32_t bits) {
  const uint32_t at = row * args.hidden * 2 + i * 32;
  const uint4 word = make_uint4(bits, bits, bits, bits);
  at_byte<uint4>(args.out, at) = word;
  at_byte<uint4>(args.out + 16, at) = word;
}

__device__ void put_codes(const QuantiseArgs& args, uint32_t row, uint32_t i, uint4 word) {
  at_byte<uint4>(reinterpret_cast<const std::byte*>(args.codes), row * args.hidden + i * 16) = word;
}

// A row with a scale for each 128 columns.
template <bool kFromWire>
__device__ void quantise_blocks(const QuantiseArgs& args, uint32_t row) {
  const auto lane = static_cast<uint32_t>(gpu::lane_id());
  const uint32_t num_words = args.hidden / kElements;
  float* scales = args.scales + row * args.scales_per_row;
  if constexpr (kFromWire) {
    // The wire has the same rule, so the codes are as they shall be.
    const uint32_t num_groups = args.hidden / kScaleBlock;
    for (uint32_t g = lane; g < num_groups; g += kWave) {
      scales[g * args.scales_per_group] = args.x_scales[row * num_groups + g];
    }
  }
  for (uint32_t i = lane; i < num_words; i += kWave) {
    if constexpr (!kFromWire) {
      Values<false> source;
      source.load(args, row, i);
      const uint32_t largest = largest_of_group(source.largest());
      const Fp8Scale scale = gpu::fp8_scale<kFormat>(largest);
      if (i % kGroupLanes == 0) {
        scales[i / kGroupLanes * args.scales_per_group] = __uint_as_float(scale.scale);
      }
      put_codes(args, row, i, as_fp8(source, largest, scale));
    }
    if (args.clear) start_sums(args, row, i, 0);
  }
}

// A row with one scale. A lane holds all its words if kWords are enough, which they are unless they
// are kMostWords: then all are on the way at once, and read once.
template <bool kInt8, bool kFromWire, int kWords>
__device__ void quantise_whole(const QuantiseArgs& args, uint32_t row) {
  constexpr uint32_t kChunk = kWords * kWave;
  constexpr bool kFits = kWords < kMostWords;
  const auto lane = static_cast<uint32_t>(gpu::lane_id());
  const uint32_t num_words = args.hidden / kElements;
  Values<kFromWire> held[kWords];
  const auto load = [&](uint32_t first) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      // The last word again where there is none: it changes no maximum.
      held[w].load(args, row, min(first + lane + w * kWave, num_words - 1));
    }
  };
  uint32_t largest = 0;
  for (uint32_t first = 0; first == 0 || (!kFits && first < num_words); first += kChunk) {
    load(first);
#pragma unroll
    for (int w = 0; w < kWords; ++w) largest = max(largest, held[w].largest());
  }
  largest = largest_of_wave(largest);
  Fp8Scale scale = gpu::fp8_scale<kFormat>(largest);
  float factor = 0;
  if (kInt8 && scale.inverse != 0) {
    const float step = __uint_as_float(largest) / 127.0f;
    scale.scale = __float_as_uint(step);
    factor = int8_factor(__uint_as_float(largest), step);
  }
  if (lane == 0) args.scales[row * args.scales_per_row] = __uint_as_float(scale.scale);
  const bool is_nan = kInt8 && largest >= kInfinityBits;
  const bool starts = args.clear || is_nan;
  for (uint32_t first = 0; first == 0 || (!kFits && first < num_words); first += kChunk) {
    if (!kFits && num_words > kChunk) load(first);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t i = first + lane + w * kWave;
      if (i >= num_words) break;
      if (scale.inverse == 0) {
        put_codes(args, row, i, make_uint4(0, 0, 0, 0));
      } else if constexpr (kInt8) {
        put_codes(args, row, i, as_int8(held[w], factor));
      } else {
        put_codes(args, row, i, as_fp8(held[w], largest, scale));
      }
      if (starts) start_sums(args, row, i, is_nan ? ~0u : 0);
    }
  }
}

template <Scheme kScheme, bool kFromWire, int kWords>
__global__ void __launch_bounds__(kThreads) quantise_kernel(const QuantiseArgs args) {
  const auto item = static_cast<int32_t>(blockIdx.x * (kThreads / kWave)) + gpu::wave_of_block();
  const int32_t row = row_of(args, item);
  if (row < 0) return;
  if constexpr (kScheme == Scheme::kFp8Block) {
    quantise_blocks<kFromWire>(args, static_cast<uint32_t>(row));
  } else {
    quantise_whole<kScheme == Scheme::kInt8Token, kFromWire, kWords>(args,
                                                                     static_cast<uint32_t>(row));
  }
}

// Calls f<scheme, whether rows come over the wire, words that a lane holds>().
template <typename F>
void with_scheme(Scheme scheme, bool from_wire, int words, F f) {
  const auto with_words = [&]<Scheme kScheme, bool kFromWire>() {
    if constexpr (kScheme == Scheme::kFp8Block) {
      f.template operator()<kScheme, kFromWire, 1>();
    } else {
      if (words <= 1) return f.template operator()<kScheme, kFromWire, 1>();
      if (words <= 2) return f.template operator()<kScheme, kFromWire, 2>();
      if (words <= 4) return f.template operator()<kScheme, kFromWire, 4>();
      f.template operator()<kScheme, kFromWire, kMostWords>();
    }
  };
  const auto with_source = [&]<Scheme kScheme>() {
    if (from_wire) {
      with_words.template operator()<kScheme, true>();
    } else {
      with_words.template operator()<kScheme, false>();
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
  const auto words = static_cast<int>((args.hidden + kElements * kWave - 1) / (kElements * kWave));
  with_scheme(scheme, args.x_scales != nullptr, words,
              [&]<Scheme kScheme, bool kFromWire, int kWords>() {
                quantise_kernel<kScheme, kFromWire, kWords><<<blocks, kThreads, 0, stream>>>(args);
              });
  return gpuGetLastError();
}

gpuError_t preload_quantise() {
  gpuError_t first = gpuSuccess;
  for (const Scheme scheme : {Scheme::kFp8Block, Scheme::kFp8Token, Scheme::kInt8Token}) {
    for (const bool from_wire : {false, true}) {
      for (const int words : {1, 2, 4, kMostWords}) {
        with_scheme(scheme, from_wire, words, [&]<Scheme kScheme, bool kFromWire, int kWords>() {
          gpuFuncAttributes found;
          const gpuError_t error = gpuFuncGetAttributes(
              &found, reinterpret_cast<const void*>(quantise_kernel<kScheme, kFromWire, kWords>));
          if (first == gpuSuccess) first = error;
        });
      }
    }
  }
  return first;
}

}  // namespace moriep::aiter
