// The three exchanges of one rank: dispatch (pull), replay (pull along a known plan), combine
// (push).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "group.h"
#include "moriep/buffers.h"
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

Status dispatch(LocalRank& me, const Call& call, const DispatchBuffers& at);
Status replay(LocalRank& me, const Call& call, const ReplayBuffers& at);
Status combine(LocalRank& me, const Call& call, const CombineBuffers& at);

}  // namespace moriep
