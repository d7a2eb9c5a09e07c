// Our own kernels around AITER's: what each takes, and how it is launched. None of them
// synchronises with the host or allocates, and the same bytes in give the same bits out.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/arrivals.h"
#include "gpu/gpu_runtime.h"
#include "scheme.h"

namespace moriep::aiter {

// The (row, expert) pairs in the order of their experts, each expert's padded to whole blocks of
// kBlockRows. The kernels look at the first valid[0] of them only, and no more than that is
// written.
struct Lists {
  uint32_t* pairs;   // [P]
  float* weights;    // [P]
  int32_t* experts;  // [P / kBlockRows]
  int32_t* valid;    // [2]
};

// Lists of rows that lie by expert: each is the pair of itself and its expert.
struct RowListsArgs {
  const int32_t* group_sizes;  // [L]
  const float* row_weights;    // [C]
  int32_t num_experts;         // L
  int32_t block;               // every expert's run starts at a multiple of it
  int32_t num_rows;            // C
  Lists lists;
};
gpuError_t launch_row_lists(gpuStream_t stream, int32_t num_pairs, const RowListsArgs& args);

// The rows that are made codes: those of the lists, or where there are none the first `count`. The
// kernels for int8 would make zeros of a row with an infinity or a NaN, so its sum starts as NaN.
struct QuantiseArgs {
  const std::byte* x;  // bf16 [M, H]
  int32_t num_rows;    // M
  int32_t hidden;      // H
  const uint32_t* pairs;
  const int32_t* valid;
  const int32_t* count;
  uint8_t* codes;  // [M, H]
  float* scales;   // [M], or [H / 128, M]
  std::byte* out;  // bf16 [M, H], zeros
};
gpuError_t launch_quantise(gpuStream_t stream, Scheme scheme, int32_t num_items,
                           const QuantiseArgs& args);

// Load every kernel on the current device, so that none is loaded inside a recording.
gpuError_t preload_lists();
gpuError_t preload_quantise();

}  // namespace moriep::aiter
