// The XLA custom calls of the CPU backend: dispatch, replay and combine over shared memory.
#include <atomic>
#include <cstring>
#include <memory>

#include "../cpu/exchange.h"
#include "../cpu/group.h"
#include "decode.h"

namespace moriep {
namespace {

// A rank of this process, held together with its group for as long as a step runs.
struct Place {
  std::shared_ptr<Group> group;
  LocalRank* rank = nullptr;
};

// Finds the rank that a device is in its group, and checks it against the rank that the program
// computed.
Status find_place(std::string_view name, int32_t device, const I32& rank, Place* place) {
  const std::string group(name);
  if (Status status = expect_shape("rank", rank, {1}); !status.ok()) return status;
  const auto table = Registry::get().find(group);
  if (table == nullptr) {
    return Status(Code::kFailedPrecondition,
                  "group " + group +
                      " is not open in this process; call jm.initialize(mesh, ep_axis) "
                      "before running a deserialised executable");
  }
  const auto found = table->place_of_device.find(device);
  if (found == table->place_of_device.end() || found->second.second != rank.typed_data()[0]) {
    return Status(
        Code::kFailedPrecondition,
        "device " + std::to_string(device) + " is rank " + std::to_string(rank.typed_data()[0]) +
            " of the running mesh, which is not its place in group " + group +
            "; before the program is traced, set the mesh with jax.set_mesh or open it with "
            "jm.initialize(mesh, ep_axis)");
  }
  place->group = table->groups[static_cast<size_t>(found->second.first)];
  place->rank = place->group->local(found->second.second);
  return Status();
}

// Decodes what every exchange has; `order` tells the call's position, `order_out` passes it on.
Status decode_call(const ffi::AnyBuffer& tokens, const I32& ids, const ffi::AnyBuffer& rows,
                   bool summed, const I32& order, I32& order_out, const Attributes& attributes,
                   const Place& place, Call* call) {
  if (Status status = first_failure(
          {decode_type(rows, summed, &call->type), expect_shape("order", order, {1}),
           expect_shape("order", order_out, {1}),
           decode_shape(tokens, ids, rows, place.group->num_ranks(), attributes, &call->shape)});
      !status.ok()) {
    return status;
  }
  call->order = order.typed_data()[0];
  call->config = std::string(attributes.config);
  return Status();
}

// Runs a step on its rank's thread. XLA keeps the buffers alive until the future is ready.
ffi::Future run(const Place& place, int32_t* order_out, int32_t order, LocalRank::Op op) {
  // The token is the user's array: it may hold any number, and wraps as XLA's own integers do.
  const auto next_order = static_cast<int32_t>(static_cast<uint32_t>(order) + 1);
  ffi::Promise promise;
  ffi::Future future(promise);
  place.rank->submit(std::move(op), [promise, group = place.group, order_out,
                                     next_order](const Status& status) mutable {
    *order_out = next_order;
    if (status.ok()) {
      promise.SetAvailable();
    } else {
      promise.SetError(to_ffi(status));
    }
  });
  return future;
}

ffi::Future failed(const Status& status) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(to_ffi(status));
  return future;
}

ffi::Future dispatch_handler(int32_t device, ffi::AnyBuffer x, I32 ids, F32Buffer weights, I32 rank,
                             I32 order, Out<ffi::AnyBuffer> rows, Out<F32Buffer> row_weights,
                             Out<I32> group_sizes, Out<I32> routes, Out<I32> slots,
                             Out<I32> order_out, std::string_view group, std::string_view config,
                             int64_t num_experts, int64_t num_local_experts, int64_t block) {
  const Attributes attributes{group, config, num_experts, num_local_experts, block};
  Place place;
  Call call;
  if (Status status = find_place(group, device, rank, &place); !status.ok()) return failed(status);
  if (Status status =
          decode_call(x, ids, *rows, false, order, *order_out, attributes, place, &call);
      !status.ok()) {
    return failed(status);
  }
  DispatchBuffers at;
  if (Status status = decode_dispatch(call.shape, x, ids, weights, *rows, *row_weights,
                                      *group_sizes, *routes, *slots, &at);
      !status.ok()) {
    return failed(status);
  }
  return run(place, order_out->typed_data(), call.order,
             [me = place.rank, call, at] { return dispatch(*me, call, at); });
}

ffi::Future replay_handler(int32_t device, ffi::AnyBuffer x, I32 routes, I32 ids, I32 rank,
                           I32 order, Out<ffi::AnyBuffer> rows, Out<I32> order_out,
                           std::string_view group, std::string_view config, int64_t num_experts,
                           int64_t num_local_experts, int64_t block) {
  const Attributes attributes{group, config, num_experts, num_local_experts, block};
  Place place;
  Call call;
  if (Status status = find_place(group, device, rank, &place); !status.ok()) return failed(status);
  if (Status status =
          decode_call(x, ids, *rows, false, order, *order_out, attributes, place, &call);
      !status.ok()) {
    return failed(status);
  }
  ReplayBuffers at;
  if (Status status = decode_replay(call.shape, x, routes, ids, *rows, &at); !status.ok()) {
    return failed(status);
  }
  return run(place, order_out->typed_data(), call.order,
             [me = place.rank, call, at] { return replay(*me, call, at); });
}

ffi::Future combine_handler(int32_t device, ffi::AnyBuffer rows, F32Buffer scalars, I32 routes,
                            I32 slots, I32 ids, I32 rank, I32 order, Out<ffi::AnyBuffer> y,
                            Out<F32Buffer> token_scalars, Out<I32> order_out,
                            std::string_view group, std::string_view config, int64_t num_experts,
                            int64_t num_local_experts, int64_t block) {
  const Attributes attributes{group, config, num_experts, num_local_experts, block};
  Place place;
  Call call;
  if (Status status = find_place(group, device, rank, &place); !status.ok()) return failed(status);
  if (Status status = decode_call(*y, ids, rows, true, order, *order_out, attributes, place, &call);
      !status.ok()) {
    return failed(status);
  }
  CombineBuffers at;
  if (Status status =
          decode_combine(call.shape, rows, scalars, routes, slots, ids, *y, *token_scalars, &at);
      !status.ok()) {
    return failed(status);
  }
  return run(place, order_out->typed_data(), call.order,
             [me = place.rank, call, at] { return combine(*me, call, at); });
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
                                  .MORIEP_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepReplay, replay_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()  // x [T, H]
                                  .Arg<I32>()             // routes [R, T, K]
                                  .Arg<I32>()             // ids [T, K]
                                  .Arg<I32>()             // rank [1]
                                  .Arg<I32>()             // order [1]
                                  .Ret<ffi::AnyBuffer>()  // rows [C, H]
                                  .Ret<I32>()             // order [1]
                                  .MORIEP_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepCombine, combine_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
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
                                  .MORIEP_ATTRIBUTES);

}  // namespace moriep

// major * 1000 + minor of the FFI API that this library was built with.
extern "C" __attribute__((visibility("default"))) int moriep_ffi_api_version() {
  return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;
}
