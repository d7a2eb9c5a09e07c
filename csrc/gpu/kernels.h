// The kernels of the GPU transport: what each takes, and how it is launched. None of them
// synchronises with the host, allocates, or depends on what the host has counted.
#pragma once

#include "arrivals.h"
#include "gpu_runtime.h"
#include "moriep/wire.h"
#include "team.h"

namespace moriep::gpu {

// Where what a rank has published in a dispatch or a replay lies; the offsets are those of
// layout.h. Receivers that pull find it in its owner's half. What is put lies in the receiver's
// half, in the owner's part of it.
struct Staged {
  int64_t ids;
  int64_t weights;
  int64_t words;
  int64_t rows;
  int64_t row_stride;
  int64_t row_scales;  // of the scales in a row that travels as float8
  int64_t part_bytes;  // of each part; 0 where receivers pull
};

// First phase of dispatch and replay: publishes the tokens that other ranks need and, where
// `weights` is given, the routing and the words; then signals. Stage copies all of it once, to this
// rank's half; put writes to each rank what that one needs.
struct StageArgs {
  Team team;
  Sizes sizes;
  Stepping step;
  Staged staged;
  const std::byte* x;
  const int32_t* ids;
  const float* weights;  // or null: replay
  const int32_t* words;
};
gpuError_t launch_stage(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                        const StageArgs& args);
gpuError_t launch_put(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                      const StageArgs& args);

// Second phase of dispatch, first: every route of the group gets its row, and this rank every
// rank's words. Two launches: count the routes of each chunk, then place them.
struct PlanArgs {
  Team team;
  Sizes sizes;
  Stepping step;
  Staged staged;
  const int32_t* ids;    // this rank's own [T, K]
  const float* weights;  // this rank's own [T, K]
  int32_t tokens_per_chunk;
  int32_t chunks_per_node;
  int32_t* counts;    // workspace: [chunks, L]
  uint32_t* written;  // workspace: a bit for each row
  int32_t* routes;
  int32_t* places;
  int32_t* group_sizes;
  float* row_weights;
  const int32_t* words;  // this rank's own [W]
  int32_t* all_words;    // [R, W]
};
int plan_chunk_routes(int num_local_experts);
gpuError_t launch_plan(gpuStream_t stream, const PlanArgs& args);

// Second phase of replay, first: marks the rows that a known plan names.
struct MarkArgs {
  Team team;
  Sizes sizes;
  Stepping step;
  const int32_t* routes;
  uint32_t* written;
};
gpuError_t launch_mark(gpuStream_t stream, const MarkArgs& args);

// Second phase of dispatch and replay, last: reads every token that has rows here once and writes
// all its rows; clears the rows that nobody owns.
struct PullArgs {
  Team team;
  Sizes sizes;
  Stepping step;
  Staged staged;
  const std::byte* x;  // this rank's own tokens are read where they are
  const int32_t* routes;
  const uint32_t* written;
  std::byte* rows;
  float* row_weights;  // or null: replay
};
gpuError_t launch_pull(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                       const PullArgs& args);

// Alone, for whoever sends tokens otherwise: x [T, H] to codes u8[T, H] and scales f32[T, groups].
gpuError_t launch_quantise(gpuStream_t stream, const std::byte* x, RowType type, int64_t num_tokens,
                           int64_t hidden_size, uint8_t* codes, float* scales, Fp8Format format);

// The same of arrivals, local to this rank. The sort: three launches, the first of which finds the
// place of each token.
struct ArrivalPlanArgs {
  Sizes sizes;
  Arrivals arrivals;
  const int32_t* ids;    // [N, K]
  const float* weights;  // [N, K]
  const int32_t* rank;   // [1], as the program computes it
  int32_t tokens_per_chunk;
  int32_t chunks_per_node;
  int32_t* counts;    // workspace: [chunks, L]
  uint32_t* written;  // workspace: a bit for each row
  int32_t* places;    // workspace: [R, T], where each token has come to, -1 for nowhere
  int32_t* routes;
  int32_t* group_sizes;
  float* row_weights;
};
gpuError_t launch_arrival_plan(gpuStream_t stream, const ArrivalPlanArgs& args);

// The rows of arrivals: each token that has come is read once. Marks are those of the sort, or what
// launch_mark_arrivals finds in a known plan, into `written` full of zeros.
struct ExpandArgs {
  Sizes sizes;
  Arrivals arrivals;
  const std::byte* tokens;  // [N, H]
  const int32_t* routes;
  uint32_t* written;
  std::byte* rows;
  float* row_weights;  // or null: along a known plan
};
gpuError_t launch_mark_arrivals(gpuStream_t stream, const ExpandArgs& args);
gpuError_t launch_expand(gpuStream_t stream, int num_blocks, const ExpandArgs& args);

// And back: adds the rows of each token that has come, in the order of k. Places beyond the tokens
// that have come are not written.
struct GatherArgs {
  Sizes sizes;
  Arrivals arrivals;
  const std::byte* rows;
  const float* scalars;  // [C], or null
  const int32_t* routes;
  std::byte* tokens;     // [N, H]
  float* token_scalars;  // [N, K], or null
};
gpuError_t launch_gather(gpuStream_t stream, int num_blocks, RowType type, const GatherArgs& args);

// Both phases of combine. Push: one row per (token, rank) into the half of the token's owner.
// Reduce: the owner adds what the ranks pushed, in their order, and its own part on the way.
struct CombineArgs {
  Team team;
  Sizes sizes;
  Stepping step;
  int64_t pushed_rows;     // offset of rows in a half
  int64_t pushed_scalars;  // offset of scalars in a half
  int64_t row_stride;
  const std::byte* rows;
  const float* scalars;  // or null
  const int32_t* routes;
  const int32_t* places;
  const int32_t* ids;
  std::byte* y;
  float* token_scalars;  // or null
};
gpuError_t launch_push(gpuStream_t stream, int num_blocks, RowType type, const CombineArgs& args);
gpuError_t launch_reduce(gpuStream_t stream, int num_blocks, RowType type, const CombineArgs& args);

// Load every kernel on the current device, so that none is loaded inside a recording. `resident` is
// lowered to the blocks of the kernel, in any of its forms, that a processor holds at once.
gpuError_t preload_stage(Wire wire, int* resident);
gpuError_t preload_put(Wire wire, int* resident);
gpuError_t preload_plan();
gpuError_t preload_pull(Wire wire, int* resident);
gpuError_t preload_push(int* resident);
gpuError_t preload_reduce(int* resident);
gpuError_t preload_arrival_plan();
gpuError_t preload_expand();
gpuError_t preload_gather();
gpuError_t preload_quantise();

// The same for one form of a kernel that moves rows.
template <typename Kernel>
gpuError_t preload_rows(Kernel* kernel, int threads, int* resident) {
  const auto* entry = reinterpret_cast<const void*>(kernel);
  gpuFuncAttributes found;
  gpuError_t error = gpuFuncGetAttributes(&found, entry);
  if (error != gpuSuccess) return error;
  int blocks = 0;
  error = gpu_resident_blocks(&blocks, entry, threads);
  if (error == gpuSuccess && blocks < *resident) *resident = blocks;
  return error;
}

// Whether rows of these sizes at these addresses can be moved in words of so many bytes.
inline bool fits_words(int word_bytes, int64_t row_bytes, const void* a, const void* b) {
  const auto bits = static_cast<uint64_t>(row_bytes) | reinterpret_cast<uint64_t>(a) |
                    reinterpret_cast<uint64_t>(b);
  return bits % static_cast<uint64_t>(word_bytes) == 0;
}

}  // namespace moriep::gpu
