// The exchanges of a token-major transport on MORI, enqueued on a stream: send, resend and
// give_back of one rank. Nothing here allocates, loads, or asks the device. No header of HIP's or
// of MORI's is included, so that the handlers need none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "group.h"
#include "moriep/row_type.h"
#include "moriep/status.h"
#include "moriep/wire.h"

namespace moriep::mori {

// What every exchange is told. Pointers are the device's.
struct Call {
  int64_t num_tokens = 0;   // T
  int64_t hidden_size = 0;  // H
  int64_t top_k = 0;        // K
  int64_t num_experts = 0;  // E
  int64_t num_local_experts = 0;
  int32_t num_nodes = 1;
  RowType type = RowType::kF32;
  Wire wire = Wire::kRows;  // of a send
  std::string_view config;
  std::string_view handle;  // its key
  int32_t num_blocks = 0;   // of MORI's kernels
  int32_t num_waves = 0;    // of a block
  int32_t num_rdma_blocks = 0;
  const int32_t* rank = nullptr;   // [1]
  const int32_t* order = nullptr;  // [1]
  int32_t* order_out = nullptr;    // [1]
  void* stream = nullptr;
};

// What send leaves for the calls along its routing, all of it XLA's memory: a plan may live as long
// as it is needed, beside any number of others.
struct Routing {
  const int32_t* ids;  // [T, K]
  int32_t* places;     // [T, K]: where each token went, as MORI numbers it
  int32_t* origins;    // [N]: where each arrival came from, as MORI numbers it
  int32_t* count;      // [1]
  int32_t* between;    // [between_words] (mori/flags.h): what it takes between nodes
};

struct SendBuffers {
  const std::byte* x;    // [T, H]
  const float* weights;  // [T, K]
  const int32_t* words;  // [W]
  int64_t num_words;
  std::byte* tokens;   // [N, H]
  int32_t* out_ids;    // [N, K]
  float* out_weights;  // [N, K]
  int32_t* sources;    // [N]
  int32_t* all_words;  // [R, W]
  // Where tokens lie as float8 until MORI has read them; nothing of it is a result.
  uint8_t* codes;  // [T, H] with the fp8 wire
  float* scales;   // [T, H / 128 rounded up]
};
Status send(Group& group, const Call& call, const Routing& routing, const SendBuffers& at);

Status resend(Group& group, const Call& call, const Routing& routing, const std::byte* x,
              std::byte* tokens);

struct GiveBackBuffers {
  const std::byte* tokens;  // [N, H]
  const float* scalars;     // [N, K], or null
  std::byte* y;             // [T, H]
  float* token_scalars;     // [T, K], or null
};
Status give_back(Group& group, const Call& call, const Routing& routing, const GiveBackBuffers& at);

}  // namespace moriep::mori
