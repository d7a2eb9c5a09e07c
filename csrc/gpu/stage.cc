// First phase of dispatch and replay, in both ways to deliver.
#include "kernels.h"
#include "moves.h"
#include "plan.h"
#include "published.h"
#include "rows.h"
#include "step.h"

namespace moriep::gpu {
namespace {

__device__ void publish_routing(const StageArgs& args, std::byte* to) {
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const auto num_routes = static_cast<int64_t>(args.sizes.num_tokens) * args.sizes.top_k;
  auto* ids = reinterpret_cast<int32_t*>(to + args.staged.ids);
  auto* weights = reinterpret_cast<float*>(to + args.staged.weights);
  for (int64_t i = thread; i < num_routes; i += num_threads) {
    ids[i] = args.ids[i];
    weights[i] = args.weights[i];
  }
  auto* words = reinterpret_cast<int32_t*>(to + args.staged.words);
  for (int64_t i = thread; i < args.sizes.num_words; i += num_threads) words[i] = args.words[i];
}

// Calls f(token, part of its row) for what the calling wave has to move.
template <typename Move, typename F>
__device__ void for_parts(const Sizes& sizes, F f) {
  constexpr int kBytes = sizeof(typename Move::Word);
  const uint32_t parts = num_parts(sizes.row_bytes, kBytes, kCopyWords);
  const auto num_items = static_cast<uint32_t>(sizes.num_tokens) * parts;
  for (int64_t item = wave_index(); item < num_items; item += num_waves()) {
    const auto index = static_cast<uint32_t>(item);
    f(index / parts, part_of_row(index % parts, sizes.row_bytes, kBytes));
  }
}

template <typename Move>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const MORIEP_KERNEL_ARGUMENT StageArgs args) {
  const Sizes& sizes = args.sizes;
  check_rank(args.team, args.step);
  std::byte* half = half_of(args.team, args.team.rank, current_step(args.team));
  if (args.weights != nullptr) publish_routing(args, half);
  for_parts<Move>(sizes, [&](uint32_t token, const Part& part) {
    const int32_t* ids = args.ids + static_cast<int64_t>(token) * sizes.top_k;
    bool needed = false;
    for (int k = lane_id(); k < sizes.top_k; k += kWave) {
      const int32_t rank = rank_of(sizes, ids[k]);
      needed |= rank >= 0 && rank != args.team.rank;
    }
    if (ballot(needed) == 0) return;
    Move move;
    move.read(args.x + token * sizes.row_bytes, part);
    move.send(half + args.staged.rows + token * args.staged.row_stride, args.staged.row_scales,
              part);
  });
  signal_peers(args.team, args.step);
}

// A rank that has failed no longer knows what its peers still read, and writes to none of them.
template <typename Move>
__global__ void __launch_bounds__(kThreads)
    put_kernel(const MORIEP_KERNEL_ARGUMENT StageArgs args) {
  const Sizes& sizes = args.sizes;
  const Team& team = args.team;
  check_rank(team, args.step);
  const uint64_t step = current_step(team);
  const bool good = !has_failed(team);
  // Beginning with the next rank, so that not all write to the same one at the same time.
  const auto peer_at = [&](int32_t i) {
    const int32_t peer = team.rank + 1 + i;
    return peer < team.num_ranks ? peer : peer - team.num_ranks;
  };
  const int32_t num_peers = good ? team.num_ranks - 1 : 0;
  for (int32_t i = 0; i < num_peers && args.weights != nullptr; ++i) {
    publish_routing(args, published(team, args.staged, team.rank, peer_at(i), step));
  }
  for_parts<Move>(sizes, [&](uint32_t token, const Part& part) {
    const uint64_t ranks =
        ranks_of_wave(sizes, args.ids + static_cast<int64_t>(token) * sizes.top_k) &
        ~(uint64_t{1} << team.rank);
    if (ranks == 0) return;
    Move move;
    move.read(args.x + token * sizes.row_bytes, part);
    for (int32_t i = 0; i < num_peers; ++i) {
      const int32_t peer = peer_at(i);
      if ((ranks >> peer & 1) == 0) continue;
      std::byte* to = published(team, args.staged, team.rank, peer, step);
      move.send(to + args.staged.rows + token * args.staged.row_stride, args.staged.row_scales,
                part);
    }
  });
  signal_peers(team, args.step);
}

}  // namespace

gpuError_t launch_stage(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                        const StageArgs& args) {
  with_move(type, wire, args.sizes.row_bytes, args.x, nullptr, [&]<typename Move>() {
    stage_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args);
  });
  return gpuGetLastError();
}

gpuError_t launch_put(gpuStream_t stream, int num_blocks, RowType type, Wire wire,
                      const StageArgs& args) {
  with_move(type, wire, args.sizes.row_bytes, args.x, nullptr,
            [&]<typename Move>() { put_kernel<Move><<<num_blocks, kThreads, 0, stream>>>(args); });
  return gpuGetLastError();
}

gpuError_t preload_stage(Wire wire, int* resident) {
  return for_all_moves(
      wire, [&]<typename Move>() { return preload_rows(stage_kernel<Move>, kThreads, resident); });
}

gpuError_t preload_put(Wire wire, int* resident) {
  return for_all_moves(
      wire, [&]<typename Move>() { return preload_rows(put_kernel<Move>, kThreads, resident); });
}

}  // namespace moriep::gpu
