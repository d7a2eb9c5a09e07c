#include "reduce.h"

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../machine/convert.h"

namespace gfx942::collectives {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

float wide(Half x) { return half_to_float(x.bits); }
float wide(Bfloat16 x) { return bf16_to_float(x.bits); }
template <typename T>
T wide(T x) {
  return x;
}

template <typename T>
auto apply(T a, T b, ncclRedOp_t reduction) {
  switch (reduction) {
    case ncclSum:
    case ncclProd:
      if constexpr (std::is_integral_v<T>) {
        // Without a sign, for which an overflow is defined.
        const auto x = static_cast<uint64_t>(a);
        const auto y = static_cast<uint64_t>(b);
        return static_cast<T>(reduction == ncclSum ? x + y : x * y);
      } else {
        return reduction == ncclSum ? a + b : a * b;
      }
    case ncclMax:
      if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
      return a < b ? b : a;
    case ncclMin:
      if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
      return b < a ? b : a;
  }
  return a;
}

template <typename T>
void reduce_as(void* total, const void* next, size_t count, ncclRedOp_t reduction) {
  auto* to = static_cast<T*>(total);
  const auto* from = static_cast<const T*>(next);
  for (size_t i = 0; i < count; ++i) {
    const auto result = apply(wide(to[i]), wide(from[i]), reduction);
    if constexpr (std::is_same_v<T, Half>) {
      to[i].bits = float_to_half(result);
    } else if constexpr (std::is_same_v<T, Bfloat16>) {
      to[i].bits = float_to_bf16(result);
    } else {
      to[i] = result;
    }
  }
}

}  // namespace

size_t size_of(ncclDataType_t type) {
  switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2:
      return 1;
    case ncclFloat16:
    case ncclBfloat16:
      return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32:
      return 4;
    case ncclInt64:
    case ncclUint64:
    case ncclFloat64:
      return 8;
  }
  return 0;
}

bool can_reduce(ncclDataType_t type, ncclRedOp_t reduction) {
  return type != ncclFloat8e4m3 && type != ncclFloat8e5m2 && reduction >= ncclSum &&
         reduction <= ncclMin;
}

void reduce(void* total, const void* next, size_t count, ncclDataType_t type,
            ncclRedOp_t reduction) {
  switch (type) {
    case ncclInt8:
      return reduce_as<int8_t>(total, next, count, reduction);
    case ncclUint8:
      return reduce_as<uint8_t>(total, next, count, reduction);
    case ncclInt32:
      return reduce_as<int32_t>(total, next, count, reduction);
    case ncclUint32:
      return reduce_as<uint32_t>(total, next, count, reduction);
    case ncclInt64:
      return reduce_as<int64_t>(total, next, count, reduction);
    case ncclUint64:
      return reduce_as<uint64_t>(total, next, count, reduction);
    case ncclFloat16:
      return reduce_as<Half>(total, next, count, reduction);
    case ncclFloat32:
      return reduce_as<float>(total, next, count, reduction);
    case ncclFloat64:
      return reduce_as<double>(total, next, count, reduction);
    case ncclBfloat16:
      return reduce_as<Bfloat16>(total, next, count, reduction);
    case ncclFloat8e4m3:
    case ncclFloat8e5m2:
      return;
  }
}

}  // namespace gfx942::collectives
