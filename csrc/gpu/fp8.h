// Float8 numbers inside kernels: the codes of both formats, and the scale of a group.
//
// A scale is a power of two, the smallest that brings the largest value of its group into the
// format's range. So scaling is exact, no division and no order of operations can make platforms
// differ, and a code times its scale is exact in every row type that does not underflow.
#pragma once

#include "gpu_runtime.h"
#include "moriep/wire.h"

#if !defined(__HIP__) && !defined(__HIP_PLATFORM_AMD__)
#include <cuda_fp8.h>
#endif

namespace moriep::gpu {

#if defined(__HIP__) || defined(__HIP_PLATFORM_AMD__)
inline constexpr Fp8Format kWireFormat = Fp8Format::kE4M3FNUZ;
#else
inline constexpr Fp8Format kWireFormat = Fp8Format::kE4M3FN;
#endif

// Groups of which every value is smaller count as zeros: below lie numbers that some platforms
// flush to zero and others do not.
inline constexpr uint32_t kSmallestBits = (127u - 100u) << 23;

// The largest value is kLargest = (1 + kMantissa / 2^23) * 2^kTop; codes have this exponent bias.
template <Fp8Format kFormat>
struct Fp8Numbers;
template <>
struct Fp8Numbers<Fp8Format::kE4M3FN> {
  static constexpr int kBias = 7;
  static constexpr uint32_t kTop = 8;
  static constexpr uint32_t kMantissa = 0x600000;  // 448
};
template <>
struct Fp8Numbers<Fp8Format::kE4M3FNUZ> {
  static constexpr int kBias = 8;
  static constexpr uint32_t kTop = 7;
  static constexpr uint32_t kMantissa = 0x700000;  // 240
};

// What a group is divided by, and multiplied by instead. Codes are zeros where the inverse is.
struct Fp8Scale {
  uint32_t scale;
  uint32_t inverse;
};

// From the bits of the largest magnitude of a group. A group with an infinity or a NaN is NaN, all
// of it.
template <Fp8Format kFormat>
__device__ inline Fp8Scale fp8_scale(uint32_t largest) {
  using Numbers = Fp8Numbers<kFormat>;
  if (largest < kSmallestBits) return {0, 0};
  if (largest >= 0x7f800000u) return {0x7fc00000u, 0};
  // A mantissa beyond the format's largest takes the next power of two.
  const uint32_t exponent = ((largest + (0x7fffffu - Numbers::kMantissa)) >> 23) - Numbers::kTop;
  return {exponent << 23, (254u - exponent) << 23};
}

// Codes by integer arithmetic, exact and to nearest even, for values in the format's range.
template <Fp8Format kFormat>
__device__ inline uint32_t fp8_encode_exactly(float value) {
  using Numbers = Fp8Numbers<kFormat>;
  const uint32_t bits = __float_as_uint(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude < static_cast<uint32_t>(128 - Numbers::kBias) << 23) {
    // Below the smallest normal number steps are equal; adding brings them to a float's last bits.
    const float step_bits = __uint_as_float(static_cast<uint32_t>(148 - Numbers::kBias) << 23);
    code = __float_as_uint(__uint_as_float(magnitude) + step_bits) & 0xfu;
  } else {
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
    code = (rounded >> 20) - (static_cast<uint32_t>(127 - Numbers::kBias) << 3);
  }
  const uint32_t sign = bits >> 31 << 7;
  return kFormat == Fp8Format::kE4M3FNUZ && code == 0 ? 0 : code | sign;
}

// The value of any code.
template <Fp8Format kFormat>
__device__ inline float fp8_decode_exactly(uint32_t code) {
  using Numbers = Fp8Numbers<kFormat>;
  const bool nan = kFormat == Fp8Format::kE4M3FN ? (code & 0x7f) == 0x7f : code == 0x80;
  if (nan) return __uint_as_float(0x7fc00000u);
  const float magnitude = __uint_as_float((code & 0x7fu) << 20) *
                          __uint_as_float(static_cast<uint32_t>(254 - Numbers::kBias) << 23);
  return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

// The same for two values, the first in the low byte, by the processor's own instruction where it
// has one for the format.
template <Fp8Format kFormat>
__device__ inline uint32_t fp8_encode(float first, float second) {
#if defined(__gfx942__)
  if constexpr (kFormat == Fp8Format::kE4M3FNUZ) {
    return static_cast<uint32_t>(__builtin_amdgcn_cvt_pk_fp8_f32(first, second, 0, false)) &
           0xffffu;
  }
#elif defined(__CUDA_ARCH__)
  if constexpr (kFormat == Fp8Format::kE4M3FN) {
    return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
  }
#endif
  return fp8_encode_exactly<kFormat>(first) | fp8_encode_exactly<kFormat>(second) << 8;
}

template <Fp8Format kFormat>
__device__ inline float2 fp8_decode(uint32_t codes) {
#if defined(__gfx942__)
  if constexpr (kFormat == Fp8Format::kE4M3FNUZ) {
    const auto pair = __builtin_amdgcn_cvt_pk_f32_fp8(static_cast<int>(codes), false);
    return make_float2(pair[0], pair[1]);
  }
#elif defined(__CUDA_ARCH__)
  if constexpr (kFormat == Fp8Format::kE4M3FN) {
    return __half22float2(
        __half2(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3)));
  }
#endif
  return make_float2(fp8_decode_exactly<kFormat>(codes & 0xffu),
                     fp8_decode_exactly<kFormat>(codes >> 8 & 0xffu));
}

}  // namespace moriep::gpu
