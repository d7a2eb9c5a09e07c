// From rows back to the tokens that have arrived.
#include "kernels.h"
#include "rows.h"

namespace moriep::gpu {
namespace {

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const MORIEP_KERNEL_ARGUMENT GatherArgs args) {
  using Type = typename Word::Type;
  const Sizes& sizes = args.sizes;
  constexpr int kBytes = sizeof(Type);
  const uint32_t parts = num_parts(sizes.row_bytes, kBytes, 1);
  const int64_t row_words = sizes.row_bytes / kBytes;
  const int32_t count = num_arrivals(sizes, args.arrivals);
  const uint32_t num_items = static_cast<uint32_t>(count) * parts;
  const auto waves = static_cast<uint32_t>(num_waves());
  for (auto item = static_cast<uint32_t>(wave_index()); item < num_items; item += waves) {
    const uint32_t place = item / parts;
    const int64_t word = static_cast<int64_t>(item % parts) * kWave + lane_id();
    const bool inside = word < row_words;
    const int64_t token = token_of_wave(sizes, args.arrivals, static_cast<int32_t>(place));
    Sum<Word> sum;
    if (token >= 0) {
      add_routes<Word>(args.routes + token * sizes.top_k, sizes, args.rows, word, inside, sum);
    }
    if (!inside) continue;
    store_streamed(reinterpret_cast<Type*>(args.tokens + place * sizes.row_bytes) + word,
                   sum.rounded());
  }

  if (args.token_scalars == nullptr) return;
  const int64_t num_routes = static_cast<int64_t>(count) * sizes.top_k;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_routes;
       i += num_threads) {
    const int64_t token = token_at(sizes, args.arrivals, static_cast<int32_t>(i / sizes.top_k));
    const int32_t row = token < 0 ? -1 : args.routes[token * sizes.top_k + i % sizes.top_k];
    args.token_scalars[i] = row >= 0 && row < sizes.capacity ? args.scalars[row] : 0.0f;
  }
}

struct Preload {
  template <typename Word>
  gpuError_t operator()() const {
    int resident = 0;  // It waits for nobody, so nothing limits its blocks.
    return preload_rows(gather_kernel<Word>, kThreads, &resident);
  }
};

template <RowType kType>
void launch(gpuStream_t stream, int num_blocks, const GatherArgs& args) {
  if (fits_words(16, args.sizes.row_bytes, args.rows, args.tokens)) {
    gather_kernel<WideWord<kType>><<<num_blocks, kThreads, 0, stream>>>(args);
  } else {
    gather_kernel<NarrowWord<kType>><<<num_blocks, kThreads, 0, stream>>>(args);
  }
}

}  // namespace

gpuError_t launch_gather(gpuStream_t stream, int num_blocks, RowType type, const GatherArgs& args) {
  with_row_type(type, [&]<RowType kType>() { launch<kType>(stream, num_blocks, args); });
  return gpuGetLastError();
}

gpuError_t preload_gather() { return for_all_words(Preload{}); }

}  // namespace moriep::gpu
