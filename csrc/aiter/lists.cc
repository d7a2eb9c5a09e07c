// The lists of pairs that AITER's kernels work along.
#include "gpu/rows.h"
#include "gpu/team.h"
#include "kernels.h"

namespace moriep::aiter {
namespace {

using gpu::kThreads;
using gpu::kWave;

__device__ int32_t round_up(int32_t value, int32_t to) { return (value + to - 1) / to * to; }

// The sum of the values of the lanes up to the calling one.
__device__ int32_t sum_to_lane(int32_t value) {
  for (int reach = 1; reach < kWave; reach *= 2) {
    const int32_t below = gpu::from_below(value, reach);
    if (gpu::lane_id() >= reach) value += below;
  }
  return value;
}

// Where each expert's pairs start in the lists and its rows among the rows, for one wave. A plan is
// the user's array: sizes that make no sense are cut to rows that are there.
__device__ void start_experts(const RowListsArgs& args, int32_t* pairs, int32_t* rows,
                              int32_t* sizes) {
  int32_t next_pair = 0;
  int32_t next_row = 0;
  for (int32_t first = 0; first < args.num_experts; first += kWave) {
    const int32_t e = first + gpu::lane_id();
    const bool here = e < args.num_experts;
    const int32_t asked = here ? min(max(args.group_sizes[e], 0), args.num_rows) : 0;
    const int32_t run = min(round_up(asked, args.block), args.num_rows);
    const int32_t runs = sum_to_lane(run);
    const int32_t row = min(next_row + runs - run, args.num_rows);
    const int32_t size = min(asked, args.num_rows - row);
    const int32_t padded = round_up(size, kBlockRows);
    const int32_t all_padded = sum_to_lane(padded);
    if (here) {
      pairs[e] = next_pair + all_padded - padded;
      rows[e] = row;
      sizes[e] = size;
    }
    next_pair += gpu::from_lane(all_padded, kWave - 1);
    next_row = min(next_row + gpu::from_lane(runs, kWave - 1), args.num_rows);
  }
  if (gpu::lane_id() == 0) pairs[args.num_experts] = next_pair;
}

// The expert of a place in the lists: the last one whose pairs start there or before. Those without
// any start where the next one does.
__device__ int32_t expert_at(const int32_t* pairs, int32_t num_experts, int32_t place) {
  int32_t low = 0;
  int32_t high = num_experts;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (pairs[middle] <= place ? low : high) = middle;
  }
  return low;
}

__device__ void tell_length(const Lists& lists, int32_t num_pairs, int32_t num_rows) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  lists.valid[0] = num_pairs;
  lists.valid[1] = num_rows;
}

__global__ void __launch_bounds__(kThreads)
    row_lists_kernel(const RowListsArgs args, int32_t num_pairs) {
  extern __shared__ int32_t shared[];
  int32_t* pairs = shared;
  int32_t* rows = pairs + args.num_experts + 1;
  int32_t* sizes = rows + args.num_experts;
  if (threadIdx.x < kWave) start_experts(args, pairs, rows, sizes);
  __syncthreads();

  const int32_t end = min(pairs[args.num_experts], num_pairs);
  const Lists& lists = args.lists;
  tell_length(lists, end, args.num_rows);
  const auto num_threads = static_cast<int32_t>(gridDim.x * kThreads);
  for (auto i = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x); i < end;
       i += num_threads) {
    const int32_t expert = expert_at(pairs, args.num_experts, i);
    const int32_t at = i - pairs[expert];
    const bool real = at < sizes[expert];
    const int32_t row = rows[expert] + at;
    lists.pairs[i] = static_cast<uint32_t>(real ? row : args.num_rows);
    lists.weights[i] = real ? args.row_weights[row] : 0.0f;
    if (i % kBlockRows == 0) lists.experts[i / kBlockRows] = expert;
  }
}

__global__ void __launch_bounds__(kThreads) arrival_lists_kernel(const ArrivalListsArgs args) {
  extern __shared__ int32_t shared[];
  const gpu::Sizes& sizes = args.sizes;
  const int32_t num_rows = gpu::num_group_tokens(sizes);
  int32_t* pairs = shared;
  int32_t* rows = pairs + sizes.num_local_experts + 1;
  int32_t* counts = rows + sizes.num_local_experts;
  if (threadIdx.x < kWave) {
    start_experts({.group_sizes = args.group_sizes,
                   .row_weights = nullptr,
                   .num_experts = sizes.num_local_experts,
                   .block = kBlockRows,
                   .num_rows = sizes.capacity,
                   .lists = args.lists},
                  pairs, rows, counts);
  }
  __syncthreads();

  const int32_t end = min(pairs[sizes.num_local_experts], sizes.capacity);
  const Lists& lists = args.lists;
  tell_length(lists, end, num_rows);
  const auto waves = static_cast<int32_t>(gpu::num_waves());
  const int lane = gpu::lane_id();
  for (auto e = static_cast<int32_t>(gpu::wave_index()); e < sizes.num_local_experts; e += waves) {
    const int32_t last = pairs[e] + counts[e];
    const int32_t next = min(pairs[e + 1], end);
    // Fewer than a block, which is half a wave.
    if (last + lane < next) {
      lists.pairs[last + lane] = static_cast<uint32_t>(num_rows);
      lists.weights[last + lane] = 0.0f;
    }
    for (int32_t b = pairs[e] / kBlockRows + lane; b < next / kBlockRows; b += kWave) {
      lists.experts[b] = e;
    }
  }
  const int32_t num_arrivals = gpu::num_arrivals(sizes, args.arrivals);
  const auto num_threads = static_cast<int32_t>(gridDim.x * kThreads);
  for (auto place = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x); place < num_arrivals;
       place += num_threads) {
    const int32_t token = gpu::token_at(sizes, args.arrivals, place);
    if (token < 0) continue;
    const int32_t* routes = args.routes + static_cast<int64_t>(token) * sizes.top_k;
    for (int32_t k = 0; k < sizes.top_k; ++k) {
      const int32_t at = routes[k];
      if (at >= 0 && at < end) lists.pairs[at] = static_cast<uint32_t>(place);
    }
  }
}

int num_list_blocks(int64_t num_items) {
  constexpr int64_t kMaxBlocks = 256;
  const int64_t wanted = (num_items + kThreads - 1) / kThreads;
  return static_cast<int>(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

size_t lds_bytes(int32_t num_experts) {
  return sizeof(int32_t) * static_cast<size_t>(3 * num_experts + 1);
}

}  // namespace

gpuError_t launch_row_lists(gpuStream_t stream, int32_t num_pairs, const RowListsArgs& args) {
  row_lists_kernel<<<num_list_blocks(num_pairs), kThreads, lds_bytes(args.num_experts), stream>>>(
      args, num_pairs);
  return gpuGetLastError();
}

gpuError_t launch_arrival_lists(gpuStream_t stream, const ArrivalListsArgs& args) {
  const gpu::Sizes& sizes = args.sizes;
  const int blocks = num_list_blocks(int64_t{sizes.num_ranks} * sizes.num_tokens);
  arrival_lists_kernel<<<blocks, kThreads, lds_bytes(sizes.num_local_experts), stream>>>(args);
  return gpuGetLastError();
}

gpuError_t preload_lists() {
  gpuFuncAttributes found;
  const gpuError_t error =
      gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(row_lists_kernel));
  if (error != gpuSuccess) return error;
  return gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(arrival_lists_kernel));
}

}  // namespace moriep::aiter
