// The XLA custom calls of a row-major backend: dispatch, replay and combine. This is their one
// text; a backend states a class with
//   using Context            what a handler is told of where it runs, with `int32_t device`
//   using Result             what a handler gives back
//   using Group, Call        of the backend
//   begin(...)               fills the part of a Call that is the backend's own
//   run(place, call, op)     runs, or enqueues, op(local rank, call) and gives the handler's result
//   fail(status)             the result of a handler that could not begin
// and MORIEP_DEFINE_EXCHANGE_HANDLERS(class, traits) defines the handlers' symbols.
#pragma once

#include "decode.h"
#include "moriep/export.h"
#include "place.h"

namespace moriep {

template <typename Backend>
struct ExchangeHandlers {
  using Context = typename Backend::Context;
  using Result = typename Backend::Result;
  using Call = typename Backend::Call;
  using Place = PlaceOf<typename Backend::Group>;

  // Finds the place and decodes what every exchange has. `order` tells the call's position in its
  // program, `order_out` passes it on.
  static Status begin(const Context& at, const ffi::AnyBuffer& tokens, const I32& ids,
                      const ffi::AnyBuffer& rows, bool summed, int64_t num_words, const I32& rank,
                      const I32& order, I32& order_out, const Attributes& attributes, Place* place,
                      Call* call) {
    if (Status status = find_place(attributes.group, at.device, place); !status.ok()) return status;
    find_node(attributes.num_nodes, place);
    if (Status status =
            first_failure({decode_type(rows, summed, &call->type), expect_shape("rank", rank, {1}),
                           expect_shape("order", order, {1}), expect_shape("order", order_out, {1}),
                           decode_shape(tokens, ids, rows, place->group->num_ranks(), num_words,
                                        attributes, &call->shape)});
        !status.ok()) {
      return status;
    }
    return Backend::begin(at, attributes, *place, rank.typed_data(), order.typed_data(),
                          order_out.typed_data(), call);
  }

  static Result dispatch(Context at, ffi::AnyBuffer x, I32 ids, F32Buffer weights, I32 words,
                         I32 rank, I32 order, Out<ffi::AnyBuffer> rows, Out<F32Buffer> row_weights,
                         Out<I32> group_sizes, Out<I32> routes, Out<I32> places, Out<I32> all_words,
                         Out<I32> order_out, Attributes attributes) {
    Place place;
    Call call;
    const auto num_words = static_cast<int64_t>(words.element_count());
    Status status = begin(at, x, ids, *rows, false, num_words, rank, order, *order_out, attributes,
                          &place, &call);
    DispatchBuffers buffers;
    if (status.ok()) {
      status = decode_dispatch(call.shape, x, ids, weights, words, *rows, *row_weights,
                               *group_sizes, *routes, *places, *all_words, &buffers);
    }
    if (!status.ok()) return Backend::fail(status);
    return Backend::run(place, call, [buffers](auto& me, const Call& call) {
      return Backend::dispatch(me, call, buffers);
    });
  }

  static Result replay(Context at, ffi::AnyBuffer x, I32 routes, I32 ids, I32 rank, I32 order,
                       Out<ffi::AnyBuffer> rows, Out<I32> order_out, Attributes attributes) {
    Place place;
    Call call;
    Status status =
        begin(at, x, ids, *rows, false, 0, rank, order, *order_out, attributes, &place, &call);
    ReplayBuffers buffers;
    if (status.ok()) status = decode_replay(call.shape, x, routes, ids, *rows, &buffers);
    if (!status.ok()) return Backend::fail(status);
    return Backend::run(place, call, [buffers](auto& me, const Call& call) {
      return Backend::replay(me, call, buffers);
    });
  }

  static Result combine(Context at, ffi::AnyBuffer rows, F32Buffer scalars, I32 routes, I32 places,
                        I32 ids, I32 rank, I32 order, Out<ffi::AnyBuffer> y,
                        Out<F32Buffer> token_scalars, Out<I32> order_out, Attributes attributes) {
    Place place;
    Call call;
    Status status =
        begin(at, *y, ids, rows, true, 0, rank, order, *order_out, attributes, &place, &call);
    CombineBuffers buffers;
    if (status.ok()) {
      status = decode_combine(call.shape, rows, scalars, routes, places, ids, *y, *token_scalars,
                              &buffers);
    }
    if (!status.ok()) return Backend::fail(status);
    return Backend::run(place, call, [buffers](auto& me, const Call& call) {
      return Backend::combine(me, call, buffers);
    });
  }
};

inline constexpr auto bind_dispatch = [](auto context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // x [T, H]
      .template Arg<I32>()             // ids [T, K]
      .template Arg<F32Buffer>()       // weights [T, K]
      .template Arg<I32>()             // words [W]
      .template Arg<I32>()             // rank [1]
      .template Arg<I32>()             // order [1]
      .template Ret<ffi::AnyBuffer>()  // rows [C, H]
      .template Ret<F32Buffer>()       // row_weights [C]
      .template Ret<I32>()             // group_sizes [L]
      .template Ret<I32>()             // routes [R, T, K]
      .template Ret<I32>()             // places [R, T]
      .template Ret<I32>()             // all_words [R, W]
      .template Ret<I32>()             // order [1]
      .template Attrs<Attributes>();
};

inline constexpr auto bind_replay = [](auto context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // x [T, H]
      .template Arg<I32>()             // routes [R, T, K]
      .template Arg<I32>()             // ids [T, K]
      .template Arg<I32>()             // rank [1]
      .template Arg<I32>()             // order [1]
      .template Ret<ffi::AnyBuffer>()  // rows [C, H]
      .template Ret<I32>()             // order [1]
      .template Attrs<Attributes>();
};

inline constexpr auto bind_combine = [](auto context) {
  return std::move(context)
      .template Arg<ffi::AnyBuffer>()  // rows [C, H]
      .template Arg<F32Buffer>()       // scalars [C] or [0]
      .template Arg<I32>()             // routes [R, T, K]
      .template Arg<I32>()             // places [R, T]
      .template Arg<I32>()             // ids [T, K]
      .template Arg<I32>()             // rank [1]
      .template Arg<I32>()             // order [1]
      .template Ret<ffi::AnyBuffer>()  // y [T, H]
      .template Ret<F32Buffer>()       // token_scalars [T, K] or [0, K]
      .template Ret<I32>()             // order [1]
      .template Attrs<Attributes>();
};

}  // namespace moriep

#define MORIEP_DEFINE_EXCHANGE_HANDLER(symbol, Backend, op, ...)                                  \
  MORIEP_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame*);                                        \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, moriep::ExchangeHandlers<Backend>::op,                    \
                                moriep::bind_##op(xla::ffi::Ffi::Bind().Ctx<Backend::Context>()), \
                                {__VA_ARGS__})

#define MORIEP_DEFINE_EXCHANGE_HANDLERS(Backend, ...)                             \
  MORIEP_DEFINE_EXCHANGE_HANDLER(MoriepDispatch, Backend, dispatch, __VA_ARGS__); \
  MORIEP_DEFINE_EXCHANGE_HANDLER(MoriepReplay, Backend, replay, __VA_ARGS__);     \
  MORIEP_DEFINE_EXCHANGE_HANDLER(MoriepCombine, Backend, combine, __VA_ARGS__);   \
  /* major * 1000 + minor of the FFI API that this library was built with. */     \
  MORIEP_EXPORT int moriep_ffi_api_version() {                                    \
    return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;                          \
  }
