// What the custom calls that run AITER's kernels have in common: decodes and validates.
#pragma once

#include <mutex>
#include <set>

#include "../aiter/experts.h"
#include "decode.h"

namespace moriep::aiter {

using BF16Buffer = ffi::Buffer<ffi::BF16>;
using U8 = ffi::Buffer<ffi::U8>;

// Which kernel runs; Python's experts/aiter.py builds them in one place.
struct LayerAttributes {
  std::string_view scheme;
  std::string_view kernel;
  int64_t tile;
};

// A kernel that is first used inside a recording would be loaded there.
inline Status preload(int32_t device) {
  static std::mutex mutex;
  static std::set<int32_t> loaded;
  const std::lock_guard<std::mutex> lock(mutex);
  if (loaded.contains(device)) return Status();
  if (Status status = preload_kernels(); !status.ok()) return status;
  loaded.insert(device);
  return Status();
}

inline Status decode_scheme(std::string_view text, Scheme* scheme) {
  for (const auto& [name, value] :
       {std::pair("fp8_block", Scheme::kFp8Block), std::pair("fp8_token", Scheme::kFp8Token),
        std::pair("int8_token", Scheme::kInt8Token)}) {
    if (text != name) continue;
    *scheme = value;
    return Status();
  }
  return bad_argument("scheme=" + std::string(text) + " is none of AITER's");
}

inline Status expect_codes(const char* name, const ffi::AnyBuffer& codes, Scheme scheme) {
  const bool int8 = scheme == Scheme::kInt8Token;
  if (codes.element_type() == (int8 ? ffi::S8 : ffi::F8E4M3FNUZ)) return Status();
  return bad_argument(std::string(name) + " must be " + (int8 ? "int8" : "float8_e4m3fnuz"));
}

inline Status decode_layer(const ffi::AnyBuffer& w1, const ffi::AnyBuffer& w2,
                           const F32Buffer& w1_scale, const F32Buffer& w2_scale,
                           const LayerAttributes& attributes, Layer* layer) {
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

}  // namespace moriep::aiter
