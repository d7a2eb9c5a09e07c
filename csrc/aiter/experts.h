// The experts by AITER's fused kernels, enqueued on a stream: rows to codes, the lists of pairs,
// and a launch of AITER's that adds to zeros. Nothing here allocates, loads, or asks the device. No
// header of HIP's is included, so that the handlers need none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "moriep/plan.h"
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

// Tokens that have come, in any order, each with the ids and weights of all its experts. The result
// is each token's sum over those of its experts that are here; nothing is read or written from the
// count on.
struct ArrivalBuffers {
  const std::byte* tokens;    // bf16 [N, H], or float8 [N, H] with scales
  const float* token_scales;  // [N, H / 128], or null
  const int32_t* ids;         // [N, K]
  const float* weights;       // [N, K]
  const int32_t* sources;     // [N]: source rank * T + source token
  const int32_t* count;       // [1]
  const int32_t* rank;        // [1]
  std::byte* out;             // bf16 [N, H]
  uint8_t* codes;             // [N, H], or nothing where the tokens are what the kernels multiply
  float* scales;              // [row_scale_count]
  int32_t* words;             // [arrival_words]
};

// Tokens to what the fp8 wire sends, for sizes that check_layer takes.
struct WireBuffers {
  const std::byte* x;  // bf16 [T, H]
  int64_t num_tokens;
  int64_t hidden_size;
  uint8_t* codes;  // [T, H]
  float* scales;   // [T, H / 128]
};
Status quantise_for_wire(void* stream, const WireBuffers& at);

// Scales of so many rows.
int64_t row_scale_count(const Layer& layer, int64_t num_rows);
// Words of the lists of at most so many pairs; experts/aiter.py states the same rule.
int64_t list_words(int64_t num_pairs, int64_t num_experts);

// Words of workspace for arrivals of an exchange; fused.py states the same rule.
int64_t arrival_words(const Shape& shape);
// Whether tokens of the fp8 wire are multiplied as they have come.
inline bool takes_wire(Scheme scheme) { return scheme == Scheme::kFp8Block; }

// Refuses sizes that the kernels get wrong, or that they cannot count in 32 bits.
Status check_layer(const Layer& layer, int64_t num_rows);

// `shape` is the exchange's; its block and capacity are not looked at.
Status run_arrivals(int32_t device, void* stream, const Layer& layer, const Shape& shape,
                    const ArrivalBuffers& at);
Status run_rows(int32_t device, void* stream, const Layer& layer, const RowBuffers& at);

// Loads our own kernels on the current device, so that none is loaded inside a recording.
Status preload_kernels();

}  // namespace moriep::aiter
