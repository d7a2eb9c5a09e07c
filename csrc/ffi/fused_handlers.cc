// The XLA custom call of a whole layer's experts on MORI and AITER: tokens go to their experts,
// which run on what MORI has brought where it lies, and results come back. XLA may replay what it
// enqueues.
#include "../mori/fused.h"
#include "aiter_layer.h"
#include "mori_call.h"

namespace moriep::mori {
namespace {

// Those of an exchange, and those of the experts; Python's fused.py builds them in one place.
struct FusedAttributes {
  std::string_view group;
  std::string_view config;
  int64_t num_experts;
  int64_t num_local_experts;
  int64_t num_nodes;
  std::string_view handle;
  std::string_view wire;
  int64_t dispatch_blocks;
  int64_t dispatch_waves;
  int64_t dispatch_rdma_blocks;
  int64_t combine_blocks;
  int64_t combine_waves;
  int64_t combine_rdma_blocks;
  std::string_view scheme;
  std::string_view kernel;
  int64_t tile;

  MoriAttributes exchange() const {
    return {
        group,          config,        num_experts,        num_local_experts, num_nodes,
        handle,         wire,          dispatch_blocks,    dispatch_waves,    dispatch_rdma_blocks,
        combine_blocks, combine_waves, combine_rdma_blocks};
  }
};

ffi::Error fused_handler(int32_t device, void* stream, ffi::AnyBuffer x, I32 ids, F32Buffer weights,
                         I32 words, I32 rank, I32 order, ffi::AnyBuffer w1, ffi::AnyBuffer w2,
                         F32Buffer w1_scale, F32Buffer w2_scale, Out<ffi::AnyBuffer> y,
                         Out<I32> all_words, Out<I32> order_out, Out<U8> wire_codes,
                         Out<F32Buffer> wire_scales, Out<U8> codes, Out<F32Buffer> scales,
                         Out<ffi::Buffer<ffi::BF16>> sums, Out<I32> workspace,
                         FusedAttributes attributes) {
  const MoriAttributes exchange = attributes.exchange();
  Place place;
  FusedCall call;
  call.device = device;
  Status status = begin(device, stream, x, ids, rank, order, *order_out, exchange, Phase::kDispatch,
                        &place, &call.dispatch);
  if (status.ok()) {
    status = begin(device, stream, *y, ids, rank, order, *order_out, exchange, Phase::kCombine,
                   &place, &call.combine);
  }
  if (status.ok()) {
    status =
        aiter::decode_layer(w1, w2, w1_scale, w2_scale,
                            {attributes.scheme, attributes.kernel, attributes.tile}, &call.layer);
  }
  if (status.ok() &&
      (call.dispatch.type != RowType::kBF16 || call.combine.type != RowType::kBF16)) {
    status = bad_argument("tokens and results must be bfloat16");
  }
  if (status.ok() && call.dispatch.num_nodes > 1) {
    status = bad_argument("the one call for exchange and experts stays on one machine");
  }
  if (!status.ok()) return to_ffi(status);
  const Call& there = call.dispatch;
  const int64_t tokens = there.num_tokens;
  const int64_t hidden = there.hidden_size;
  const int64_t n = room(place, there);
  const auto num_words = static_cast<int64_t>(words.element_count());
  const bool fp8 = there.wire == Wire::kFp8;
  const bool as_they_come = fp8 && aiter::takes_wire(call.layer.scheme);
  call.shape = Shape{.num_ranks = place.group->num_ranks(),
                     .num_tokens = tokens,
                     .top_k = there.top_k,
                     .hidden_size = hidden,
                     .num_experts = there.num_experts,
                     .num_local_experts = there.num_local_experts,
                     .block = 1,
                     .capacity = 1,
                     .num_words = num_words};
  status = first_failure(
      {check_shape(call.shape), expect_shape("weights", weights, {tokens, there.top_k}),
       expect_shape("words", words, {num_words}),
       expect_shape("w2", w2, {there.num_local_experts, hidden, call.layer.intermediate}),
       expect_shape("y", *y, {tokens, hidden}),
       expect_shape("all_words", *all_words, {place.group->num_ranks(), num_words}),
       expect_shape("wire_codes", *wire_codes, {fp8 ? tokens : 0, hidden}),
       expect_shape("wire_scales", *wire_scales, {fp8 ? tokens : 0, num_fp8_groups(hidden)}),
       expect_shape("codes", *codes, {as_they_come ? 0 : n, hidden}),
       expect_shape("scales", *scales, {aiter::row_scale_count(call.layer, n)}),
       expect_shape("sums", *sums, {n, hidden}),
       expect_shape("workspace", *workspace, {fused_words(call.shape)}), aiter::preload(device)});
  if (!status.ok()) return to_ffi(status);
  return to_ffi(run_fused(*place.group, call,
                          {.x = bytes_of(x),
                           .ids = ids.typed_data(),
                           .weights = weights.typed_data(),
                           .words = words.typed_data(),
                           .num_words = num_words,
                           .y = bytes_of(*y),
                           .all_words = all_words->typed_data(),
                           .wire_codes = wire_codes->typed_data(),
                           .wire_scales = wire_scales->typed_data(),
                           .codes = codes->typed_data(),
                           .scales = scales->typed_data(),
                           .sums = static_cast<std::byte*>(sums->untyped_data()),
                           .workspace = workspace->typed_data()}));
}

#define MORIEP_HANDLER __attribute__((visibility("default"))) XLA_FFI_Error*

}  // namespace
}  // namespace moriep::mori

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(moriep::mori::FusedAttributes,
                                      xla::ffi::StructMember<std::string_view>("group"),
                                      xla::ffi::StructMember<std::string_view>("config"),
                                      xla::ffi::StructMember<int64_t>("num_experts"),
                                      xla::ffi::StructMember<int64_t>("num_local_experts"),
                                      xla::ffi::StructMember<int64_t>("num_nodes"),
                                      xla::ffi::StructMember<std::string_view>("handle"),
                                      xla::ffi::StructMember<std::string_view>("wire"),
                                      xla::ffi::StructMember<int64_t>("dispatch_blocks"),
                                      xla::ffi::StructMember<int64_t>("dispatch_waves"),
                                      xla::ffi::StructMember<int64_t>("dispatch_rdma_blocks"),
                                      xla::ffi::StructMember<int64_t>("combine_blocks"),
                                      xla::ffi::StructMember<int64_t>("combine_waves"),
                                      xla::ffi::StructMember<int64_t>("combine_rdma_blocks"),
                                      xla::ffi::StructMember<std::string_view>("scheme"),
                                      xla::ffi::StructMember<std::string_view>("kernel"),
                                      xla::ffi::StructMember<int64_t>("tile"));

namespace moriep::mori {

extern "C" {
MORIEP_HANDLER MoriepFusedExperts(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepFusedExperts, fused_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()          // x [T, H]
                                  .Arg<I32>()                     // ids [T, K]
                                  .Arg<F32Buffer>()               // weights [T, K]
                                  .Arg<I32>()                     // words [W]
                                  .Arg<I32>()                     // rank [1]
                                  .Arg<I32>()                     // order [1]
                                  .Arg<ffi::AnyBuffer>()          // w1 [L, 2I, H]
                                  .Arg<ffi::AnyBuffer>()          // w2 [L, H, I]
                                  .Arg<F32Buffer>()               // w1_scale
                                  .Arg<F32Buffer>()               // w2_scale
                                  .Ret<ffi::AnyBuffer>()          // y [T, H]
                                  .Ret<I32>()                     // all_words [R, W]
                                  .Ret<I32>()                     // order [1]
                                  .Ret<U8>()                      // wire_codes [T, H] or [0, H]
                                  .Ret<F32Buffer>()               // wire_scales
                                  .Ret<U8>()                      // codes [N, H] or [0, H]
                                  .Ret<F32Buffer>()               // scales
                                  .Ret<ffi::Buffer<ffi::BF16>>()  // sums [N, H]
                                  .Ret<I32>()                     // workspace
                                  .Attrs<FusedAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace moriep::mori
