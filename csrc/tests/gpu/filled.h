// Rows of small whole numbers that follow from where they lie, and the check that they arrived:
// kernels, because the rows that are timed are many.
#pragma once

#include "names.h"

namespace moriep::gpu {

constexpr int kCheckThreads = 256;

// A whole number from -7 to 7, of which sums of eight are exact in bfloat16, and which float8
// holds exactly.
static __device__ float small(uint32_t seed, int64_t row, int64_t width, int64_t h) {
  uint32_t bits = static_cast<uint32_t>(row * width + h) * 2 + seed;
  bits = (bits ^ bits >> 16) * 0x7feb352du;
  bits = (bits ^ bits >> 15) * 0x846ca68bu;
  return static_cast<float>((bits ^ bits >> 16) % 15) - 7.0f;
}

static __device__ float value_of(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Rows of bfloat16, the first of which is number `first`; not numbers where nobody owns the row.
static __global__ void fill_kernel(uint16_t* rows, const int32_t* owners, int64_t width,
                                   int64_t first, uint32_t seed) {
  const auto row = static_cast<int64_t>(blockIdx.x);
  const bool owned = owners == nullptr || owners[row] >= 0;
  for (int64_t h = threadIdx.x; h < width; h += blockDim.x) {
    const uint32_t bits = __float_as_uint(small(seed, first + row, width, h));
    rows[row * width + h] = owned ? static_cast<uint16_t>(bits >> 16) : 0xffff;
  }
}

// Counts the numbers that are not those of the row's owner, or zero where it has none.
static __global__ void check_rows_kernel(const uint16_t* rows, const int32_t* owners, int64_t width,
                                         uint32_t seed, uint32_t* wrong) {
  const auto row = static_cast<int64_t>(blockIdx.x);
  const int32_t owner = owners[row];
  for (int64_t h = threadIdx.x; h < width; h += blockDim.x) {
    const float want = owner < 0 ? 0.0f : small(seed, owner, width, h);
    if (value_of(rows[row * width + h]) != want) atomicAdd(wrong, 1u);
  }
}

// Counts the numbers that are not the sum over the token's rows.
static __global__ void check_sums_kernel(const uint16_t* y, const int32_t* routes, int top_k,
                                         int64_t width, uint32_t seed, uint32_t* wrong) {
  const auto token = static_cast<int64_t>(blockIdx.x);
  for (int64_t h = threadIdx.x; h < width; h += blockDim.x) {
    float want = 0;
    for (int k = 0; k < top_k; ++k) want += small(seed, routes[token * top_k + k], width, h);
    if (!(value_of(y[token * width + h]) == want)) atomicAdd(wrong, 1u);
  }
}

}  // namespace moriep::gpu
