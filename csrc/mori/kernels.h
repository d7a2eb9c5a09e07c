// Our own kernels around MORI's: what each takes, and how it is launched. A step is three launches:
// share, MORI's, and collect or seal; with the fp8 wire gpu's quantise runs in front of a send's.
// Between nodes share is three: share among a node's ranks, the relay of MORI's own kind
// (mori/kernels.hip) between nodes, and enter.
#pragma once

#include "flags.h"
#include "gpu/gpu_runtime.h"
#include "gpu/team.h"
#include "moriep/row_type.h"
#include "moriep/wire.h"
#include "progress.h"

namespace moriep::mori {

// The float8 of the only architecture that MORI's kernels are run on here.
inline constexpr Fp8Format kWireFormat = Fp8Format::kE4M3FNUZ;

// A word of device memory and what it shall be.
struct Word64 {
  uint64_t* at;
  uint64_t value;
};

// Set before MORI's kernels run: places that their handle keeps for results, which we let be XLA's.
inline constexpr int kMaxRedirects = 2;

// A step's beginning: every rank gets every rank's words, and learns that all run the same exchange
// and have ended the one before. So no rank's MORI kernel ever meets a peer's of another step, in
// whatever order dispatches and combines come.
//
// When a peer does not come, or runs another exchange, MORI's kernels behind would wait for ever.
// `detours` then lead them to this rank's own memory wherever they look for a peer: they talk to
// themselves, end, and disturb nobody.
struct ShareArgs {
  gpu::Team team;
  gpu::Stepping step;
  const int32_t* words;  // [W]
  int32_t* all_words;    // [R, W]
  int32_t num_words;
  int32_t* count;  // cleared, or null: MORI adds to it
  const Word64* detours;
  int32_t num_detours;
  int32_t num_redirects;
  Word64 redirects[kMaxRedirects];
  const uint64_t*
      barrier;  // what MORI's next combine waits for; null where none of its kernels run
  int32_t handle;
  Progress* progress;
  // Between nodes: this rank's memory for notices (mori/relay.h), else null and 1.
  std::byte* notices;
  int32_t num_nodes;
};
// All of a step's beginning on one node; between nodes its first part, behind which the relay runs.
gpuError_t launch_share(gpuStream_t stream, const ShareArgs& args);

// Between nodes the last part of a step's beginning: looks at the notices that have come.
struct EnterArgs {
  ShareArgs share;
  FlagArgs flags;
  const int32_t* plan_flags;  // [nodes, chunks] that a combine finds, or null
  int32_t* reach;             // [R]: how MORI's kernels reach each rank
  uint32_t* silent;           // set when this rank will send no more
  bool moves;                 // whether MORI's kernels run behind
};
gpuError_t launch_enter(gpuStream_t stream, const EnterArgs& args);

// What collect keeps of a dispatch between nodes.
struct BetweenArgs {
  int32_t* words;  // [between_words], or null
  int64_t num_words;
  int32_t* plan_flags;  // the last of them
  int32_t num_flags;
  const uint64_t* sets[2];  // MORI's, of which the step's is kept
};

// The sizes of arrivals.
struct ArrivalSizes {
  int32_t num_ranks;
  int32_t num_tokens;  // T
  int32_t max_tokens;  // M of the handle: MORI numbers a source token rank * R * M + token
  int32_t top_k;
  int64_t row_bytes;
  int64_t wire_bytes;  // of a row as it has come; its scales not counted
  int64_t num_scales;
};

// A send's end: copies what has arrived out of MORI's buffers, and no more than has arrived; what
// has come as float8 becomes tokens of their own type on the way. When this rank has failed, count
// is -1, no route has a place, and tokens are NaN.
struct CollectArgs {
  gpu::Team team;
  gpu::Stepping step;
  ArrivalSizes sizes;
  Progress* progress;
  const std::byte* from_tokens;  // codes, where they have scales
  const float* from_scales;      // or null: tokens have come as they are
  const int32_t* from_ids;
  const float* from_weights;
  const int32_t* from_origins;
  std::byte* tokens;  // [N, H]
  int32_t* ids;       // [N, K], or null: a resend
  float* weights;     // [N, K]
  int32_t* sources;   // [N]
  int32_t* origins;   // [N]: sources as MORI numbers them
  int32_t* count;     // [1]
  int32_t* places;    // [T, K]
  BetweenArgs between;
};
gpuError_t launch_collect(gpuStream_t stream, int num_blocks, RowType type,
                          const CollectArgs& args);

// What a dispatch leaves for whoever works on MORI's buffers in its step. When this rank has
// failed, count is -1 and no route has a place.
struct SettleArgs {
  gpu::Team team;
  ArrivalSizes sizes;
  const int32_t* origins;  // [N]: sources as MORI numbers them
  int32_t* sources;        // [N]
  int32_t* count;          // [1]
  int32_t* places;         // [T, K]
};
gpuError_t launch_settle(gpuStream_t stream, const SettleArgs& args);

// A give_back's end. When this rank has failed, y and token_scalars are NaN.
struct SealArgs {
  gpu::Team team;
  gpu::Stepping step;
  Progress* progress;
  std::byte* y;
  int64_t y_bytes;
  float* token_scalars;  // or null
  int64_t num_scalars;
};
gpuError_t launch_seal(gpuStream_t stream, int num_blocks, const SealArgs& args);

// Loads these kernels on the current device, so that none is loaded inside a recording.
gpuError_t preload_kernels();

}  // namespace moriep::mori
