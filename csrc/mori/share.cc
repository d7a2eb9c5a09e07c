// The beginning of every step.
#include "gpu/step.h"
#include "kernels.h"

namespace moriep::mori {
namespace {

constexpr int kShareThreads = 256;

__global__ void __launch_bounds__(kShareThreads) share_kernel(const ShareArgs args) {
  const gpu::Team& team = args.team;
  gpu::check_rank(team, args.step);
  const uint64_t step = gpu::current_step(team);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t num_shared = args.num_words * team.num_ranks;
  for (int32_t i = thread; i < num_shared; i += kShareThreads) {
    const int32_t peer = i / args.num_words;
    const int32_t word = i % args.num_words;
    auto* to = peer == team.rank ? args.all_words
                                 : reinterpret_cast<int32_t*>(gpu::slot_of(team, peer, step));
    to[team.rank * args.num_words + word] = args.words[word];
  }
  if (thread < args.num_redirects) *args.redirects[thread].at = args.redirects[thread].value;
  if (thread == 0 && args.count != nullptr) *args.count = 0;

  gpu::signal_peers(team, args.step);
  const bool good = gpu::wait_for_peers(team, args.step);
  const auto* received = reinterpret_cast<const int32_t*>(gpu::slot_of(team, team.rank, step));
  for (int32_t i = thread; i < num_shared; i += kShareThreads) {
    if (!good) {
      args.all_words[i] = gpu::kPoisonWord;
    } else if (i / args.num_words != team.rank) {
      args.all_words[i] = received[i];
    }
  }
  if (!good) {
    for (int32_t i = thread; i < args.num_detours; i += kShareThreads) {
      *args.detours[i].at = args.detours[i].value;
    }
  } else if (thread == 0 && args.barrier != nullptr && team.num_ranks > 1) {
    Progress& progress = *args.progress;
    progress.barrier = *args.barrier;
    progress.kind = static_cast<int32_t>(args.step.kind);
    progress.handle = args.handle;
    gpu::fence_system();
    gpu::store_release_system(&progress.entered, step);
  }
}

}  // namespace

gpuError_t launch_share(gpuStream_t stream, const ShareArgs& args) {
  share_kernel<<<1, kShareThreads, 0, stream>>>(args);
  return gpuGetLastError();
}

gpuError_t preload_share() {
  gpuFuncAttributes found;
  return gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(share_kernel));
}

}  // namespace moriep::mori
