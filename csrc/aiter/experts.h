// The experts by AITER's fused kernels, enqueued on a stream: rows to codes, the lists of pairs,
// and a launch of AITER's that adds to zeros. Nothing here allocates, loads, or asks the device. No
// header of HIP's is included, so that the handlers need none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "moriep/status.h"
#include "scheme.h"

namespace moriep::aiter {

// The experts of a rank, and the kernel that runs them. All pointers are the device's.
struct Layer {
  Scheme scheme = Scheme::kFp8Block;
  int64_t num_experts = 0;   // L
  int64_t hidden_size = 0;   // H
  int64_t intermediate = 0;  // I
  std::string_view kernel;   // as it was loaded
  int64_t tile = 0;          // columns of I that a work-group of it has
  const std::byte* w1;       // [L, 2I, H]
  const float* w1_scale;     // [L, 2I], or [L, 2I / 128, H / 128]
  const std::byte* w2;       // [L, H, I]
  const float* w2_scale;     // [L, H], or [L, H / 128, I / 128]
};

// Rows that lie by expert. The codes, scales and lists are memory for as long as the call runs.
struct RowBuffers {
  const std::byte* rows;       // bf16 [C, H]
  const float* row_weights;    // [C]
  const int32_t* group_sizes;  // [L]
  int64_t num_rows;            // C
  int64_t block;
  std::byte* out;  // bf16 [C, H]; zeros outside the experts' runs
  uint8_t* codes;  // [C, H]
  float* scales;   // [row_scale_count]
  int32_t* lists;  // [list_words]
};

// Scales of so many rows.
int64_t row_scale_count(const Layer& layer, int64_t num_rows);
// Words of the lists of at most so many pairs; experts/aiter.py states the same rule.
int64_t list_words(int64_t num_pairs, int64_t num_experts);

// Refuses sizes that the kernels get wrong, or that they cannot count in 32 bits.
Status check_layer(const Layer& layer, int64_t num_rows);

Status run_rows(int32_t device, void* stream, const Layer& layer, const RowBuffers& at);

// Loads our own kernels on the current device, so that none is loaded inside a recording.
Status preload_kernels();

}  // namespace moriep::aiter
