// The beginning of every step.
#include "gpu/step.h"
#include "kernels.h"
#include "relay.h"
#include "world.h"

namespace moriep::mori {
namespace {

constexpr int kShareThreads = 256;

// Lets MORI's kernels run, under the eyes of the watchdog.
__device__ void let_run(const ShareArgs& args, uint64_t step) {
  Progress& progress = *args.progress;
  progress.barrier = *args.barrier;
  progress.kind = static_cast<int32_t>(args.step.kind);
  progress.handle = args.handle;
  gpu::fence_system();
  gpu::store_release_system(&progress.entered, step);
}

__device__ void set_words(const Word64* words, int32_t num_words) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_words; i += kShareThreads) {
    *words[i].at = words[i].value;
  }
}

// What this rank tells those in its place on the other nodes.
__device__ void write_notice(const ShareArgs& args, uint64_t step) {
  const gpu::Team& team = args.team;
  std::byte* out = args.notices + notice_out_at(step, args.num_nodes);
  auto* words = reinterpret_cast<int32_t*>(out + sizeof(Notice));
  const int32_t* near_words = args.all_words + team.first_near * args.num_words;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < args.num_words * team.num_near;
       i += kShareThreads) {
    words[i] = near_words[i];
  }
  if (threadIdx.x == 0) {
    const bool failed = gpu::has_failed(team);
    Notice& notice = *reinterpret_cast<Notice*>(out);
    notice.digest = args.step.digest;
    notice.order = args.step.order[0];
    notice.failed = failed ? 1 : 0;
    notice.culprit = failed && team.report->set != 0 ? team.report->peer : team.rank;
  }
}

__global__ void __launch_bounds__(kShareThreads) share_kernel(const ShareArgs args) {
  const gpu::Team& team = args.team;
  gpu::check_rank(team, args.step);
  const uint64_t step = gpu::current_step(team);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t num_shared = args.num_words * team.num_near;
  for (int32_t i = thread; i < num_shared; i += kShareThreads) {
    const int32_t peer = team.first_near + i / args.num_words;
    const int32_t word = i % args.num_words;
    auto* to = peer == team.rank ? args.all_words
                                 : reinterpret_cast<int32_t*>(gpu::half_of(team, peer, step));
    to[team.rank * args.num_words + word] = args.words[word];
  }
  if (thread < args.num_redirects) *args.redirects[thread].at = args.redirects[thread].value;
  if (thread == 0 && args.count != nullptr) *args.count = 0;

  gpu::signal_peers(team, args.step);
  const bool good = gpu::wait_for_peers(team, args.step);
  const auto* received = reinterpret_cast<const int32_t*>(gpu::half_of(team, team.rank, step));
  const int32_t first = team.first_near * args.num_words;
  for (int32_t i = first + thread; i < first + num_shared; i += kShareThreads) {
    if (!good) {
      args.all_words[i] = gpu::kPoisonWord;
    } else if (i / args.num_words != team.rank) {
      args.all_words[i] = received[i];
    }
  }
  if (args.notices != nullptr) {
    __syncthreads();
    write_notice(args, step);
  } else if (!good) {
    set_words(args.detours, args.num_detours);
  } else if (thread == 0 && args.barrier != nullptr && team.num_ranks > 1) {
    let_run(args, step);
  }
}

// Looks at the notice of the rank in this one's place on another node.
__device__ void check_notice(const ShareArgs& args, int32_t node, uint64_t step) {
  const gpu::Team& team = args.team;
  const int32_t peer = node * team.num_near + team.rank % team.num_near;
  const auto* count = reinterpret_cast<const uint64_t*>(args.notices + count_at(node));
  const uint64_t come = gpu::load_acquire_system(count);
  if (come < step) {
    gpu::fail(team, args.step, gpu::Fault::kDeadline, peer, static_cast<int64_t>(step),
              static_cast<int64_t>(come));
    return;
  }
  const Notice& notice =
      *reinterpret_cast<const Notice*>(args.notices + notice_in_at(step, args.num_nodes, node));
  if (notice.failed != 0) {
    gpu::fail(team, args.step, gpu::Fault::kPeerFailed, notice.culprit, static_cast<int64_t>(step),
              static_cast<int64_t>(step));
  } else if (notice.digest != args.step.digest || notice.order != args.step.order[0]) {
    gpu::fail(team, args.step, gpu::Fault::kDiffers, peer, args.step.order[0], notice.order);
  }
}

__device__ void name_set(const FlagNames& names, int set) {
  for (int word = 0; word < kNameWords; ++word) *names.at[word] = names.of[set][word];
}

// Flags as they shall be when MORI's kernels begin, and clear ones for the next step.
__device__ void set_flags(const EnterArgs& args, uint64_t step, bool good) {
  const FlagArgs& flags = args.flags;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t num_flags = flags.num_nodes * flags.num_chunks;
  uint64_t* mine = flags.sets[good ? static_cast<int>(step % 2) : kDetourSet];
  uint64_t* next = flags.sets[(step + 1) % 2];
  const int32_t* kept = good ? args.plan_flags : nullptr;
  for (int32_t i = thread; i < num_flags; i += kShareThreads) {
    next[i] = 0;
    // What came with a dispatch is in its set already; a combine finds what its plan kept.
    if (!good || kept != nullptr) mine[i] = kept == nullptr ? 0 : static_cast<uint64_t>(kept[i]);
  }
  if (thread < flags.num_nodes) {
    next[num_flags + thread] = 0;
    flags.sent_chunks[thread] = 0;
    if (!good) {
      mine[num_flags + thread] = 1;
    } else if (kept != nullptr) {
      // As the sender says it, whose word may come behind its last flag.
      uint64_t chunks = 0;
      for (int32_t c = 0; c < flags.num_chunks; ++c)
        chunks += kept[thread * flags.num_chunks + c] > 0;
      mine[num_flags + thread] = chunks * kChunk + 1;
    }
  }
  if (thread == 0) {
    const int set = good ? static_cast<int>(step % 2) : kDetourSet;
    name_set(flags.flags, set);
    name_set(flags.totals, set);
    if (args.share.step.kind == Kind::kCombine) {
      *flags.combines += 1;
      *flags.barrier = good ? *flags.combines : 1;
    }
  }
  if (!good && thread < args.share.team.num_ranks) flags.own_meeting[thread] = 0;
}

__global__ void __launch_bounds__(kShareThreads) enter_kernel(const EnterArgs args) {
  const ShareArgs& share = args.share;
  const gpu::Team& team = share.team;
  const uint64_t step = gpu::current_step(team);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t own_node = team.rank / team.num_near;
  __shared__ bool failed;
  if (thread == 0) failed = gpu::has_failed(team);
  __syncthreads();
  if (!failed && thread < share.num_nodes && thread != own_node) check_notice(share, thread, step);
  gpu::fence_system();
  __syncthreads();
  if (thread == 0) failed = gpu::has_failed(team);
  __syncthreads();
  const bool good = !failed;

  for (int32_t i = thread; i < share.num_words * team.num_ranks; i += kShareThreads) {
    const int32_t rank = i / share.num_words;
    const int32_t node = rank / team.num_near;
    if (!good) {
      share.all_words[i] = gpu::kPoisonWord;
    } else if (node != own_node) {
      const auto* words = reinterpret_cast<const int32_t*>(
          share.notices + notice_in_at(step, share.num_nodes, node) + sizeof(Notice));
      share.all_words[i] = words[i - node * team.num_near * share.num_words];
    }
  }
  if (args.moves) {
    if (!good) set_words(share.detours, share.num_detours);
    set_flags(args, step, good);
  }
  if (!good) {
    if (thread < team.num_ranks) args.reach[thread] = kReachByMemory;
    if (thread == 0) *args.silent = 1;
  }
  gpu::fence_system();
  __syncthreads();
  if (thread == 0 && good && args.moves) let_run(share, step);
}

}  // namespace

gpuError_t launch_share(gpuStream_t stream, const ShareArgs& args) {
  share_kernel<<<1, kShareThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t launch_enter(gpuStream_t stream, const EnterArgs& args) {
  enter_kernel<<<1, kShareThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t preload_share() {
  gpuFuncAttributes found;
  const gpuError_t error =
      gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(enter_kernel));
  if (error != gpuSuccess) return error;
  return gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(share_kernel));
}

}  // namespace moriep::mori
