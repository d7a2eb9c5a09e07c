// Waiting, signalling and failing, inside kernels.
#pragma once

#include "gpu_runtime.h"
#include "team.h"

namespace moriep::gpu {

__device__ inline Control& mine(const Team& team) { return *team.control[team.rank]; }

// The step that the running kernel belongs to; the last kernel of a step moves it on.
__device__ inline uint64_t current_step(const Team& team) { return mine(team).epoch + 1; }

// The part of a rank's arena that holds a step's data.
__device__ inline std::byte* half_of(const Team& team, int32_t rank, uint64_t step) {
  return reinterpret_cast<std::byte*>(team.control[rank]) + kControlBytes + kWorkspaceBytes +
         static_cast<int64_t>(step % 2) * team.half_bytes;
}

__device__ inline bool has_failed(const Team& team) {
  return *static_cast<volatile uint32_t*>(&mine(team).failed) != 0;
}

// Records the first fault of this rank where the host sees it.
__device__ inline void fail(const Team& team, const Stepping& at, Fault fault, int32_t peer,
                            int64_t here, int64_t there) {
  if (atomicCAS(&mine(team).failed, 0u, 1u) != 0) return;
  FaultReport& report = *team.report;
  report.fault = static_cast<int32_t>(fault);
  report.kind = static_cast<int32_t>(at.kind);
  report.peer = peer;
  report.step = current_step(team);
  report.here = here;
  report.there = there;
  fence_system();
  store_release_system(&report.set, 1);
}

// The program's rank must be the table's; one thread of a step looks.
__device__ inline void check_rank(const Team& team, const Stepping& at) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  if (at.rank[0] != at.first_rank + team.rank) {
    fail(team, at, Fault::kWrongRank, team.rank, team.rank, at.rank[0]);
  }
}

// Waits until every peer of this node has published this step, in every block that goes on to read
// it: an acquire holds for the block that makes it. False when this rank has failed.
__device__ inline bool wait_for_peers(const Team& team, const Stepping& at) {
  if (team.num_near == 1) return !has_failed(team);
  __shared__ bool good;
  if (threadIdx.x == 0) good = !has_failed(team);
  __syncthreads();
  const auto near = static_cast<int32_t>(threadIdx.x);
  const int32_t peer = team.first_near + near;
  if (good && near < team.num_near && peer != team.rank) {
    const uint64_t step = current_step(team);
    const uint64_t* arrived = &mine(team).arrived[peer].step;
    const uint64_t begin = nanoseconds();
    uint64_t seen = load_acquire_system(arrived);
    while (seen < step) {
      pause();
      seen = load_acquire_system(arrived);
      if (seen < step && nanoseconds() - begin > team.timeout_ns) {
        fail(team, at, Fault::kDeadline, peer, static_cast<int64_t>(step),
             static_cast<int64_t>(seen));
        break;
      }
    }
    if ((seen & kFailedBit) != 0) {
      fail(team, at, Fault::kPeerFailed, peer, static_cast<int64_t>(step),
           static_cast<int64_t>(seen & ~kFailedBit));
    } else if (seen >= step) {
      const Post post = mine(team).posts[step % 2][peer];
      const auto here = static_cast<int64_t>(at.digest & 1);
      const auto there = static_cast<int64_t>(post.digest & 1);
      if (post.order == at.order[0] && here != there) {
        fail(team, at, Fault::kDelivery, peer, here, there);
      } else if (post.digest != at.digest || post.order != at.order[0]) {
        fail(team, at, Fault::kDiffers, peer, at.order[0], post.order);
      }
    }
    fence_system();
  }
  __syncthreads();
  if (threadIdx.x == 0) good = !has_failed(team);
  __syncthreads();
  return good;
}

// True in the block that is the last of the grid to come here. What every block has written before
// is then visible to every device.
__device__ inline bool is_last_block(const Team& team) {
  __shared__ bool last;
  drain_stores();
  __syncthreads();
  if (threadIdx.x == 0) {
    fence_system();
    last = atomicAdd(&mine(team).joined, 1u) == gridDim.x - 1;
    if (last) mine(team).joined = 0;
    fence_system();
  }
  __syncthreads();
  return last;
}

// The end of a step's first phase: the last block tells every peer of this node.
__device__ inline void signal_peers(const Team& team, const Stepping& at) {
  if (!is_last_block(team)) return;
  const auto near = static_cast<int32_t>(threadIdx.x);
  const int32_t peer = team.first_near + near;
  if (near >= team.num_near || peer == team.rank) return;
  const uint64_t step = current_step(team);
  Control& theirs = *team.control[peer];
  theirs.posts[step % 2][team.rank] = Post{at.digest, at.order[0]};
  fence_system();
  store_release_system(&theirs.arrived[team.rank].step, step | (has_failed(team) ? kFailedBit : 0));
}

// The end of a step: the order goes on, and so does the epoch. True in the one thread that
// has moved it.
__device__ inline bool leave_step(const Team& team, const Stepping& at) {
  if (blockIdx.x == 0 && threadIdx.x == 0) at.order_out[0] = at.order[0] + 1;
  if (team.num_ranks == 1) return false;
  if (!is_last_block(team) || threadIdx.x != 0) return false;
  mine(team).epoch = current_step(team);
  return true;
}

}  // namespace moriep::gpu
