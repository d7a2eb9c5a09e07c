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

// Lists of the tokens that have come, after gpu::launch_arrival_plan with blocks of kBlockRows: the
// row that it gives a route is the place of its pair, whose weight is there already.
struct ArrivalListsArgs {
  gpu::Sizes sizes;
  gpu::Arrivals arrivals;
  const int32_t* routes;       // [R, T, K]
  const int32_t* group_sizes;  // [L]
  Lists lists;
};
gpuError_t launch_arrival_lists(gpuStream_t stream, const ArrivalListsArgs& args);

// The rows that are made codes: those that the lists name, or without lists the first ones.
struct QuantiseArgs {
  const std::byte* x;     // bf16 [M, H], or float8 [M, H] with x_scales
  const float* x_scales;  // [M, H / 128], or null
  int32_t num_rows;       // M
  uint32_t hidden;        // H
  const uint32_t* pairs;  // or null
  const int32_t* end;     // of the lists, or of the first rows; null: all rows
  uint8_t* codes;  // [M, H]; null where x are the codes, and only their scales are laid out anew
  float* scales;   // of group g of a row: at row * scales_per_row + g * scales_per_group
  uint32_t scales_per_row;
  uint32_t scales_per_group;
  // bf16 [M, H], to which AITER's kernels add: each row starts as zeros, with `clear` by this
  // kernel. The kernels for int8 would make zeros of a row with an infinity or a NaN, so it starts
  // as NaN.
  std::byte* out;
  bool clear;
};
gpuError_t launch_quantise(gpuStream_t stream, Scheme scheme, int32_t num_items,
                           const QuantiseArgs& args);

// Load every kernel on the current device, so that none is loaded inside a recording.
gpuError_t preload_lists();
gpuError_t preload_quantise();

}  // namespace moriep::aiter
