// What the exchanges and the fused call have in common: how a step begins, and how it ends.
#pragma once

#include <hip/hip_runtime.h>

#include "exchange.h"
#include "handle.h"
#include "kernels.h"
#include "launch.h"

namespace moriep::mori {

// One step as the kernels see it.
struct Prepared {
  const Handle* handle = nullptr;  // none where no rank has a token, on one node
  bool moves = false;              // whether any rank has a token
  gpu::Team team;
  gpu::Stepping step;
  int64_t row_bytes = 0;
  ArrivalSizes sizes;
};

Status launched(hipError_t error);
inline hipStream_t stream_of(const Call& call) { return static_cast<hipStream_t>(call.stream); }

Status prepare(Group& group, const Call& call, Kind kind, int64_t num_words, bool with_scalars,
               Prepared* out);
ShareArgs share_args(const Group& group, const Prepared& p);
// The beginning of a step, on one node and between nodes. `plan_flags` are what a combine needs.
Status begin_step(const Group& group, const Call& call, const Prepared& p, const ShareArgs& share,
                  const int32_t* plan_flags);
// What a plan keeps between nodes.
BetweenPlan between_plan(const Prepared& p, const Call& call, const Routing& routing);
BetweenArgs between_args(const Prepared& p, const Call& call, const Routing& routing);
// What MORI's kernels are told of a call beside what its handle says.
Launch launch_of(const Call& call, const Prepared& p, const Routing& routing);

// A send up to where its tokens, which are float8 already where they travel so, have come into
// MORI's buffers; the step goes on.
struct DispatchBuffers {
  const std::byte* x;    // [T, H]
  const float* weights;  // [T, K]
  const int32_t* words;  // [W]
  int64_t num_words;
  int32_t* all_words;  // [R, W]
  uint8_t* codes;      // [T, H] with the fp8 wire
  float* scales;       // [T, H / 128 rounded up]
};
Status dispatch(Group& group, const Call& call, const Routing& routing, const DispatchBuffers& at,
                Prepared* out);

// Ends a step whose results are where they shall be, or that moves nothing but its words.
Status end_step(const Group& group, const Call& call, const Prepared& p);

}  // namespace moriep::mori
