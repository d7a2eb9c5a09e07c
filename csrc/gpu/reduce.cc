// Second phase of combine.
#include "kernels.h"
#include "plan.h"
#include "rows.h"
#include "step.h"

namespace moriep::gpu {
namespace {

// Rows of other ranks that a lane reads at once.
constexpr int kSumRanks = 4;

// One part of one token of this rank.
template <typename Word, bool kAlone>
__device__ typename Word::Type reduce_part(const CombineArgs& args, const std::byte* received,
                                           int64_t token, int64_t word, bool inside) {
  using Type = typename Word::Type;
  const Sizes& sizes = args.sizes;
  const int32_t me = args.team.rank;
  const int32_t* routes =
      args.routes + (static_cast<int64_t>(me) * sizes.num_tokens + token) * sizes.top_k;
  Sum<Word> sum;
  if constexpr (kAlone) {
    add_routes<Word>(routes, sizes, args.rows, word, inside, sum);
  } else {
    const uint64_t ranks = ranks_of_wave(sizes, args.ids + token * sizes.top_k);
    const int num_ranks = count_bits(ranks);
    const bool here = (ranks >> me & 1) != 0;
    const int own_place = here ? count_bits(ranks & lanes_below(me)) : -1;
    const std::byte* from = received + args.pushed_rows + token * sizes.fanout * args.row_stride;
    Type own;
    for (int first = 0; first < num_ranks; first += kSumRanks) {
      Type read[kSumRanks];
#pragma unroll
      for (int j = 0; j < kSumRanks; ++j) {
        const int place = first + j;
        if (place < num_ranks && place != own_place && inside) {
          read[j] = reinterpret_cast<const Type*>(from + place * args.row_stride)[word];
        }
      }
      if (first == 0 && here) {
        // Rounded to the row type, as it would have been on the way from another rank. Read while
        // the others' rows are on their way, whatever its place among them.
        Sum<Word> own_sum;
        add_routes<Word>(routes, sizes, args.rows, word, inside, own_sum);
        own = own_sum.rounded();
      }
#pragma unroll
      for (int j = 0; j < kSumRanks; ++j) {
        const int place = first + j;
        if (place < num_ranks && inside) sum.add(place == own_place ? own : read[j]);
      }
    }
  }
  return sum.rounded();
}

template <typename Word>
__device__ typename Word::Type poison() {
  float values[Word::kElements];
#pragma unroll
  for (int i = 0; i < Word::kElements; ++i) values[i] = __uint_as_float(0x7fffffffu);
  return Word::pack(values);
}

// kAlone: there is one rank, so there is nothing to wait for and fewer registers are needed.
template <typename Word, bool kAlone>
__global__ void __launch_bounds__(kThreads, kAlone ? 4 : 2)
    reduce_kernel(const MORIEP_KERNEL_ARGUMENT CombineArgs args) {
  using Type = typename Word::Type;
  const Sizes& sizes = args.sizes;
  if (kAlone) check_rank(args.team, args.step);
  const bool good = wait_for_peers(args.team, args.step);
  const std::byte* received = half_of(args.team, args.team.rank, current_step(args.team));

  constexpr int kBytes = sizeof(Type);
  const uint32_t parts = num_parts(sizes.row_bytes, kBytes, 1);
  const int64_t row_words = sizes.row_bytes / kBytes;
  const uint32_t num_items = static_cast<uint32_t>(sizes.num_tokens) * parts;
  // No sum overflows: there are no more waves than items, but for a block's, and 2^31 items at
  // most.
  const auto waves = static_cast<uint32_t>(num_waves());
  for (auto item = static_cast<uint32_t>(wave_index()); item < num_items; item += waves) {
    const uint32_t token = item / parts;
    const int64_t word = static_cast<int64_t>(item % parts) * kWave + lane_id();
    const bool inside = word < row_words;
    Type value = poison<Word>();
    // Alone, the rows are read before it is known whether this rank has failed.
    if (kAlone || good) value = reduce_part<Word, kAlone>(args, received, token, word, inside);
    if (kAlone && !good) value = poison<Word>();
    if (inside) {
      store_streamed(reinterpret_cast<Type*>(args.y + token * sizes.row_bytes) + word, value);
    }
  }

  const int64_t num_routes = static_cast<int64_t>(sizes.num_tokens) * sizes.top_k;
  const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto* scalars = reinterpret_cast<const float*>(received + args.pushed_scalars);
  const int32_t* own_routes = args.routes + static_cast<int64_t>(args.team.rank) * num_routes;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < num_routes;
       i += num_threads) {
    const int32_t row = own_routes[i];
    if (row >= sizes.capacity) {
      fail(args.team, args.step, Fault::kBadPlan, args.team.rank, row, sizes.capacity);
    }
    if (args.token_scalars == nullptr) continue;
    const int32_t rank = rank_of(sizes, args.ids[i]);
    float value = 0.0f;
    if (!good) {
      value = __uint_as_float(0x7fffffffu);
    } else if (rank == args.team.rank) {
      value = row >= 0 && row < sizes.capacity ? args.scalars[row] : 0.0f;
    } else if (rank >= 0) {
      value = scalars[i];
    }
    args.token_scalars[i] = value;
  }
  leave_step(args.team, args.step);
}

struct Preload {
  int* resident;
  template <typename Word>
  gpuError_t operator()() const {
    // The other form waits for nobody, so nothing limits its blocks.
    int alone = *resident;
    const gpuError_t error = preload_rows(reduce_kernel<Word, true>, kThreads, &alone);
    if (error != gpuSuccess) return error;
    return preload_rows(reduce_kernel<Word, false>, kThreads, resident);
  }
};

template <typename Word>
void launch_words(gpuStream_t stream, int num_blocks, const CombineArgs& args) {
  if (args.team.num_ranks == 1) {
    reduce_kernel<Word, true><<<num_blocks, kThreads, 0, stream>>>(args);
  } else {
    reduce_kernel<Word, false><<<num_blocks, kThreads, 0, stream>>>(args);
  }
}

template <RowType kType>
void launch(gpuStream_t stream, int num_blocks, const CombineArgs& args) {
  if (fits_words(16, args.sizes.row_bytes, args.rows, args.y)) {
    launch_words<WideWord<kType>>(stream, num_blocks, args);
  } else {
    launch_words<NarrowWord<kType>>(stream, num_blocks, args);
  }
}

}  // namespace

gpuError_t launch_reduce(gpuStream_t stream, int num_blocks, RowType type,
                         const CombineArgs& args) {
  with_row_type(type, [&]<RowType kType>() { launch<kType>(stream, num_blocks, args); });
  return gpuGetLastError();
}

gpuError_t preload_reduce(int* resident) { return for_all_words(Preload{resident}); }

}  // namespace moriep::gpu
