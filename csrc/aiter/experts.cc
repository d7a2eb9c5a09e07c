#include "experts.h"

#include <algorithm>
#include <string>

#include "arguments.h"
#include "gpu/expand.h"
#include "gpu/kernels.h"
#include "gpu/launch.h"
#include "kernels.h"
#include "modules.h"

namespace moriep::aiter {
namespace {

using gpu::launched;

constexpr uint32_t kThreads = 256;  // of a work-group of AITER's

int64_t max_list_blocks(int64_t num_pairs, int64_t num_experts) {
  return (num_pairs + (kBlockRows - 1) * num_experts) / kBlockRows;
}

Lists lists_in(int32_t* words, int64_t num_blocks) {
  const int64_t pairs = num_blocks * kBlockRows;
  return {.pairs = reinterpret_cast<uint32_t*>(words),
          .weights = reinterpret_cast<float*>(words + pairs),
          .experts = words + 2 * pairs,
          .valid = words + 2 * pairs + num_blocks};
}

// An exchange's sizes as the sort sees them: rows are the places of the lists.
Shape listed(const Shape& shape) {
  const int64_t pairs =
      shape.num_ranks * shape.num_tokens * std::min(shape.top_k, shape.num_local_experts);
  Shape sorted = shape;
  sorted.block = kBlockRows;
  sorted.capacity =
      std::max<int64_t>(max_list_blocks(pairs, shape.num_local_experts), 1) * kBlockRows;
  return sorted;
}

Status clear(gpuStream_t stream, const Layer& layer, int64_t num_rows, std::byte* out) {
  const auto bytes = static_cast<size_t>(num_rows * layer.hidden_size * 2);
  return launched(gpuMemsetAsync(out, 0, bytes, stream));
}

// A launch of AITER's along the lists, whose grid is as large as the longest lists.
Status launch_experts(int32_t device, gpuStream_t stream, const Layer& layer, const void* codes,
                      const void* row_scales, int64_t num_rows, const Lists& lists,
                      int64_t num_blocks, std::byte* out) {
  hipFunction_t function = nullptr;
  if (Status status = find_kernel(device, layer.kernel, &function); !status.ok()) return status;
  const auto number = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t hidden = layer.hidden_size;
  const int64_t inner = layer.intermediate;
  const bool blocks = layer.scheme == Scheme::kFp8Block;
  Arguments args;
  args.out = out;
  args.rows = codes;
  args.w1 = layer.w1;
  args.valid = lists.valid;
  args.w2 = layer.w2;
  args.row_scales = row_scales;
  args.w1_scale = layer.w1_scale;
  args.w2_scale = layer.w2_scale;
  args.pairs = lists.pairs;
  args.weights = lists.weights;
  args.experts = lists.experts;
  args.hidden = number(hidden);
  args.intermediate = number(inner);
  args.num_rows = number(num_rows);
  args.num_experts = number(layer.num_experts);
  args.row_stride = number(hidden);
  args.w1_row_stride = number(hidden);
  args.w2_row_stride = number(inner);
  args.out_stride = number(hidden * 2);
  args.w1_stride = number(2 * inner * hidden);
  args.w2_stride = number(hidden * inner);
  args.w1_scale_stride =
      number(4 * (blocks ? 2 * inner / kScaleBlock * (hidden / kScaleBlock) : 2 * inner));
  args.w2_scale_stride =
      number(4 * (blocks ? hidden / kScaleBlock * (inner / kScaleBlock) : hidden));
  args.smooth_stride = number(4 * inner);
  args.top_k = number(1);
  args.groups_divisor = number(inner / layer.tile);

  size_t size = sizeof(args);
  void* extra[] = {HIP_LAUNCH_PARAM_BUFFER_POINTER, &args, HIP_LAUNCH_PARAM_BUFFER_SIZE, &size,
                   HIP_LAUNCH_PARAM_END};
  return launched(hipModuleLaunchKernel(function, number(inner / layer.tile), number(num_blocks), 1,
                                        kThreads, 1, 1, 0, stream, nullptr, extra));
}

}  // namespace

int64_t row_scale_count(const Layer& layer, int64_t num_rows) {
  return layer.scheme == Scheme::kFp8Block ? num_rows * (layer.hidden_size / kScaleBlock)
                                           : num_rows;
}

int64_t list_words(int64_t num_pairs, int64_t num_experts) {
  const int64_t blocks = max_list_blocks(num_pairs, num_experts);
  return blocks * (2 * kBlockRows + 1) + 2;
}

Status check_layer(const Layer& layer, int64_t num_rows) {
  constexpr int64_t kMaxBytes = int64_t{1} << 32;  // that the kernels count
  constexpr int64_t kMaxRows = int64_t{1} << 24;   // that a pair can name
  const auto refused = [](const std::string& what) {
    return Status(Code::kInvalidArgument, what + "; use experts='triton'");
  };
  if (layer.tile < 1 || layer.intermediate % layer.tile != 0 || layer.hidden_size % 256 != 0 ||
      layer.hidden_size < 512 || (layer.scheme == Scheme::kFp8Block && layer.tile % kScaleBlock)) {
    return refused("hidden_size=" + std::to_string(layer.hidden_size) + " and intermediate_size=" +
                   std::to_string(layer.intermediate) + " are none of those that AITER's kernel " +
                   std::string(layer.kernel) + " gets right");
  }
  if (layer.num_experts > gpu::kMaxLocalExperts ||
      layer.num_experts * 2 * layer.intermediate * layer.hidden_size >= kMaxBytes) {
    return refused(std::to_string(layer.num_experts) +
                   " experts on a rank are more than AITER's kernels count: all of w1 must be "
                   "smaller than 4 GiB");
  }
  if (num_rows >= kMaxRows || num_rows * layer.hidden_size * 2 >= kMaxBytes) {
    return refused(std::to_string(num_rows) +
                   " rows of hidden_size=" + std::to_string(layer.hidden_size) +
                   " are more than AITER's kernels count: all of them must be smaller than 4 GiB, "
                   "so lower capacity_factor");
  }
  return Status();
}

Status run_rows(int32_t device, void* stream, const Layer& layer, const RowBuffers& at) {
  if (Status status = check_layer(layer, at.num_rows); !status.ok()) return status;
  if (at.num_rows == 0 || layer.num_experts == 0) return Status();
  auto* const on = static_cast<gpuStream_t>(stream);
  const int64_t blocks = max_list_blocks(at.num_rows, layer.num_experts);
  const Lists lists = lists_in(at.lists, blocks);
  const auto num_rows = static_cast<int32_t>(at.num_rows);
  const auto num_pairs = static_cast<int32_t>(blocks * kBlockRows);
  if (Status status = clear(on, layer, at.num_rows, at.out); !status.ok()) return status;
  gpuError_t error = launch_row_lists(on, num_pairs,
                                      {.group_sizes = at.group_sizes,
                                       .row_weights = at.row_weights,
                                       .num_experts = static_cast<int32_t>(layer.num_experts),
                                       .block = static_cast<int32_t>(at.block),
                                       .num_rows = num_rows,
                                       .lists = lists});
  if (Status status = launched(error); !status.ok()) return status;
  error = launch_quantise(on, layer.scheme, num_pairs,
                          {.x = at.rows,
                           .x_scales = nullptr,
                           .num_rows = num_rows,
                           .hidden = static_cast<uint32_t>(layer.hidden_size),
                           .pairs = lists.pairs,
                           .end = lists.valid,
                           .codes = at.codes,
                           .scales = at.scales,
                           .scales_per_row = 1,
                           .scales_per_group = static_cast<uint32_t>(num_rows),
                           .out = at.out,
                           .clear = false});
  if (Status status = launched(error); !status.ok()) return status;
  return launch_experts(device, on, layer, at.codes, at.scales, at.num_rows, lists, blocks, at.out);
}

// Lists, routes [R, T, K], group sizes [L] and what the sort takes.
int64_t arrival_words(const Shape& shape) {
  const Shape sorted = listed(shape);
  return sorted.capacity / kBlockRows * (2 * kBlockRows + 1) + 2 +
         shape.num_ranks * shape.num_tokens * shape.top_k + shape.num_local_experts +
         gpu::expand_words(sorted);
}

Status run_arrivals(int32_t device, void* stream, const Layer& layer, const Shape& shape,
                    const ArrivalBuffers& at) {
  const int64_t num_rows = shape.num_ranks * shape.num_tokens;
  if (Status status = check_layer(layer, num_rows); !status.ok()) return status;
  const Shape sorted = listed(shape);
  gpu::Sizes sizes;
  if (Status status = gpu::count_sizes(sorted, layer.hidden_size, &sizes); !status.ok()) {
    return status;
  }
  auto* const on = static_cast<gpuStream_t>(stream);
  const gpu::Chunks chunks = gpu::chunks_of(sorted);
  const int64_t blocks = sorted.capacity / kBlockRows;
  const Lists lists = lists_in(at.words, blocks);
  int32_t* const routes = lists.valid + 2;
  int32_t* const group_sizes = routes + num_rows * shape.top_k;
  int32_t* const written = group_sizes + shape.num_local_experts;
  int32_t* const counts = written + chunks.written_words;
  const gpu::Arrivals arrivals{at.sources, at.count};
  gpuError_t error = gpu::launch_arrival_plan(on, {.sizes = sizes,
                                                   .arrivals = arrivals,
                                                   .ids = at.ids,
                                                   .weights = at.weights,
                                                   .rank = at.rank,
                                                   .tokens_per_chunk = chunks.tokens_per_chunk,
                                                   .chunks_per_node = chunks.chunks_per_node,
                                                   .counts = counts,
                                                   .written = reinterpret_cast<uint32_t*>(written),
                                                   .places = counts + chunks.counts,
                                                   .routes = routes,
                                                   .group_sizes = group_sizes,
                                                   .row_weights = lists.weights});
  if (Status status = launched(error); !status.ok()) return status;
  error = launch_arrival_lists(on, {.sizes = sizes,
                                    .arrivals = arrivals,
                                    .routes = routes,
                                    .group_sizes = group_sizes,
                                    .lists = lists});
  if (Status status = launched(error); !status.ok()) return status;
  error = launch_quantise(on, layer.scheme, static_cast<int32_t>(num_rows),
                          {.x = at.tokens,
                           .x_scales = at.token_scales,
                           .num_rows = static_cast<int32_t>(num_rows),
                           .hidden = static_cast<uint32_t>(layer.hidden_size),
                           .pairs = nullptr,
                           .end = at.count,
                           .codes = at.codes,
                           .scales = at.scales,
                           .scales_per_row = 1,
                           .scales_per_group = static_cast<uint32_t>(num_rows),
                           .out = at.out,
                           .clear = true});
  if (Status status = launched(error); !status.ok()) return status;
  const bool as_they_are = at.token_scales != nullptr && takes_wire(layer.scheme);
  const void* codes = as_they_are ? static_cast<const void*>(at.tokens) : at.codes;
  return launch_experts(device, on, layer, codes, at.scales, num_rows, lists, blocks, at.out);
}

Status quantise_for_wire(void* stream, const WireBuffers& at) {
  const QuantiseArgs args{.x = at.x,
                          .x_scales = nullptr,
                          .num_rows = static_cast<int32_t>(at.num_tokens),
                          .hidden = static_cast<uint32_t>(at.hidden_size),
                          .pairs = nullptr,
                          .end = nullptr,
                          .codes = at.codes,
                          .scales = at.scales,
                          .scales_per_row = static_cast<uint32_t>(at.hidden_size / kScaleBlock),
                          .scales_per_group = 1,
                          .out = nullptr,
                          .clear = false};
  return launched(launch_quantise(static_cast<gpuStream_t>(stream), Scheme::kFp8Block,
                                  static_cast<int32_t>(at.num_tokens), args));
}

Status preload_kernels() {
  for (const gpuError_t error :
       {preload_lists(), preload_quantise(), gpu::preload_arrival_plan()}) {
    if (error != gpuSuccess) {
      return Status(Code::kFailedPrecondition,
                    std::string("this device cannot run the kernels: ") + gpuGetErrorString(error));
    }
  }
  return Status();
}

}  // namespace moriep::aiter
