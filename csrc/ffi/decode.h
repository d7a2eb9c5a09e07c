// From XLA's buffers and attributes to the calls of a backend: decodes and validates, for every
// backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "moriep/buffers.h"
#include "moriep/plan.h"
#include "moriep/row_type.h"
#include "moriep/status.h"
#include "moriep/wire.h"
#include "xla/ffi/api/ffi.h"

namespace moriep {

namespace ffi = ::xla::ffi;

using I32 = ffi::Buffer<ffi::S32>;
using F32Buffer = ffi::Buffer<ffi::F32>;
template <typename Buffer>
using Out = ffi::Result<Buffer>;

// The attributes of every exchange; Python's targets.py builds them in one place.
struct Attributes {
  std::string_view group;
  std::string_view config;
  int64_t num_experts;
  int64_t num_local_experts;
  int64_t block;
  int64_t num_nodes;
  std::string_view
      wire;  // of a dispatch: "fp8" where the backend quantises, "" for tokens as given
  std::string_view delivery;  // of a dispatch and a replay: "pull", or "put" where the backend does
};

}  // namespace moriep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::moriep::Attributes,
                                      ::xla::ffi::StructMember<std::string_view>("group"),
                                      ::xla::ffi::StructMember<std::string_view>("config"),
                                      ::xla::ffi::StructMember<int64_t>("num_experts"),
                                      ::xla::ffi::StructMember<int64_t>("num_local_experts"),
                                      ::xla::ffi::StructMember<int64_t>("block"),
                                      ::xla::ffi::StructMember<int64_t>("num_nodes"),
                                      ::xla::ffi::StructMember<std::string_view>("wire"),
                                      ::xla::ffi::StructMember<std::string_view>("delivery"));

namespace moriep {

// `where` comes before the text.
inline ffi::Error to_ffi(const Status& status, const std::string& where = "") {
  if (status.ok()) return ffi::Error::Success();
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()), "moriep " + where + status.text());
}

inline Status bad_argument(const std::string& what) { return Status(Code::kInvalidArgument, what); }

template <typename Buffer>
std::string shape_text(const Buffer& buffer) {
  std::string text = "[";
  for (int64_t size : buffer.dimensions())
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Compares a buffer's shape with what the other operands imply; every later index relies on it.
template <typename Buffer>
Status expect_shape(const char* name, const Buffer& buffer, std::initializer_list<int64_t> want) {
  const auto dims = buffer.dimensions();
  bool same = dims.size() == want.size();
  for (size_t i = 0; same && i < dims.size(); ++i) same = dims[i] == want.begin()[i];
  if (same) return Status();
  std::string text = "[";
  for (int64_t size : want) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return bad_argument(std::string(name) + " has shape " + shape_text(buffer) + " but must be " +
                      text + "]");
}

// Runs checks in order and gives the first failure.
inline Status first_failure(std::initializer_list<Status> checks) {
  for (const Status& check : checks) {
    if (!check.ok()) return check;
  }
  return Status();
}

inline Status decode_type(const ffi::AnyBuffer& rows, bool summed, RowType* type) {
  switch (rows.element_type()) {
    case ffi::F32:
      *type = RowType::kF32;
      return Status();
    case ffi::BF16:
      *type = RowType::kBF16;
      return Status();
    case ffi::F16:
      *type = RowType::kF16;
      return Status();
    case ffi::U8:
      if (summed) break;
      *type = RowType::kU8;
      return Status();
    default:
      break;
  }
  return bad_argument("rows must be float32, bfloat16 or float16");
}

// `quantises`: the backend can send tokens as float8.
inline Status decode_wire(std::string_view text, bool quantises, Wire* wire) {
  *wire = text.empty() ? Wire::kRows : Wire::kFp8;
  if (text.empty() || (quantises && text == "fp8")) return Status();
  return bad_argument("wire=" + std::string(text) + " is not one of this backend's; pass bytes");
}

// `puts`: the backend can deliver by put.
inline Status decode_delivery(std::string_view text, bool puts, Delivery* delivery) {
  *delivery = text == "put" ? Delivery::kPut : Delivery::kPull;
  if (text == "pull" || (puts && text == "put")) return Status();
  return bad_argument("delivery=" + std::string(text) +
                      " is not one of this backend's; pass \"pull\"");
}

inline std::byte* bytes_of(const ffi::AnyBuffer& buffer) {
  return static_cast<std::byte*>(buffer.untyped_data());
}

// Builds the sizes of a call from tokens [T, H], ids [T, K], rows [C, H] and the attributes.
inline Status decode_shape(const ffi::AnyBuffer& tokens, const I32& ids, const ffi::AnyBuffer& rows,
                           int64_t num_ranks, int64_t num_words, const Attributes& attributes,
                           Shape* shape) {
  const auto token_dims = tokens.dimensions();
  const auto id_dims = ids.dimensions();
  const auto row_dims = rows.dimensions();
  if (token_dims.size() != 2 || id_dims.size() != 2 || row_dims.size() != 2) {
    return bad_argument("tokens " + shape_text(tokens) + ", ids " + shape_text(ids) + " and rows " +
                        shape_text(rows) + " must have two dimensions each");
  }
  *shape = Shape{.num_ranks = num_ranks,
                 .num_tokens = token_dims[0],
                 .top_k = id_dims[1],
                 .hidden_size = token_dims[1],
                 .num_experts = attributes.num_experts,
                 .num_local_experts = attributes.num_local_experts,
                 .block = attributes.block,
                 .capacity = row_dims[0],
                 .num_words = num_words,
                 .num_nodes = attributes.num_nodes};
  if (tokens.element_type() != rows.element_type())
    return bad_argument("tokens and rows must have one dtype");
  return first_failure({check_shape(*shape),
                        expect_shape("ids", ids, {shape->num_tokens, shape->top_k}),
                        expect_shape("rows", rows, {shape->capacity, shape->hidden_size})});
}

// Checks the shapes of a dispatch's arrays that `decode_shape` has not seen, and collects the
// arrays.
inline Status decode_dispatch(const Shape& shape, const ffi::AnyBuffer& x, const I32& ids,
                              const F32Buffer& weights, const I32& words, ffi::AnyBuffer& rows,
                              F32Buffer& row_weights, I32& group_sizes, I32& routes, I32& places,
                              I32& all_words, DispatchBuffers* at) {
  *at = {.x = bytes_of(x),
         .ids = ids.typed_data(),
         .weights = weights.typed_data(),
         .rows = bytes_of(rows),
         .row_weights = row_weights.typed_data(),
         .group_sizes = group_sizes.typed_data(),
         .routes = routes.typed_data(),
         .places = places.typed_data(),
         .words = words.typed_data(),
         .all_words = all_words.typed_data()};
  return first_failure(
      {expect_shape("weights", weights, {shape.num_tokens, shape.top_k}),
       expect_shape("words", words, {shape.num_words}),
       expect_shape("all_words", all_words, {shape.num_ranks, shape.num_words}),
       expect_shape("row_weights", row_weights, {shape.capacity}),
       expect_shape("group_sizes", group_sizes, {shape.num_local_experts}),
       expect_shape("routes", routes, {shape.num_ranks, shape.num_tokens, shape.top_k}),
       expect_shape("places", places, {shape.num_ranks, shape.num_tokens})});
}

// The same for a replay.
inline Status decode_replay(const Shape& shape, const ffi::AnyBuffer& x, const I32& routes,
                            const I32& ids, ffi::AnyBuffer& rows, ReplayBuffers* at) {
  *at = {.x = bytes_of(x),
         .routes = routes.typed_data(),
         .ids = ids.typed_data(),
         .rows = bytes_of(rows)};
  return expect_shape("routes", routes, {shape.num_ranks, shape.num_tokens, shape.top_k});
}

// The same for a combine. No scalars are carried when the operand is empty: the forward pass has
// none, the router's gradient has.
inline Status decode_combine(const Shape& shape, const ffi::AnyBuffer& rows,
                             const F32Buffer& scalars, const I32& routes, const I32& places,
                             const I32& ids, ffi::AnyBuffer& y, F32Buffer& token_scalars,
                             CombineBuffers* at) {
  const bool with_scalars = scalars.element_count() > 0;
  *at = {.rows = bytes_of(rows),
         .scalars = with_scalars ? scalars.typed_data() : nullptr,
         .routes = routes.typed_data(),
         .places = places.typed_data(),
         .ids = ids.typed_data(),
         .y = bytes_of(y),
         .token_scalars = with_scalars ? token_scalars.typed_data() : nullptr};
  return first_failure(
      {expect_shape("routes", routes, {shape.num_ranks, shape.num_tokens, shape.top_k}),
       expect_shape("places", places, {shape.num_ranks, shape.num_tokens}),
       expect_shape("scalars", scalars, {with_scalars ? shape.capacity : 0}),
       expect_shape("token_scalars", token_scalars,
                    {with_scalars ? shape.num_tokens : 0, shape.top_k})});
}

}  // namespace moriep
