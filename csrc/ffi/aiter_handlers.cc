// The XLA custom call that runs a rank's experts by AITER's kernels, enqueued on XLA's stream, and
// what Python calls by ctypes to load them. XLA may replay what it enqueues.
#include "../aiter/c_api.h"
#include "aiter_layer.h"

namespace moriep::aiter {
namespace {

using Stream = ffi::PlatformStream<void*>;

struct RowAttributes {
  std::string_view scheme;
  std::string_view kernel;
  int64_t tile;
  int64_t block;  // every expert's run of rows starts at a multiple of it
};

ffi::Error experts_handler(int32_t device, void* stream, BF16Buffer rows, F32Buffer row_weights,
                           I32 group_sizes, ffi::AnyBuffer w1, ffi::AnyBuffer w2,
                           F32Buffer w1_scale, F32Buffer w2_scale, Out<BF16Buffer> out,
                           Out<U8> codes, Out<F32Buffer> scales, Out<I32> lists,
                           RowAttributes attributes) {
  Layer layer;
  if (Status status = decode_layer(w1, w2, w1_scale, w2_scale,
                                   {attributes.scheme, attributes.kernel, attributes.tile}, &layer);
      !status.ok()) {
    return to_ffi(status);
  }
  const auto dims = rows.dimensions();
  if (dims.size() != 2 || attributes.block < 1) {
    return to_ffi(bad_argument("rows " + shape_text(rows) +
                               " must have two dimensions, and block=" +
                               std::to_string(attributes.block) + " be at least 1"));
  }
  const int64_t num_rows = dims[0];
  const int64_t hidden = layer.hidden_size;
  if (Status status =
          first_failure({expect_shape("rows", rows, {num_rows, hidden}),
                         expect_shape("row_weights", row_weights, {num_rows}),
                         expect_shape("group_sizes", group_sizes, {layer.num_experts}),
                         expect_shape("out", *out, {num_rows, hidden}),
                         expect_shape("codes", *codes, {num_rows, hidden}),
                         expect_shape("scales", *scales, {row_scale_count(layer, num_rows)}),
                         expect_shape("lists", *lists, {list_words(num_rows, layer.num_experts)}),
                         preload(device)});
      !status.ok()) {
    return to_ffi(status);
  }
  return to_ffi(run_rows(device, stream, layer,
                         {.rows = static_cast<const std::byte*>(rows.untyped_data()),
                          .row_weights = row_weights.typed_data(),
                          .group_sizes = group_sizes.typed_data(),
                          .num_rows = num_rows,
                          .block = attributes.block,
                          .out = static_cast<std::byte*>(out->untyped_data()),
                          .codes = codes->typed_data(),
                          .scales = scales->typed_data(),
                          .lists = lists->typed_data()}));
}

#define MORIEP_HANDLER __attribute__((visibility("default"))) XLA_FFI_Error*

}  // namespace
}  // namespace moriep::aiter

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(moriep::aiter::RowAttributes,
                                      xla::ffi::StructMember<std::string_view>("scheme"),
                                      xla::ffi::StructMember<std::string_view>("kernel"),
                                      xla::ffi::StructMember<int64_t>("tile"),
                                      xla::ffi::StructMember<int64_t>("block"));

namespace moriep::aiter {

extern "C" {
MORIEP_HANDLER MoriepAiterExperts(XLA_FFI_CallFrame*);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(MoriepAiterExperts, experts_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<Stream>()
                                  .Arg<BF16Buffer>()      // rows [C, H]
                                  .Arg<F32Buffer>()       // row_weights [C]
                                  .Arg<I32>()             // group_sizes [L]
                                  .Arg<ffi::AnyBuffer>()  // w1 [L, 2I, H]
                                  .Arg<ffi::AnyBuffer>()  // w2 [L, H, I]
                                  .Arg<F32Buffer>()       // w1_scale
                                  .Arg<F32Buffer>()       // w2_scale
                                  .Ret<BF16Buffer>()      // out [C, H]
                                  .Ret<U8>()              // codes [C, H]
                                  .Ret<F32Buffer>()       // scales
                                  .Ret<I32>()             // lists
                                  .Attrs<RowAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace moriep::aiter
