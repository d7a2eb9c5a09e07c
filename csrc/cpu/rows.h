// Moving and summing rows: the only code here that touches payload.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moriep {

// Row types; the numbers travel in step headers. kU8 is opaque bytes (packed fp8), moved but never summed.
enum class RowType : int32_t { kF32 = 1, kBF16 = 2, kF16 = 3, kU8 = 4 };

inline int64_t element_bytes(RowType type) {
  switch (type) {
    case RowType::kF32:
      return 4;
    case RowType::kBF16:
    case RowType::kF16:
      return 2;
    case RowType::kU8:
      return 1;
  }
  return 0;
}

// out = ((rows[0] + rows[1]) + rows[2]) + ..., in f32, rounded once to the row type; zeros when n is 0.
// `out` may be none of the inputs.
void sum_rows(RowType type, const std::byte* const* rows, int64_t n, std::byte* out, int64_t hidden_size);

// Sets memory of a result buffer to zero. Whole pages of large ranges are given back to the system instead
// of being written, so that the unused end of a large capacity costs neither time nor memory.
void zero_fill(std::byte* data, int64_t bytes);

}  // namespace moriep
