// First half of dispatch and replay.
#include "kernels.h"
#include "moves.h"
#include "plan.h"
#include "rows.h"
#include "step.h"

namespace moriep::gpu {
namespace {

template <typename Move>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const MORIEP_KERNEL_ARGUMENT StageArgs args) {
  const Sizes& sizes = args.sizes;
  check_rank(args.team, args.step);
  std::byte* slot = slot_of(args.team, args.team.rank, current_step(args.team));
  const auto num_routes = static_cast<int64_t>(sizes.num_tokens) * sizes.top_k;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (args.weights != nullptr) {
    auto* ids = reinterpret_cast<int32_t*>(slot + args.staged.ids);
    auto* weights = reinterpret_cast<float*>(slot + args.staged.weights);
    for (int64_t i = thread; i < num_routes; i += num_threads) {
      ids[i] = args.ids[i];
      weights[i] = args.weights[i];
    }
    auto* words = reinterpret_cast<int32_t*>(slot + args.staged.words);
    for (int64_t i = thread; i < sizes.num_words; i += num_threads) words[i] = args.words[i];
  }

  constexpr int kBytes = sizeof(typename Move::Word);
  const uint32_t parts = num_parts(sizes.row_bytes, kBytes, kCopyWords);
  const auto num_items = static_cast<uint32_t>(sizes.num_tokens) * parts;
  for (int64_t item = wave_index(); item < num_items; item += num_waves()) {
    const uint32_t token = static_cast<uint32_t>(item) / parts;
    const uint32_t part = static_cast<uint32_t>(item) % parts;
    const int32_t* ids = args.ids + static_cast<int64_t>(token) * sizes.top_k;
    bool needed = false;
    for (int k = lane_id(); k < sizes.top_k; k += kWave) {
      const int32_t rank = rank_of(sizes, ids[k]);
      needed |= rank >= 0 && rank != args.team.rank;
    }
    if (ballot(needed) == 0) continue;
    const Part mine = part_of_row(part, sizes.row_bytes, kBytes);
    Move move;
    move.read(args.x + token * sizes.row_bytes, mine);
    move.send(slot + args.staged.rows + token * args.staged.row_stride, args.staged.row_scales,
              mine);
  }
  signal_peers(args.team, args.step);
}

}  // namespace

gpuError_t launch_stage(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                        const StageArgs& args) {
  with_move(type, wire, args.sizes.row_bytes, args.x, nullptr, [&]<typename Move>() {
    stage_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args);
  });
  return gpuGetLastError();
}

gpuError_t preload_stage(Wire wire, int* resident) {
  return for_all_moves(
      wire, [&]<typename Move>() { return preload_rows(stage_kernel<Move>, kThreads, resident); });
}

}  // namespace moriep::gpu
