// What the custom calls on MORI have in common: decodes and validates.
#pragma once

#include "../mori/exchange.h"
#include "../mori/flags.h"
#include "decode.h"
#include "place.h"

namespace moriep::mori {

using Stream = ffi::PlatformStream<void*>;
using U8 = ffi::Buffer<ffi::U8>;
using Place = PlaceOf<Group>;

// The attributes of every exchange; Python's transports/mori.py builds them in one place.
struct MoriAttributes {
  std::string_view group;
  std::string_view config;
  int64_t num_experts;
  int64_t num_local_experts;
  int64_t num_nodes;
  std::string_view handle;
  std::string_view wire;  // of a send: "fp8", or "" for tokens as they are
  // Of MORI's kernels: work-groups, waves in each, and of the work-groups those that serve the
  // network.
  int64_t dispatch_blocks;
  int64_t dispatch_waves;
  int64_t dispatch_rdma_blocks;
  int64_t combine_blocks;
  int64_t combine_waves;
  int64_t combine_rdma_blocks;
};

enum class Phase { kDispatch, kCombine };

// Finds the place and decodes what every exchange has. The rows are those of this rank's tokens:
// x [T, H] or y.
inline Status begin(int32_t device, void* stream, const ffi::AnyBuffer& rows, const I32& ids,
                    const I32& rank, const I32& order, I32& order_out,
                    const MoriAttributes& attributes, Phase phase, Place* place, Call* call) {
  if (Status status = find_place(attributes.group, device, place); !status.ok()) return status;
  const auto row_dims = rows.dimensions();
  const auto id_dims = ids.dimensions();
  if (row_dims.size() != 2 || id_dims.size() != 2) {
    return bad_argument("tokens " + shape_text(rows) + " and ids " + shape_text(ids) +
                        " must have two dimensions each");
  }
  const bool there = phase == Phase::kDispatch;
  const auto pick = [there](int64_t dispatch, int64_t combine) {
    return static_cast<int32_t>(there ? dispatch : combine);
  };
  *call =
      Call{.num_tokens = row_dims[0],
           .hidden_size = row_dims[1],
           .top_k = id_dims[1],
           .num_experts = attributes.num_experts,
           .num_local_experts = attributes.num_local_experts,
           .num_nodes = static_cast<int32_t>(attributes.num_nodes),
           .config = attributes.config,
           .handle = attributes.handle,
           .num_blocks = pick(attributes.dispatch_blocks, attributes.combine_blocks),
           .num_waves = pick(attributes.dispatch_waves, attributes.combine_waves),
           .num_rdma_blocks = pick(attributes.dispatch_rdma_blocks, attributes.combine_rdma_blocks),
           .rank = rank.typed_data(),
           .order = order.typed_data(),
           .order_out = order_out.typed_data(),
           .stream = stream};
  if (Status status = first_failure(
          {decode_type(rows, true, &call->type), decode_wire(attributes.wire, true, &call->wire),
           expect_shape("ids", ids, {call->num_tokens, call->top_k}),
           expect_shape("rank", rank, {1}), expect_shape("order", order, {1}),
           expect_shape("order", order_out, {1})});
      !status.ok()) {
    return status;
  }
  if (call->type != RowType::kF16) return Status();
  return bad_argument("tokens of float16 cannot go by MORI; cast them to bfloat16 or float32");
}

// The number of arrivals that a rank has room for.
inline int64_t room(const Place& place, const Call& call) {
  return place.group->num_ranks() * call.num_tokens;
}

inline Status expect_arrivals(const Place& place, const Call& call, const ffi::AnyBuffer& tokens,
                              const ffi::AnyBuffer& rows) {
  if (tokens.element_type() != rows.element_type()) {
    return bad_argument("tokens here and there must have one dtype");
  }
  return expect_shape("tokens", tokens, {room(place, call), call.hidden_size});
}

inline Status expect_routing(const Place& place, const Call& call, const I32& places,
                             const I32& origins, const I32& count, const I32& between) {
  const int64_t kept = between_words(call.num_nodes, call.num_tokens, call.top_k);
  return first_failure({expect_shape("places", places, {call.num_tokens, call.top_k}),
                        expect_shape("origins", origins, {room(place, call)}),
                        expect_shape("count", count, {1}),
                        expect_shape("between", between, {kept})});
}

inline int32_t* words_of(const I32& between) {
  return between.element_count() == 0 ? nullptr : between.typed_data();
}

}  // namespace moriep::mori
