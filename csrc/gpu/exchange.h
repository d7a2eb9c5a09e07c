// The three exchanges of one rank on a GPU: what cpu/exchange.h does, enqueued on a stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "group.h"
#include "moriep/buffers.h"
#include "moriep/plan.h"
#include "moriep/row_type.h"
#include "moriep/status.h"
#include "moriep/wire.h"

namespace moriep::gpu {

// Which part of a step to enqueue. A program enqueues both; tests that run several ranks on one
// stream enqueue the first phase of all ranks before the second of any.
enum class Phase { kBoth, kFirst, kSecond };

// What every exchange is told. All pointers are the device's.
struct Call {
  Shape shape;
  RowType type = RowType::kF32;
  Wire wire = Wire::kRows;              // of a dispatch
  Delivery delivery = Delivery::kPull;  // of a dispatch and a replay
  std::string_view config;
  const int32_t* rank = nullptr;   // [1]
  int32_t first_rank = 0;          // what the program calls the group's rank 0
  const int32_t* order = nullptr;  // [1]
  int32_t* order_out = nullptr;    // [1]
  Phase phase = Phase::kBoth;
  void* stream = nullptr;
};

Status dispatch(LocalRank& me, const Call& call, const DispatchBuffers& at);
Status replay(LocalRank& me, const Call& call, const ReplayBuffers& at);
Status combine(LocalRank& me, const Call& call, const CombineBuffers& at);

// Loads all kernels on a rank's device, which is the current one, and sets how many blocks of them
// run.
Status preload_kernels(LocalRank& me);

}  // namespace moriep::gpu
