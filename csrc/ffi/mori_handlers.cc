// The XLA custom calls of MORI: send, resend and give_back, enqueued on XLA's stream.
//
// XLA records what a handler enqueues and replays it without calling the handler again, so nothing
// here may depend on how often it runs.
#include "mori_call.h"

namespace moriep::mori {
namespace {

ffi::Error send_handler(int32_t device, void* stream, ffi::AnyBuffer x, I32 ids, F32Buffer weights,
                        I32 words, I32 rank, I32 order, Out<ffi::AnyBuffer> tokens,
                        Out<I32> out_ids, Out<F32Buffer> out_weights, Out<I32> sources,
                        Out<I32> count, Out<I32> places, Out<I32> origins, Out<I32> between,
                        Out<I32> all_words, Out<U8> codes, Out<F32Buffer> scales,
                        Out<I32> order_out, MoriAttributes attributes) {
  Place place;
  Call call;
  Status status = begin(device, stream, x, ids, rank, order, *order_out, attributes,
                        Phase::kDispatch, &place, &call);
  if (!status.ok()) return to_ffi(status);
  const auto num_words = static_cast<int64_t>(words.element_count());
  const int64_t n = room(place, call);
  const int64_t quantised = call.wire == Wire::kFp8 ? call.num_tokens : 0;
  status = first_failure(
      {expect_arrivals(place, call, *tokens, x),
       expect_routing(place, call, *places, *origins, *count, *between),
       expect_shape("weights", weights, {call.num_tokens, call.top_k}),
       expect_shape("words", words, {num_words}), expect_shape("ids", *out_ids, {n, call.top_k}),
       expect_shape("weights", *out_weights, {n, call.top_k}),
       expect_shape("sources", *sources, {n}),
       expect_shape("codes", *codes, {quantised, call.hidden_size}),
       expect_shape("scales", *scales, {quantised, num_fp8_groups(call.hidden_size)}),
       expect_shape("all_words", *all_words, {place.group->num_ranks(), num_words})});
  if (!status.ok()) return to_ffi(status);
  const Routing routing{ids.typed_data(), places->typed_data(), origins->typed_data(),
                        count->typed_data(), words_of(*between)};
  return to_ffi(send(*place.group, call, routing,
                     SendBuffers{.x = bytes_of(x),
                                 .weights = weights.typed_data(),
                                 .words = words.typed_data(),
                                 .num_words = num_words,
                                 .tokens = bytes_of(*tokens),
                                 .out_ids = out_ids->typed_data(),
                                 .out_weights = out_weights->typed_data(),
                                 .sources = sources->typed_data(),
                                 .all_words = all_words->typed_data(),
                                 .codes = codes->typed_data(),
                                 .scales = scales->typed_data()}));
}

ffi::Error resend_handler(int32_t device, void* stream, ffi::AnyBuffer x, I32 ids, I32 places,
                          I32 origins, I32 count, I32 between, I32 rank, I32 order,
                          Out<ffi::AnyBuffer> tokens, Out<I32> order_out,
                          MoriAttributes attributes) {
  Place place;
  Call call;
  Status status = begin(device, stream, x, ids, rank, order, *order_out, attributes,
                        Phase::kDispatch, &place, &call);
  if (!status.ok()) return to_ffi(status);
  status = first_failure({expect_arrivals(place, call, *tokens, x),
                          expect_routing(place, call, places, origins, count, between)});
  if (!status.ok()) return to_ffi(status);
  const Routing routing{ids.typed_data(), places.typed_data(), origins.typed_data(),
                        count.typed_data(), words_of(between)};
  return to_ffi(resend(*place.group, call, routing, bytes_of(x), bytes_of(*tokens)));
}

// No scalars are carried when the operand is empty: the forward pass has none, the router's
// gradient has.
ffi::Error give_back_handler(int32_t device, void* stream, ffi::AnyBuffer tokens, F32Buffer scalars,
                             I32 ids, I32 places, I32 origins, I32 count, I32 between, I32 rank,
                             I32 order, Out<ffi::AnyBuffer> y, Out<F32Buffer> token_scalars,
                             Out<I32> order_out, MoriAttributes attributes) {
  Place place;
  Call call;
  Status status = begin(device, stream, *y, ids, rank, order, *order_out, attributes,
                        Phase::kCombine, &place, &call);
  if (!status.ok()) return to_ffi(status);
  const bool with_scalars = token_scalars->dimensions().front() > 0;
  status = first_failure(
      {expect_arrivals(place, call, tokens, *y),
       expect_routing(place, call, places, origins, count, between),
       expect_shape("scalars", scalars, {with_scalars ? room(place, call) : 0, call.top_k}),
       expect_shape("token_scalars", *token_scalars,
                    {with_scalars ? call.num_tokens : 0, call.top_k})});
  if (!status.ok()) return to_ffi(status);
  const Routing routing{ids.typed_data(), places.typed_data(), origins.typed_data(),
                        count.typed_data(), words_of(between)};
  return to_ffi(give_back(
      *place.group, call, routing,
      GiveBackBuffers{.tokens = bytes_of(tokens),
                      .scalars = with_scalars ? scalars.typed_data() : nullptr,
                      .y = bytes_of(*y),
                      .token_scalars = with_scalars ? token_scalars->typed_data() : nullptr}));
}

// The library hides every symbol but these.
#define MORIEP_HANDLER __attribute__((visibility("default"))) XLA_FFI_Error*

}  // namespace
}  // namespace moriep::mori

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(moriep::mori::MoriAttributes,
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
                                      xla::ffi::StructMember<int64_t>("combine_rdma_blocks"));

namespace moriep::mori {

extern "C" {
MORIEP_HANDLER MoriepSend(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepResend(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepGiveBack(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepSend, send_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // x [T, H]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<F32Buffer>()       // weights [T, K]
                                  .Arg<I32>()             // words [W]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // tokens [N, H]
                                  .Ret<I32>()             // ids [N, K]
                                  .Ret<F32Buffer>()       // weights [N, K]
                                  .Ret<I32>()             // sources [N]
                                  .Ret<I32>()             // count [1]
                                  .Ret<I32>()             // places [T, K]
                                  .Ret<I32>()             // origins [N]
                                  .Ret<I32>()             // between [B]
                                  .Ret<I32>()             // all_words [R, W]
                                  .Ret<U8>()              // codes [T, H] or [0, H]
                                  .Ret<F32Buffer>()       // scales [T, G] or [0, G]
                                  .Ret<I32>()             // order [1]
                                  .Attrs<MoriAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepResend, resend_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // x [T, H]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<I32>()             // places [T, K]
                                  .Arg<I32>()             // origins [N]
                                  .Arg<I32>()             // count [1]
                                  .Arg<I32>()             // between [B]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // tokens [N, H]
                                  .Ret<I32>()             // order [1]
                                  .Attrs<MoriAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepGiveBack, give_back_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // tokens [N, H]
                                  .Arg<F32Buffer>()       // scalars [N, K] or [0, K]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<I32>()             // places [T, K]
                                  .Arg<I32>()             // origins [N]
                                  .Arg<I32>()             // count [1]
                                  .Arg<I32>()             // between [B]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // y [T, H]
                                  .Ret<F32Buffer>()       // token_scalars [T, K] or [0, K]
                                  .Ret<I32>()             // order [1]
                                  .Attrs<MoriAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace moriep::mori

extern "C" __attribute__((visibility("default"))) int moriep_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}
