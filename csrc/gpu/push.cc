// First phase of combine.
#include "kernels.h"
#include "rows.h"
#include "step.h"

namespace moriep::gpu {
namespace {

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    push_kernel(const MORIEP_KERNEL_ARGUMENT CombineArgs args) {
  const Sizes& sizes = args.sizes;
  check_rank(args.team, args.step);
  const uint64_t step = current_step(args.team);
  const auto peers = static_cast<uint32_t>(sizes.num_ranks - 1);
  const auto num_tokens = static_cast<uint32_t>(sizes.num_tokens);
  const int64_t num_places = static_cast<int64_t>(sizes.num_tokens) * sizes.fanout;

  constexpr int kBytes = sizeof(typename Word::Type);
  const uint32_t parts = num_parts(sizes.row_bytes, kBytes, 1);
  const int64_t row_words = sizes.row_bytes / kBytes;
  const uint32_t num_items = peers * num_tokens * parts;
  for (int64_t item = wave_index(); item < num_items; item += num_waves()) {
    const auto index = static_cast<uint32_t>(item);
    const uint32_t turn = index / parts;
    const auto owner = static_cast<int32_t>(
        (static_cast<uint32_t>(args.team.rank) + 1 + turn % peers) % (peers + 1));
    const int64_t token = static_cast<int64_t>(owner) * num_tokens + turn / peers;
    const int32_t place = args.places[token];
    if (place < 0) continue;
    if (place >= num_places) {
      if (lane_id() == 0) {
        fail(args.team, args.step, Fault::kBadPlan, args.team.rank, place, num_places);
      }
      continue;
    }
    const int64_t word = static_cast<int64_t>(index % parts) * kWave + lane_id();
    const bool inside = word < row_words;
    Sum<Word> sum;
    add_routes<Word>(args.routes + token * sizes.top_k, sizes, args.rows, word, inside, sum);
    if (!inside) continue;
    auto* to = reinterpret_cast<typename Word::Type*>(half_of(args.team, owner, step) +
                                                      args.pushed_rows + place * args.row_stride);
    to[word] = sum.rounded();
  }

  const int64_t num_routes = static_cast<int64_t>(num_tokens) * sizes.top_k;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < num_routes * sizes.num_ranks; i += num_threads) {
    const auto owner = static_cast<int32_t>(i / num_routes);
    const int32_t row = args.routes[i];
    if (row >= sizes.capacity) {
      fail(args.team, args.step, Fault::kBadPlan, args.team.rank, row, sizes.capacity);
      continue;
    }
    if (args.scalars == nullptr || owner == args.team.rank || row == kNotHere) continue;
    auto* to = reinterpret_cast<float*>(half_of(args.team, owner, step) + args.pushed_scalars);
    to[i % num_routes] = row >= 0 ? args.scalars[row] : 0.0f;
  }
  signal_peers(args.team, args.step);
}

struct Preload {
  int* resident;
  template <typename Word>
  gpuError_t operator()() const {
    return preload_rows(push_kernel<Word>, kThreads, resident);
  }
};

template <RowType kType>
void launch(gpuStream_t stream, int num_blocks, const CombineArgs& args) {
  if (fits_words(16, args.sizes.row_bytes, args.rows, nullptr)) {
    push_kernel<WideWord<kType>><<<num_blocks, kThreads, 0, stream>>>(args);
  } else {
    push_kernel<NarrowWord<kType>><<<num_blocks, kThreads, 0, stream>>>(args);
  }
}

}  // namespace

gpuError_t launch_push(gpuStream_t stream, int num_blocks, RowType type, const CombineArgs& args) {
  with_row_type(type, [&]<RowType kType>() { launch<kType>(stream, num_blocks, args); });
  return gpuGetLastError();
}

gpuError_t preload_push(int* resident) { return for_all_words(Preload{resident}); }

}  // namespace moriep::gpu
