// The XLA custom calls of the GPU backend: dispatch, replay and combine, enqueued on XLA's stream.
//
// XLA records what a handler enqueues and replays it without calling the handler again, so nothing
// here may depend on how often it runs. What the program computed (the rank, the order token) lies
// in device memory, and the kernels look at it.
#include <atomic>
#include <memory>

#include "../gpu/exchange.h"
#include "../gpu/group.h"
#include "decode.h"

namespace moriep::gpu {
namespace {

// Calls of handlers, so that a test can see that launches are replayed without them.
std::atomic<int64_t> handler_runs{0};

using Stream = ffi::PlatformStream<void*>;

struct Place {
  std::shared_ptr<Group> group;
  LocalRank* rank = nullptr;
};

Status find_place(std::string_view name, int32_t device, Place* place) {
  const std::string group(name);
  const auto table = Registry::get().find(group);
  if (table == nullptr) {
    return Status(Code::kFailedPrecondition,
                  "group " + group +
                      " is not open in this process; call jm.initialize(mesh, ep_axis) "
                      "before running a deserialised executable");
  }
  const auto found = table->place_of_device.find(device);
  if (found == table->place_of_device.end()) {
    return Status(Code::kFailedPrecondition,
                  "device " + std::to_string(device) + " has no place in group " + group +
                      "; before the program is traced, set the mesh with jax.set_mesh or open it "
                      "with jm.initialize(mesh, ep_axis)");
  }
  place->group = table->groups[static_cast<size_t>(found->second.first)];
  place->rank = place->group->local(found->second.second);
  return Status();
}

// Decodes what every exchange has.
Status decode_call(int32_t device, void* stream, const ffi::AnyBuffer& tokens, const I32& ids,
                   const ffi::AnyBuffer& rows, bool summed, const I32& rank, const I32& order,
                   I32& order_out, const Attributes& attributes, Place* place, Call* call) {
  handler_runs.fetch_add(1, std::memory_order_relaxed);
  if (Status status = find_place(attributes.group, device, place); !status.ok()) return status;
  if (Status status = first_failure(
          {decode_type(rows, summed, &call->type), expect_shape("rank", rank, {1}),
           expect_shape("order", order, {1}), expect_shape("order", order_out, {1}),
           decode_shape(tokens, ids, rows, place->group->num_ranks(), attributes, &call->shape)});
      !status.ok()) {
    return status;
  }
  call->config = attributes.config;
  call->rank = rank.typed_data();
  call->order = order.typed_data();
  call->order_out = order_out.typed_data();
  call->stream = stream;
  return Status();
}

ffi::Error dispatch_handler(int32_t device, void* stream, ffi::AnyBuffer x, I32 ids,
                            F32Buffer weights, I32 rank, I32 order, Out<ffi::AnyBuffer> rows,
                            Out<F32Buffer> row_weights, Out<I32> group_sizes, Out<I32> routes,
                            Out<I32> slots, Out<I32> order_out, std::string_view group,
                            std::string_view config, int64_t num_experts, int64_t num_local_experts,
                            int64_t block) {
  const Attributes attributes{group, config, num_experts, num_local_experts, block};
  Place place;
  Call call;
  if (Status status = decode_call(device, stream, x, ids, *rows, false, rank, order, *order_out,
                                  attributes, &place, &call);
      !status.ok()) {
    return to_ffi(status);
  }
  DispatchBuffers at;
  if (Status status = decode_dispatch(call.shape, x, ids, weights, *rows, *row_weights,
                                      *group_sizes, *routes, *slots, &at);
      !status.ok()) {
    return to_ffi(status);
  }
  return to_ffi(dispatch(*place.rank, call, at));
}

ffi::Error replay_handler(int32_t device, void* stream, ffi::AnyBuffer x, I32 routes, I32 ids,
                          I32 rank, I32 order, Out<ffi::AnyBuffer> rows, Out<I32> order_out,
                          std::string_view group, std::string_view config, int64_t num_experts,
                          int64_t num_local_experts, int64_t block) {
  const Attributes attributes{group, config, num_experts, num_local_experts, block};
  Place place;
  Call call;
  if (Status status = decode_call(device, stream, x, ids, *rows, false, rank, order, *order_out,
                                  attributes, &place, &call);
      !status.ok()) {
    return to_ffi(status);
  }
  ReplayBuffers at;
  if (Status status = decode_replay(call.shape, x, routes, ids, *rows, &at); !status.ok()) {
    return to_ffi(status);
  }
  return to_ffi(replay(*place.rank, call, at));
}

ffi::Error combine_handler(int32_t device, void* stream, ffi::AnyBuffer rows, F32Buffer scalars,
                           I32 routes, I32 slots, I32 ids, I32 rank, I32 order,
                           Out<ffi::AnyBuffer> y, Out<F32Buffer> token_scalars, Out<I32> order_out,
                           std::string_view group, std::string_view config, int64_t num_experts,
                           int64_t num_local_experts, int64_t block) {
  const Attributes attributes{group, config, num_experts, num_local_experts, block};
  Place place;
  Call call;
  if (Status status = decode_call(device, stream, *y, ids, rows, true, rank, order, *order_out,
                                  attributes, &place, &call);
      !status.ok()) {
    return to_ffi(status);
  }
  CombineBuffers at;
  if (Status status =
          decode_combine(call.shape, rows, scalars, routes, slots, ids, *y, *token_scalars, &at);
      !status.ok()) {
    return to_ffi(status);
  }
  return to_ffi(combine(*place.rank, call, at));
}

// The library hides every symbol but these.
#define MORIEP_HANDLER __attribute__((visibility("default"))) XLA_FFI_Error*

#define MORIEP_ATTRIBUTES                 \
  Attr<std::string_view>("group")         \
      .Attr<std::string_view>("config")   \
      .Attr<int64_t>("num_experts")       \
      .Attr<int64_t>("num_local_experts") \
      .Attr<int64_t>("block")

}  // namespace

extern "C" {
MORIEP_HANDLER MoriepDispatch(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepReplay(XLA_FFI_CallFrame*);
MORIEP_HANDLER MoriepCombine(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepDispatch, dispatch_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // x [T, H]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<F32Buffer>()       // weights [T, K]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // rows [C, H]
                                  .Ret<F32Buffer>()       // row_weights [C]
                                  .Ret<I32>()             // group_sizes [L]
                                  .Ret<I32>()             // routes [R, T, K]
                                  .Ret<I32>()             // slots [R, T]
                                  .Ret<I32>()             // order [1]
                                  .MORIEP_ATTRIBUTES,
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepReplay, replay_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // x [T, H]
                                  .Arg<I32>()             // routes [R, T, K]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // rows [C, H]
                                  .Ret<I32>()             // order [1]
                                  .MORIEP_ATTRIBUTES,
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepCombine, combine_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<ffi::AnyBuffer>()  // rows [C, H]
                                  .Arg<F32Buffer>()       // scalars [C] or [0]
                                  .Arg<I32>()             // routes [R, T, K]
                                  .Arg<I32>()             // slots [R, T]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // y [T, H]
                                  .Ret<F32Buffer>()       // token_scalars [T, K] or [0, K]
                                  .Ret<I32>()             // order [1]
                                  .MORIEP_ATTRIBUTES,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace moriep::gpu

extern "C" __attribute__((visibility("default"))) int64_t moriep_handler_runs() {
  return moriep::gpu::handler_runs.load(std::memory_order_relaxed);
}

// major * 1000 + minor of the FFI API that this library was built with.
extern "C" __attribute__((visibility("default"))) int moriep_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}
