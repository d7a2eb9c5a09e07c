// The XLA custom calls between token-major and row-major: expand, reexpand and gather, enqueued on
// XLA's stream. They are local to one rank and know no group. XLA may replay what they enqueue.
#include <mutex>
#include <set>

#include "../gpu/expand.h"
#include "decode.h"

namespace moriep::gpu {
namespace {

using Stream = ffi::PlatformStream<void*>;

// A kernel that is first used inside a recording would be loaded there.
Status preload(int32_t device) {
  static std::mutex mutex;
  static std::set<int32_t> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.contains(device)) return Status();
  if (Status status = preload_expand_kernels(); !status.ok()) return status;
  loaded.insert(device);
  return Status();
}

// Decodes what every operation has: the sizes from routes [R, T, K] and rows [C, H], and the
// arrivals, of which there is room for one per token of the group.
Status begin(int32_t device, void* stream, const ffi::AnyBuffer& tokens, const I32& sources,
             const I32& count, const I32& routes, const ffi::AnyBuffer& rows, bool summed,
             int64_t num_experts, int64_t num_local_experts, int64_t block, LocalCall* call) {
  const auto token_dims = tokens.dimensions();
  const auto row_dims = rows.dimensions();
  const auto route_dims = routes.dimensions();
  if (token_dims.size() != 2 || row_dims.size() != 2 || route_dims.size() != 3) {
    return bad_argument("tokens " + shape_text(tokens) + " and rows " + shape_text(rows) +
                        " must have two dimensions each, and routes " + shape_text(routes) +
                        " three");
  }
  if (tokens.element_type() != rows.element_type())
    return bad_argument("tokens and rows must have one dtype");
  call->shape = Shape{.num_ranks = route_dims[0],
                      .num_tokens = route_dims[1],
                      .top_k = route_dims[2],
                      .hidden_size = row_dims[1],
                      .num_experts = num_experts,
                      .num_local_experts = num_local_experts,
                      .block = block,
                      .capacity = row_dims[0]};
  if (Status status = check_shape(call->shape); !status.ok()) return status;
  const int64_t num_arrivals = call->shape.num_ranks * call->shape.num_tokens;
  call->sources = sources.typed_data();
  call->count = count.typed_data();
  call->stream = stream;
  return first_failure({decode_type(rows, summed, &call->type),
                        expect_shape("tokens", tokens, {num_arrivals, call->shape.hidden_size}),
                        expect_shape("sources", sources, {num_arrivals}),
                        expect_shape("count", count, {1}), preload(device)});
}

ffi::Error expand_handler(int32_t device, void* stream, ffi::AnyBuffer tokens, I32 ids,
                          F32Buffer weights, I32 sources, I32 count, I32 rank,
                          Out<ffi::AnyBuffer> rows, Out<F32Buffer> row_weights,
                          Out<I32> group_sizes, Out<I32> routes, Out<I32> workspace,
                          int64_t num_experts, int64_t num_local_experts, int64_t block) {
  LocalCall call;
  if (Status status = begin(device, stream, tokens, sources, count, *routes, *rows, false,
                            num_experts, num_local_experts, block, &call);
      !status.ok()) {
    return to_ffi(status);
  }
  const Shape& shape = call.shape;
  const int64_t num_arrivals = shape.num_ranks * shape.num_tokens;
  if (Status status =
          first_failure({expect_shape("ids", ids, {num_arrivals, shape.top_k}),
                         expect_shape("weights", weights, {num_arrivals, shape.top_k}),
                         expect_shape("rank", rank, {1}),
                         expect_shape("row_weights", *row_weights, {shape.capacity}),
                         expect_shape("group_sizes", *group_sizes, {shape.num_local_experts}),
                         expect_shape("workspace", *workspace, {expand_words(shape)})});
      !status.ok()) {
    return to_ffi(status);
  }
  return to_ffi(expand(call, {.tokens = bytes_of(tokens),
                              .ids = ids.typed_data(),
                              .weights = weights.typed_data(),
                              .rank = rank.typed_data(),
                              .rows = bytes_of(*rows),
                              .row_weights = row_weights->typed_data(),
                              .group_sizes = group_sizes->typed_data(),
                              .routes = routes->typed_data(),
                              .workspace = workspace->typed_data()}));
}

ffi::Error reexpand_handler(int32_t device, void* stream, ffi::AnyBuffer tokens, I32 sources,
                            I32 count, I32 routes, Out<ffi::AnyBuffer> rows, Out<I32> workspace,
                            int64_t num_experts, int64_t num_local_experts, int64_t block) {
  LocalCall call;
  Status status = begin(device, stream, tokens, sources, count, routes, *rows, false, num_experts,
                        num_local_experts, block, &call);
  if (status.ok()) {
    status = expect_shape("workspace", *workspace, {reexpand_words(call.shape)});
  }
  if (!status.ok()) return to_ffi(status);
  return to_ffi(reexpand(call, {.tokens = bytes_of(tokens),
                                .routes = routes.typed_data(),
                                .rows = bytes_of(*rows),
                                .workspace = workspace->typed_data()}));
}

ffi::Error gather_handler(int32_t device, void* stream, ffi::AnyBuffer rows, F32Buffer scalars,
                          I32 sources, I32 count, I32 routes, Out<ffi::AnyBuffer> tokens,
                          Out<F32Buffer> token_scalars, int64_t num_experts,
                          int64_t num_local_experts, int64_t block) {
  LocalCall call;
  if (Status status = begin(device, stream, *tokens, sources, count, routes, rows, true,
                            num_experts, num_local_experts, block, &call);
      !status.ok()) {
    return to_ffi(status);
  }
  // An empty operand stands for "no scalars".
  const bool carried = scalars.element_count() != 0;
  const int64_t num_arrivals = call.shape.num_ranks * call.shape.num_tokens;
  if (Status status =
          first_failure({expect_shape("scalars", scalars, {carried ? call.shape.capacity : 0}),
                         expect_shape("token_scalars", *token_scalars,
                                      {carried ? num_arrivals : 0, call.shape.top_k})});
      !status.ok()) {
    return to_ffi(status);
  }
  return to_ffi(gather(call, {.rows = bytes_of(rows),
                              .scalars = carried ? scalars.typed_data() : nullptr,
                              .routes = routes.typed_data(),
                              .tokens = bytes_of(*tokens),
                              .token_scalars = carried ? token_scalars->typed_data() : nullptr}));
}

#define MORIEP_HANDLER __attribute__((visibility("default"))) XLA_FFI_Error*

#define MORIEP_SIZES \
  Attr<int64_t>("num_experts").Attr<int64_t>("num_local_experts").Attr<int64_t>("block")

}  // namespace

extern "C" {
MORIEP_HANDLER MoriepExpand(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepReexpand(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepGather(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepExpand, expand_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // tokens [N, H]
                                  .Arg<I32>()             // ids [N, K]
                                  .Arg<F32Buffer>()       // weights [N, K]
                                  .Arg<I32>()             // sources [N]
                                  .Arg<I32>()             // count [1]
                                  .Arg<I32>()             // rank [1]
                                  .Ret<ffi::AnyBuffer>()  // rows [C, H]
                                  .Ret<F32Buffer>()       // row_weights [C]
                                  .Ret<I32>()             // group_sizes [L]
                                  .Ret<I32>()             // routes [R, T, K]
                                  .Ret<I32>()             // workspace
                                  .MORIEP_SIZES,
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepReexpand, reexpand_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // tokens [N, H]
                                  .Arg<I32>()             // sources [N]
                                  .Arg<I32>()             // count [1]
                                  .Arg<I32>()             // routes [R, T, K]
                                  .Ret<ffi::AnyBuffer>()  // rows [C, H]
                                  .Ret<I32>()             // workspace
                                  .MORIEP_SIZES,
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepGather, gather_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // rows [C, H]
                                  .Arg<F32Buffer>()       // scalars [C] or [0]
                                  .Arg<I32>()             // sources [N]
                                  .Arg<I32>()             // count [1]
                                  .Arg<I32>()             // routes [R, T, K]
                                  .Ret<ffi::AnyBuffer>()  // tokens [N, H]
                                  .Ret<F32Buffer>()       // token_scalars [N, K] or [0, K]
                                  .MORIEP_SIZES,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace moriep::gpu
