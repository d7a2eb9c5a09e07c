#include "launch.h"

#include <algorithm>
#include <limits>
#include <string>

#include "kernels.h"
#include "rows.h"

namespace moriep::gpu {

Status count_sizes(const Shape& shape, int64_t row_bytes, Sizes* sizes) {
  constexpr int64_t kMaxItems = std::numeric_limits<int32_t>::max();
  const int64_t parts = row_bytes / 32 + 1;  // of the narrowest words
  const int64_t all_tokens = shape.num_ranks * shape.num_tokens;
  if (shape.num_local_experts > kMaxLocalExperts || shape.top_k > kMaxTopK ||
      all_tokens * shape.top_k > kMaxItems || all_tokens * parts > kMaxItems ||
      (shape.capacity / kClearRows + 1) * parts > kMaxItems ||
      shape.num_tokens > kMaxItems / kMaxRanks) {
    return Status(Code::kInvalidArgument,
                  "num_local_experts=" + std::to_string(shape.num_local_experts) + ", top_k=" +
                      std::to_string(shape.top_k) + ", capacity=" + std::to_string(shape.capacity) +
                      " and " + std::to_string(shape.num_tokens) +
                      " tokens per rank are more than the GPU kernels count (1024 experts per "
                      "rank, top_k 256); use transport='collective'");
  }
  *sizes = Sizes{.num_ranks = static_cast<int32_t>(shape.num_ranks),
                 .num_tokens = static_cast<int32_t>(shape.num_tokens),
                 .top_k = static_cast<int32_t>(shape.top_k),
                 .num_experts = static_cast<int32_t>(shape.num_experts),
                 .num_local_experts = static_cast<int32_t>(shape.num_local_experts),
                 .block = static_cast<int32_t>(shape.block),
                 .capacity = static_cast<int32_t>(shape.capacity),
                 .fanout = static_cast<int32_t>(std::min(shape.top_k, shape.num_ranks)),
                 .num_words = static_cast<int32_t>(shape.num_words),
                 .num_nodes = static_cast<int32_t>(shape.num_nodes),
                 .row_bytes = row_bytes};
  return Status();
}

Chunks chunks_of(const Shape& shape) {
  const int routes = plan_chunk_routes(static_cast<int>(shape.num_local_experts));
  const int64_t tokens = std::max<int64_t>(1, routes / shape.top_k);
  const int64_t of_node = shape.num_tokens / shape.num_nodes;
  const int64_t chunks = std::max<int64_t>(1, (of_node + tokens - 1) / tokens);
  return {.tokens_per_chunk = static_cast<int32_t>(tokens),
          .chunks_per_node = static_cast<int32_t>(chunks),
          .written_words = (shape.capacity + 31) / 32,
          .counts = shape.num_nodes * shape.num_ranks * chunks * shape.num_local_experts};
}

int num_blocks(int32_t max_blocks, int64_t num_items) {
  constexpr int64_t kWavesPerBlock = kThreads / kWave;
  const int64_t wanted = (num_items + kWavesPerBlock - 1) / kWavesPerBlock;
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, max_blocks));
}

Status launched(gpuError_t error) {
  if (error == gpuSuccess) return Status();
  return Status(Code::kInternal,
                std::string("a kernel was not launched: ") + gpuGetErrorString(error));
}

}  // namespace moriep::gpu
