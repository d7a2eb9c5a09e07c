#include "expand.h"

#include <algorithm>
#include <limits>
#include <string>

#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace moriep::gpu {
namespace {

// No block waits for another, so any number may run.
constexpr int32_t kNoLimit = std::numeric_limits<int32_t>::max();

int64_t row_bytes_of(const LocalCall& call) {
  return call.shape.hidden_size * element_bytes(call.type);
}

Arrivals arrivals_of(const LocalCall& call) { return {call.sources, call.count}; }

gpuStream_t stream_of(const LocalCall& call) { return static_cast<gpuStream_t>(call.stream); }

Status enqueue_rows(const LocalCall& call, const ExpandArgs& args) {
  const int64_t parts = num_parts(args.sizes.row_bytes, 16, kCopyWords);
  const int64_t pulls = call.shape.num_ranks * call.shape.num_tokens;
  const int64_t items = (pulls + call.shape.capacity / kClearRows + 1) * parts;
  return launched(launch_expand(stream_of(call), num_blocks(kNoLimit, items), args));
}

}  // namespace

// The sort's narrowest chunks, so that the number does not depend on how it cuts.
int64_t expand_words(const Shape& shape) {
  constexpr int64_t kLeastRoutes = 256;
  const int64_t tokens = std::max<int64_t>(1, kLeastRoutes / shape.top_k);
  const int64_t chunks = std::max<int64_t>(1, (shape.num_tokens + tokens - 1) / tokens);
  return reexpand_words(shape) +
         shape.num_ranks * (chunks * shape.num_local_experts + shape.num_tokens);
}

int64_t reexpand_words(const Shape& shape) { return (shape.capacity + 31) / 32; }

Status expand(const LocalCall& call, const ExpandBuffers& at) {
  Sizes sizes;
  if (Status status = count_sizes(call.shape, row_bytes_of(call), &sizes); !status.ok()) {
    return status;
  }
  const Chunks chunks = chunks_of(call.shape);
  auto* written = reinterpret_cast<uint32_t*>(at.workspace);
  int32_t* counts = at.workspace + chunks.written_words;
  const ArrivalPlanArgs plan{.sizes = sizes,
                             .arrivals = arrivals_of(call),
                             .ids = at.ids,
                             .weights = at.weights,
                             .rank = at.rank,
                             .tokens_per_chunk = chunks.tokens_per_chunk,
                             .chunks_per_node = chunks.chunks_per_node,
                             .counts = counts,
                             .written = written,
                             .places = counts + chunks.counts,
                             .routes = at.routes,
                             .group_sizes = at.group_sizes,
                             .row_weights = at.row_weights};
  if (Status status = launched(launch_arrival_plan(stream_of(call), plan)); !status.ok()) {
    return status;
  }
  return enqueue_rows(call, {.sizes = sizes,
                             .arrivals = arrivals_of(call),
                             .tokens = at.tokens,
                             .routes = at.routes,
                             .written = written,
                             .rows = at.rows,
                             .row_weights = at.row_weights});
}

Status reexpand(const LocalCall& call, const ReexpandBuffers& at) {
  Sizes sizes;
  if (Status status = count_sizes(call.shape, row_bytes_of(call), &sizes); !status.ok()) {
    return status;
  }
  const ExpandArgs args{.sizes = sizes,
                        .arrivals = arrivals_of(call),
                        .tokens = at.tokens,
                        .routes = at.routes,
                        .written = reinterpret_cast<uint32_t*>(at.workspace),
                        .rows = at.rows,
                        .row_weights = nullptr};
  const auto written_bytes = static_cast<size_t>(reexpand_words(call.shape) * 4);
  gpuError_t error = gpuMemsetAsync(args.written, 0, written_bytes, stream_of(call));
  if (error == gpuSuccess) error = launch_mark_arrivals(stream_of(call), args);
  if (Status status = launched(error); !status.ok()) return status;
  return enqueue_rows(call, args);
}

Status gather(const LocalCall& call, const GatherBuffers& at) {
  Sizes sizes;
  if (Status status = count_sizes(call.shape, row_bytes_of(call), &sizes); !status.ok()) {
    return status;
  }
  const GatherArgs args{.sizes = sizes,
                        .arrivals = arrivals_of(call),
                        .rows = at.rows,
                        .scalars = at.scalars,
                        .routes = at.routes,
                        .tokens = at.tokens,
                        .token_scalars = at.token_scalars};
  const int64_t parts = num_parts(args.sizes.row_bytes, 16, 1);
  const int64_t items = call.shape.num_ranks * call.shape.num_tokens * parts;
  return launched(launch_gather(stream_of(call), num_blocks(kNoLimit, items), call.type, args));
}

Status preload_expand_kernels() {
  for (const gpuError_t error : {preload_arrival_plan(), preload_expand(), preload_gather()}) {
    if (error != gpuSuccess) {
      return Status(Code::kFailedPrecondition,
                    std::string("this device cannot run the kernels: ") + gpuGetErrorString(error));
    }
  }
  return Status();
}

}  // namespace moriep::gpu
