// How experts' weights and rows are quantised, as jax_moriep/schemes.py has it.
#pragma once

#include <cstdint>

namespace moriep::aiter {

enum class Scheme {
  kFp8Block,   // a scale for 128 x 128 weights, and for 128 columns of a row
  kFp8Token,   // a scale for each row of weights, and for each row
  kInt8Token,  // the same
};

inline constexpr int32_t kScaleBlock = 128;
// Rows of a block of AITER's kernels, all of one expert.
inline constexpr int32_t kBlockRows = 32;

}  // namespace moriep::aiter
