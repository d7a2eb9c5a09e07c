// The arrays that each exchange reads and writes on one rank; on a GPU they are the device's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moriep {

struct DispatchBuffers {
  const std::byte* x;    // [T, H]
  const int32_t* ids;    // [T, K]
  const float* weights;  // [T, K]
  std::byte* rows;       // [C, H]
  float* row_weights;    // [C]
  int32_t* group_sizes;  // [L]
  int32_t* routes;       // [R, T, K]
  int32_t* places;       // [R, T]
  const int32_t* words;  // [W]
  int32_t* all_words;    // [R, W]
};

struct ReplayBuffers {
  const std::byte* x;     // [T, H]
  const int32_t* routes;  // [R, T, K]
  const int32_t* ids;     // [T, K]
  std::byte* rows;        // [C, H]
};

struct CombineBuffers {
  const std::byte* rows;  // [C, H]
  const float* scalars;   // [C], or null
  const int32_t* routes;  // [R, T, K]
  const int32_t* places;  // [R, T]
  const int32_t* ids;     // [T, K]
  std::byte* y;           // [T, H]
  float* token_scalars;   // [T, K], or null
};

}  // namespace moriep
