// A layer's experts in one go, enqueued on a stream: MORI's dispatch, AITER's kernel on the buffer
// in which MORI has put the tokens, MORI's combine. It is the two steps of a send and a give_back,
// which keep no plan. No header of HIP's or of MORI's is included, so that the handlers need none.
#pragma once

#include "aiter/experts.h"
#include "exchange.h"
#include "moriep/plan.h"

namespace moriep::mori {

struct FusedCall {
  int32_t device = 0;
  Call dispatch;
  Call combine;
  aiter::Layer layer;
  Shape shape;
};

struct FusedBuffers {
  const std::byte* x;    // bf16 [T, H]
  const int32_t* ids;    // [T, K]
  const float* weights;  // [T, K]
  const int32_t* words;  // [W]
  int64_t num_words;
  std::byte* y;        // bf16 [T, H]
  int32_t* all_words;  // [R, W]
  // The rest is memory for as long as the call runs.
  uint8_t* wire_codes;  // [T, H] with the fp8 wire
  float* wire_scales;   // [T, H / 128], likewise
  uint8_t* codes;       // [N, H], or nothing where MORI brings what the kernel multiplies
  float* scales;        // of the rows
  std::byte* sums;      // bf16 [N, H]
  int32_t* workspace;   // [fused_words]
};

int64_t fused_words(const Shape& shape);

Status run_fused(Group& group, const FusedCall& call, const FusedBuffers& at);

}  // namespace moriep::mori
