// How a dispatch sends tokens. On the fp8 wire something smaller is sent in place of each token,
// when the layer asks for it: the numbers are those of the Python module quant.py. Nothing here
// knows a GPU.
#pragma once

#include <cstdint>

namespace moriep {

// How tokens travel in a dispatch; the numbers go into what ranks compare.
enum class Wire : int32_t { kRows = 0, kFp8 = 1 };

// Who moves the tokens of a dispatch: each receiver, which reads them in their owner's arena, or
// each owner, which writes them into the arenas of their receivers.
enum class Delivery : int32_t { kPull = 0, kPut = 1 };

inline const char* delivery_name(Delivery delivery) {
  return delivery == Delivery::kPut ? "put" : "pull";
}

// The float8 of a platform: e4m3fn on NVIDIA's GPUs, e4m3fnuz on the MI300 series.
enum class Fp8Format : int32_t { kE4M3FN = 0, kE4M3FNUZ = 1 };

// Values that share a scale. A row's last group may have fewer.
inline constexpr int64_t kFp8Group = 128;

inline int64_t num_fp8_groups(int64_t hidden_size) {
  return (hidden_size + kFp8Group - 1) / kFp8Group;
}

// A token on the wire: a code for each value, then, from here on, an f32 scale for each group.
inline int64_t fp8_scales_offset(int64_t hidden_size) { return (hidden_size + 15) / 16 * 16; }
inline int64_t fp8_row_bytes(int64_t hidden_size) {
  return fp8_scales_offset(hidden_size) +
         num_fp8_groups(hidden_size) * static_cast<int64_t>(sizeof(float));
}

}  // namespace moriep
