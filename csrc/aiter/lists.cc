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
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    lists.valid[0] = end;
    lists.valid[1] = args.num_rows;
  }
  const auto num_threads = static_cast<int32_t>(gridDim.x * kThreads);
  for (auto i = static_cast<int32_t>(blockIdx.x * kThreads + threadIdx.x); i < end;
       i += num_threads) {
    // The last expert whose pairs start here or before; those without any start where the next
    // does.
    int32_t low = 0;
    int32_t high = args.num_experts;
    while (high - low > 1) {
      const int32_t middle = (low + high) / 2;
      (pairs[middle] <= i ? low : high) = middle;
    }
    const int32_t at = i - pairs[low];
    const bool real = at < sizes[low];
    const int32_t row = rows[low] + at;
    lists.pairs[i] = static_cast<uint32_t>(real ? row : args.num_rows);
    lists.weights[i] = real ? args.row_weights[row] : 0.0f;
    if (i % kBlockRows == 0) lists.experts[i / kBlockRows] = low;
  }
}

}  // namespace

gpuError_t launch_row_lists(gpuStream_t stream, int32_t num_pairs, const RowListsArgs& args) {
  constexpr int32_t kMaxBlocks = 256;
  const int32_t wanted = (num_pairs + kThreads - 1) / kThreads;
  const int blocks = wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks;
  const size_t lds_bytes = sizeof(int32_t) * static_cast<size_t>(3 * args.num_experts + 1);
  row_lists_kernel<<<blocks, kThreads, lds_bytes, stream>>>(args, num_pairs);
  return gpuGetLastError();
}

gpuError_t preload_lists() {
  gpuFuncAttributes found;
  return gpuFuncGetAttributes(&found, reinterpret_cast<const void*>(row_lists_kernel));
}

}  // namespace moriep::aiter
