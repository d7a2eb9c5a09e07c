// Row types; the numbers travel in step headers. kU8 is opaque bytes (packed fp8), moved but never
// summed.
#pragma once

#include <cstdint>

namespace moriep {

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

// Of a number in a step header, which may be any.
inline const char* type_name(int32_t type) {
  switch (static_cast<RowType>(type)) {
    case RowType::kF32:
      return "float32";
    case RowType::kBF16:
      return "bfloat16";
    case RowType::kF16:
      return "float16";
    case RowType::kU8:
      return "packed float8";
  }
  return "unknown";
}

}  // namespace moriep
