// The exchanges of the GPU backend as XLA custom calls, enqueued on XLA's stream.
//
// XLA records what a handler enqueues and replays it without calling the handler again, so nothing
// here may depend on how often it runs. What the program computed (the rank, the order) lies
// in device memory, and the kernels look at it.
#include <atomic>

#include "../gpu/exchange.h"
#include "../gpu/group.h"
#include "exchange_handlers.h"

namespace moriep::gpu {
namespace {

// Calls of handlers, so that a test can see that launches are replayed without them.
std::atomic<int64_t> handler_runs{0};

struct GpuContext {
  int32_t device = 0;
  void* stream = nullptr;
};

struct Gpu {
  using Context = GpuContext;
  using Result = ffi::Error;
  using Group = gpu::Group;
  using Call = gpu::Call;

  static constexpr auto& dispatch = gpu::dispatch;
  static constexpr auto& replay = gpu::replay;
  static constexpr auto& combine = gpu::combine;

  static Status begin(const Context& at, const Attributes& attributes, const PlaceOf<Group>& place,
                      const int32_t* rank, const int32_t* order, int32_t* order_out, Call* call) {
    handler_runs.fetch_add(1, std::memory_order_relaxed);
    call->config = attributes.config;
    call->rank = rank;
    call->first_rank = place.first_rank;
    call->order = order;
    call->order_out = order_out;
    call->stream = at.stream;
    return first_failure({decode_wire(attributes.wire, true, &call->wire),
                          decode_delivery(attributes.delivery, true, &call->delivery)});
  }

  template <typename Op>
  static Result run(const PlaceOf<Group>& place, const Call& call, Op op) {
    return to_ffi(op(*place.group->local(place.rank), call), place.node);
  }

  static Result fail(const Status& status) { return to_ffi(status); }
};

}  // namespace
}  // namespace moriep::gpu

namespace xla::ffi {

template <>
struct CtxDecoding<moriep::gpu::GpuContext> {
  using Type = moriep::gpu::GpuContext;
  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
    const auto device = CtxDecoding<DeviceOrdinal>::Decode(api, context, diagnostic);
    const auto stream = CtxDecoding<PlatformStream<void*>>::Decode(api, context, diagnostic);
    if (!device || !stream) return std::nullopt;
    return Type{*device, *stream};
  }
};

}  // namespace xla::ffi

MORIEP_DEFINE_EXCHANGE_HANDLERS(moriep::gpu::Gpu, xla::ffi::Traits::kCmdBufferCompatible)

MORIEP_EXPORT int64_t moriep_handler_runs() {
  return moriep::gpu::handler_runs.load(std::memory_order_relaxed);
}
