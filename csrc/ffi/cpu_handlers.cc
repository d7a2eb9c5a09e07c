// The exchanges of the CPU backend as XLA custom calls, over shared memory.
#include <utility>

#include "../cpu/exchange.h"
#include "../cpu/group.h"
#include "exchange_handlers.h"

namespace moriep {
namespace {

struct CpuContext {
  int32_t device = 0;
};

struct Cpu {
  using Context = CpuContext;
  using Result = ffi::Future;
  using Group = moriep::Group;
  struct Call : moriep::Call {
    int32_t* order_out = nullptr;
  };

  static constexpr auto& dispatch = moriep::dispatch;
  static constexpr auto& replay = moriep::replay;
  static constexpr auto& combine = moriep::combine;

  static Status begin(const Context& at, const Attributes& attributes, const PlaceOf<Group>& place,
                      const int32_t* rank, const int32_t* order, int32_t* order_out, Call* call) {
    if (place.first_rank + place.rank != *rank) {
      return wrong_rank(attributes.group, at.device, *rank);
    }
    call->order = *order;
    call->order_out = order_out;
    call->config = std::string(attributes.config);
    Wire wire;
    Delivery delivery;
    return first_failure({decode_wire(attributes.wire, false, &wire),
                          decode_delivery(attributes.delivery, false, &delivery)});
  }

  // Runs a step on its rank's thread. XLA keeps the buffers alive until the future is ready.
  template <typename Op>
  static Result run(const PlaceOf<Group>& place, const Call& call, Op op) {
    ffi::Promise promise;
    ffi::Future future(promise);
    LocalRank* me = place.group->local(place.rank);
    me->submit([me, call, op] { return op(*me, call); },
               [promise, place, call](const Status& status) mutable {
                 // The token is the user's array: it may hold any number, and wraps as XLA's own
                 // integers do.
                 *call.order_out = static_cast<int32_t>(static_cast<uint32_t>(call.order) + 1);
                 if (status.ok()) {
                   promise.SetAvailable();
                 } else {
                   promise.SetError(to_ffi(status, place.node));
                 }
               });
    return future;
  }

  static Result fail(const Status& status) {
    ffi::Promise promise;
    ffi::Future future(promise);
    promise.SetError(to_ffi(status));
    return future;
  }
};

}  // namespace
}  // namespace moriep

namespace xla::ffi {

template <>
struct CtxDecoding<moriep::CpuContext> {
  using Type = moriep::CpuContext;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    if (!device) return std::nullopt;
    return Type{*device};
  }
};

}  // namespace xla::ffi

MORIEP_DEFINE_EXCHANGE_HANDLERS(moriep::Cpu)
