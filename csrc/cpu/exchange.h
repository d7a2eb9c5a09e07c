// The three exchanges of one rank: dispatch (pull), replay (pull along a known plan), combine
// (push).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "group.h"
#include "moriep/plan.h"
#include "moriep/status.h"
#include "rows.h"

namespace moriep {

// What every exchange is told.
struct Call {
  Shape shape;
  RowType type = RowType::kF32;
  int32_t order = 0;
  std::string config;
};

struct DispatchBuffers {
  const std::byte* x;    // [T, H]
  const int32_t* ids;    // [T, K]
  const float* weights;  // [T, K]
  std::byte* rows;       // [C, H]
  float* row_weights;    // [C]
  int32_t* group_sizes;  // [L]
  int32_t* routes;       // [R, T, K]
  int32_t* slots;        // [R, T]
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
  const int32_t* slots;   // [R, T]
  const int32_t* ids;     // [T, K]
  std::byte* y;           // [T, H]
  float* token_scalars;   // [T, K], or null
};

Status dispatch(LocalRank& me, const Call& call, const DispatchBuffers& at);
Status replay(LocalRank& me, const Call& call, const ReplayBuffers& at);
Status combine(LocalRank& me, const Call& call, const CombineBuffers& at);

}  // namespace moriep
