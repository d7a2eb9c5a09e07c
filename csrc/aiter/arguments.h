// The arguments of AITER's fused kernels: each in 16 bytes of its own, at the offsets that the
// kernels' own ELF notes give. Python compares the notes of each file with the same table
// (jax_moriep/aiter/code_object.py) before a kernel is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moriep::aiter {

template <typename T>
struct Argument {
  T value{};
  std::byte unused[16 - sizeof(T)]{};

  Argument& operator=(T given) {
    value = given;
    return *this;
  }
};

using Pointer = Argument<const void*>;
using Number = Argument<uint32_t>;

struct Arguments {
  Argument<void*> out;     // bf16 [M, H], added to
  Pointer rows;            // [M, H]
  Pointer w1;              // [L, 2I, H], in AITER's layout
  Pointer valid;           // i32[2]: padded pairs, rows
  Pointer w2;              // [L, H, I], in AITER's layout
  Pointer row_scales;      // f32 [M], or [H / 128, M]
  Pointer w1_scale;        // f32 [L, 2I], or [L, 2I / 128, H / 128]
  Pointer w2_scale;        // f32 [L, H], or [L, H / 128, I / 128]
  Pointer smooth;          // read by none of the kernels that are launched here
  Pointer pairs;           // u32 [P]: the row of each pair; M where there is none
  Pointer weights;         // f32 [P]
  Pointer experts;         // i32 [P / 32]
  Number hidden;           // H
  Number intermediate;     // I
  Number num_rows;         // M
  Number num_experts;      // L
  Number row_stride;       // these and the following in bytes
  Number w1_row_stride;    //
  Number w2_row_stride;    //
  Number out_stride;       //
  Number w1_stride;        // of an expert, as the next four
  Number w2_stride;        //
  Number w1_scale_stride;  //
  Number w2_scale_stride;  //
  Number smooth_stride;    //
  Number top_k;            //
  Number total_groups;     // of persistent kernels, as the next one
  Number groups_divisor;   //
};
static_assert(offsetof(Arguments, valid) == 48 && offsetof(Arguments, w2) == 64);
static_assert(offsetof(Arguments, row_scales) == 80 && offsetof(Arguments, smooth) == 128);
static_assert(offsetof(Arguments, pairs) == 144 && offsetof(Arguments, experts) == 176);
static_assert(offsetof(Arguments, hidden) == 192 && offsetof(Arguments, num_experts) == 240);
static_assert(offsetof(Arguments, row_stride) == 256 && offsetof(Arguments, out_stride) == 304);
static_assert(offsetof(Arguments, w1_stride) == 320 && offsetof(Arguments, w1_scale_stride) == 352);
static_assert(offsetof(Arguments, top_k) == 400 && offsetof(Arguments, groups_divisor) == 432);
static_assert(sizeof(Arguments) == 448);

}  // namespace moriep::aiter
