// What the host settles before it launches the kernels of an operation: that they can count its
// sizes, how the sort cuts its routes, and how many blocks run.
#pragma once

#include <cstdint>

#include "gpu_runtime.h"
#include "moriep/plan.h"
#include "moriep/status.h"
#include "team.h"

namespace moriep::gpu {

// Sizes as kernels compute with them; refuses those that they cannot count.
Status count_sizes(const Shape& shape, int64_t row_bytes, Sizes* sizes);

// How the counting sort cuts a group's routes, and the words of workspace that it takes.
struct Chunks {
  int32_t tokens_per_chunk = 1;
  int32_t chunks_per_node = 1;  // of one rank's tokens
  int64_t written_words = 0;    // a bit for each row
  int64_t counts = 0;           // [chunks, L]
};
Chunks chunks_of(const Shape& shape);

// Blocks that move rows: a wave for each item, within the kernel's limit.
int num_blocks(int32_t max_blocks, int64_t num_items);

// The result of a launch.
Status launched(gpuError_t error);

}  // namespace moriep::gpu
