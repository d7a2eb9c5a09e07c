// The XLA custom call that runs a rank's experts by AITER's kernels, enqueued on XLA's stream, and
// what Python calls by ctypes to load them. XLA may replay what it enqueues.
#include <mutex>
#include <set>

#include "../aiter/c_api.h"
#include "../aiter/experts.h"
#include "decode.h"

namespace moriep::aiter {
namespace {

using Stream = ffi::PlatformStream<void*>;
using BF16Buffer = ffi::Buffer<ffi::BF16>;
using U8 = ffi::Buffer<ffi::U8>;

// The attributes of every call; Python's experts/aiter.py builds them in one place.
struct LayerAttributes {
  std::string_view scheme;
  std::string_view kernel;
  int64_t tile;
  int64_t block;  // every expert's run of rows starts at a multiple of it
};

// A kernel that is first used inside a recording would be loaded there.
Status preload(int32_t device) {
  static std::mutex mutex;
  static std::set<int32_t> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.contains(device)) return Status();
  if (Status status = preload_kernels(); !status.ok()) return status;
  loaded.insert(device);
  return Status();
}

Status decode_scheme(std::string_view text, Scheme* scheme) {
  for (const auto& [name, value] :
       {std::pair("fp8_block", Scheme::kFp8Block), std::pair("fp8_token", Scheme::kFp8Token),
        std::pair("int8_token", Scheme::kInt8Token)}) {
    if (text != name) continue;
    *scheme = value;
    return Status();
  }
  return bad_argument("scheme=" + std::string(text) + " is none of AITER's");
}

Status expect_codes(const char* name, const ffi::AnyBuffer& codes, Scheme scheme) {
  const bool int8 = scheme == Scheme::kInt8Token;
  if (codes.element_type() == (int8 ? ffi::S8 : ffi::F8E4M3FNUZ)) return Status();
  return bad_argument(std::string(name) + " must be " + (int8 ? "int8" : "float8_e4m3fnuz"));
}

Status decode_layer(const ffi::AnyBuffer& w1, const ffi::AnyBuffer& w2, const F32Buffer& w1_scale,
                    const F32Buffer& w2_scale, const LayerAttributes& attributes, Layer* layer) {
  const auto dims = w2.dimensions();
  if (dims.size() != 3) return bad_argument("w2 " + shape_text(w2) + " must have three dimensions");
  const int64_t experts = dims[0];
  const int64_t hidden = dims[1];
  const int64_t inner = dims[2];
  *layer = Layer{.num_experts = experts,
                 .hidden_size = hidden,
                 .intermediate = inner,
                 .kernel = attributes.kernel,
                 .tile = attributes.tile,
                 .w1 = bytes_of(w1),
                 .w1_scale = w1_scale.typed_data(),
                 .w2 = bytes_of(w2),
                 .w2_scale = w2_scale.typed_data()};
  if (Status status = decode_scheme(attributes.scheme, &layer->scheme); !status.ok()) return status;
  if (Status status = first_failure({expect_codes("w1", w1, layer->scheme),
                                     expect_codes("w2", w2, layer->scheme),
                                     expect_shape("w1", w1, {experts, 2 * inner, hidden})});
      !status.ok()) {
    return status;
  }
  if (layer->scheme != Scheme::kFp8Block) {
    return first_failure({expect_shape("w1_scale", w1_scale, {experts, 2 * inner}),
                          expect_shape("w2_scale", w2_scale, {experts, hidden})});
  }
  const int64_t across = hidden / kScaleBlock;
  const int64_t along = inner / kScaleBlock;
  return first_failure({expect_shape("w1_scale", w1_scale, {experts, 2 * along, across}),
                        expect_shape("w2_scale", w2_scale, {experts, across, along})});
}

ffi::Error experts_handler(int32_t device, void* stream, BF16Buffer rows, F32Buffer row_weights,
                           I32 group_sizes, ffi::AnyBuffer w1, ffi::AnyBuffer w2,
                           F32Buffer w1_scale, F32Buffer w2_scale, Out<BF16Buffer> out,
                           Out<U8> codes, Out<F32Buffer> scales, Out<I32> lists,
                           LayerAttributes attributes) {
  Layer layer;
  if (Status status = decode_layer(w1, w2, w1_scale, w2_scale, attributes, &layer); !status.ok()) {
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

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(moriep::aiter::LayerAttributes,
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
                                  .Attrs<LayerAttributes>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace moriep::aiter
