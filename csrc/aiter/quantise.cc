// Rows of bfloat16 to what AITER's kernels multiply: codes and their scales, by the rules of
// jax_moriep/schemes.py. A wave has a row.
#include "gpu/fp8.h"
#include "gpu/rows.h"
#include "kernels.h"

namespace moriep::aiter {
namespace {

using gpu::Fp8Scale;
using gpu::kThreads;
using gpu::kWave;

constexpr int kMaxBlocks = 2048;
constexpr int kElements = 8;  // that a lane handles at once
constexpr Fp8Format kFormat = Fp8Format::kE4M3FNUZ;
// A larger value could be rounded to one that bfloat16 does not have.
constexpr uint32_t kLargestBits = 0x7f700000u;
constexpr uint32_t kInfinityBits = 0x7f800000u;

using Word = gpu::WideWord<RowType::kBF16>;

// The largest of the bits of `lanes` lanes beside each other.
__device__ uint32_t largest_of_lanes(uint32_t bits, int lanes) {
  for (int reach = 1; reach < lanes; reach *= 2) {
    const int32_t other = gpu::from_lane(static_cast<int32_t>(bits), gpu::lane_id() ^ reach);
    bits = max(bits, static_cast<uint32_t>(other));
  }
  return bits;
}

__device__ uint32_t largest_of(const float* values) {
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) found = max(found, __float_as_uint(values[i]) & 0x7fffffffu);
  return found;
}

__device__ uint2 as_fp8(const float* values, uint32_t inverse_bits) {
  if (inverse_bits == 0) return make_uint2(0, 0);
  const float most = __uint_as_float(kLargestBits);
  const float inverse = __uint_as_float(inverse_bits);
  float scaled[kElements];
#pragma unroll
  for (int i = 0; i < kElements; ++i) scaled[i] = fminf(fmaxf(values[i], -most), most) * inverse;
  const auto four = [&](int i) {
    return gpu::fp8_encode<kFormat>(scaled[i], scaled[i + 1]) |
           gpu::fp8_encode<kFormat>(scaled[i + 2], scaled[i + 3]) << 16;
  };
  return make_uint2(four(0), four(4));
}

__device__ uint2 as_int8(const float* values, float scale) {
  const auto four = [&](int i) {
    uint32_t codes = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const auto code = static_cast<int32_t>(rintf(values[i + j] / scale));
      codes |= (static_cast<uint32_t>(code) & 0xffu) << (8 * j);
    }
    return codes;
  };
  return make_uint2(four(0), four(4));
}

// The row of an item, or -1.
__device__ int32_t row_of(const QuantiseArgs& args, int32_t item) {
  if (args.pairs == nullptr) {
    return item < min(gpu::load_uniform(args.count), args.num_rows) ? item : -1;
  }
  if (item >= gpu::load_uniform(args.valid)) return -1;
  const auto row = static_cast<int32_t>(gpu::load_uniform(args.pairs + item));
  return row >= 0 && row < args.num_rows ? row : -1;
}

template <Scheme kScheme>
__device__ void quantise_row(const QuantiseArgs& args, int32_t row) {
  const auto* from =
      reinterpret_cast<const uint4*>(args.x) + static_cast<int64_t>(row) * args.hidden / kElements;
  auto* to =
      reinterpret_cast<uint2*>(args.codes) + static_cast<int64_t>(row) * args.hidden / kElements;
  const int32_t num_words = args.hidden / kElements;
  float values[kElements];

  if constexpr (kScheme == Scheme::kFp8Block) {
    constexpr int kGroupLanes = kScaleBlock / kElements;
    for (int32_t i = gpu::lane_id(); i < num_words; i += kWave) {
      Word::unpack(from[i], values);
      const Fp8Scale scale =
          gpu::fp8_scale<kFormat>(largest_of_lanes(largest_of(values), kGroupLanes));
      to[i] = as_fp8(values, scale.inverse);
      if (i % kGroupLanes == 0) {
        args.scales[static_cast<int64_t>(i / kGroupLanes) * args.num_rows + row] =
            __uint_as_float(scale.scale);
      }
    }
  } else {
    uint32_t largest = 0;
    for (int32_t i = gpu::lane_id(); i < num_words; i += kWave) {
      Word::unpack(from[i], values);
      largest = max(largest, largest_of(values));
    }
    largest = largest_of_lanes(largest, kWave);
    Fp8Scale scale = gpu::fp8_scale<kFormat>(largest);
    if (kScheme == Scheme::kInt8Token && scale.inverse != 0) {
      scale.scale = __float_as_uint(__uint_as_float(largest) / 127.0f);
    }
    for (int32_t i = gpu::lane_id(); i < num_words; i += kWave) {
      Word::unpack(from[i], values);
      if constexpr (kScheme == Scheme::kInt8Token) {
        to[i] =
            scale.inverse == 0 ? make_uint2(0, 0) : as_int8(values, __uint_as_float(scale.scale));
      } else {
        to[i] = as_fp8(values, scale.inverse);
      }
    }
    if (gpu::lane_id() == 0) args.scales[row] = __uint_as_float(scale.scale);
    if (kScheme == Scheme::kInt8Token && largest >= kInfinityBits) {
      auto* out =
          reinterpret_cast<uint4*>(args.out) + static_cast<int64_t>(row) * args.hidden / kElements;
      for (int32_t i = gpu::lane_id(); i < num_words; i += kWave)
        out[i] = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
  }
}

template <Scheme kScheme>
__global__ void __launch_bounds__(kThreads)
    quantise_kernel(const QuantiseArgs args, int32_t num_items) {
  const auto waves = static_cast<int32_t>(gpu::num_waves());
  for (auto i = static_cast<int32_t>(gpu::wave_index()); i < num_items; i += waves) {
    if (const int32_t row = row_of(args, i); row >= 0) quantise_row<kScheme>(args, row);
  }
}

template <typename F>
void with_scheme(Scheme scheme, F f) {
  if (scheme == Scheme::kFp8Block) f.template operator()<Scheme::kFp8Block>();
  if (scheme == Scheme::kFp8Token) f.template operator()<Scheme::kFp8Token>();
  if (scheme == Scheme::kInt8Token) f.template operator()<Scheme::kInt8Token>();
}

}  // namespace

gpuError_t launch_quantise(gpuStream_t stream, Scheme scheme, int32_t num_items,
                           const QuantiseArgs& args) {
  constexpr int32_t kWavesPerBlock = kThreads / kWave;
  if (num_items == 0) return gpuSuccess;
  const int32_t wanted = (num_items + kWavesPerBlock - 1) / kWavesPerBlock;
  const int blocks = wanted < kMaxBlocks ? wanted : kMaxBlocks;
  with_scheme(scheme, [&]<Scheme kScheme>() {
    quantise_kernel<kScheme><<<blocks, kThreads, 0, stream>>>(args, num_items);
  });
  return gpuGetLastError();
}

gpuError_t preload_quantise() {
  gpuError_t first = gpuSuccess;
  for (const Scheme scheme : {Scheme::kFp8Block, Scheme::kFp8Token, Scheme::kInt8Token}) {
    with_scheme(scheme, [&]<Scheme kScheme>() {
      gpuFuncAttributes found;
      const gpuError_t error =
          gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(quantise_kernel<kScheme>));
      if (first == gpuSuccess) first = error;
    });
  }
  return first;
}

}  // namespace moriep::aiter
