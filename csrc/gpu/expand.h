// From a token-major transport's arrivals to rows, and back: local to one rank, enqueued on a
// stream. No peer takes part, so there is no step, nothing to wait for and nothing to fail; an
// index that makes no sense is as if it were not there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moriep/plan.h"
#include "moriep/row_type.h"
#include "moriep/status.h"

namespace moriep::gpu {

// What each operation is told. All pointers are the device's.
struct LocalCall {
  Shape shape;
  RowType type = RowType::kF32;
  const int32_t* sources = nullptr;  // [N]: source rank * T + source token
  const int32_t* count = nullptr;    // [1], how many of them are defined; negative: rows are poison
  void* stream = nullptr;
};

struct ExpandBuffers {
  const std::byte* tokens;  // [N, H]
  const int32_t* ids;       // [N, K]
  const float* weights;     // [N, K]
  const int32_t* rank;      // [1]
  std::byte* rows;          // [C, H]
  float* row_weights;       // [C]
  int32_t* group_sizes;     // [L]
  int32_t* routes;          // [R, T, K]
  int32_t* workspace;       // [expand_words]
};

struct ReexpandBuffers {
  const std::byte* tokens;  // [N, H]
  const int32_t* routes;    // [R, T, K]
  std::byte* rows;          // [C, H]
  int32_t* workspace;       // [reexpand_words]
};

struct GatherBuffers {
  const std::byte* rows;  // [C, H]
  const float* scalars;   // [C], or null
  const int32_t* routes;  // [R, T, K]
  std::byte* tokens;      // [N, H]
  float* token_scalars;   // [N, K], or null
};

// The workspace of each, in words; transports/expand.py states the same rules.
int64_t expand_words(const Shape& shape);
int64_t reexpand_words(const Shape& shape);

Status expand(const LocalCall& call, const ExpandBuffers& at);
Status reexpand(const LocalCall& call, const ReexpandBuffers& at);
Status gather(const LocalCall& call, const GatherBuffers& at);

// Loads all kernels on the current device, so that none is loaded inside a recording.
Status preload_expand_kernels();

}  // namespace moriep::gpu
