#include "rows.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>

// One binary for every x86-64 machine: the loops are compiled several times and the loader picks.
// ThreadSanitizer runs before the loader's choice is possible, so it gets the plain version.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MORIEP_FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MORIEP_FOR_EACH_CPU
#endif

namespace moriep {
namespace {

// Elements summed at a time: the f32 partial sums stay in the first-level cache.
constexpr int64_t kChunk = 1024;
constexpr int64_t kReleaseBytes = int64_t{1} << 20;

struct F32 {
  using Bits = float;
  static float load(float bits) { return bits; }
  static float store(float value) { return value; }
};

struct BF16 {
  using Bits = uint16_t;
  static float load(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  static uint16_t store(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const uint32_t nan = (bits >> 16) | 0x40;                            // stays NaN when its payload is cut
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
  }
};

struct F16 {
  using Bits = _Float16;
  static float load(_Float16 bits) { return static_cast<float>(bits); }
  static _Float16 store(float value) { return static_cast<_Float16>(value); }
};

template <typename Type>
[[gnu::always_inline]] inline void sum_loop(const std::byte* const* rows, int64_t n, std::byte* out,
                                            int64_t hidden_size) {
  using Bits = typename Type::Bits;
  float sums[kChunk];
  for (int64_t start = 0; start < hidden_size; start += kChunk) {
    const int64_t size = std::min(kChunk, hidden_size - start);
    const auto* first = reinterpret_cast<const Bits*>(rows[0]) + start;
    for (int64_t i = 0; i < size; ++i) sums[i] = Type::load(first[i]);
    for (int64_t row = 1; row < n; ++row) {
      const auto* next = reinterpret_cast<const Bits*>(rows[row]) + start;
      for (int64_t i = 0; i < size; ++i) sums[i] += Type::load(next[i]);
    }
    auto* to = reinterpret_cast<Bits*>(out) + start;
    for (int64_t i = 0; i < size; ++i) to[i] = Type::store(sums[i]);
  }
}

MORIEP_FOR_EACH_CPU void sum_f32(const std::byte* const* rows, int64_t n, std::byte* out, int64_t hidden_size) {
  sum_loop<F32>(rows, n, out, hidden_size);
}

MORIEP_FOR_EACH_CPU void sum_bf16(const std::byte* const* rows, int64_t n, std::byte* out, int64_t hidden_size) {
  sum_loop<BF16>(rows, n, out, hidden_size);
}

MORIEP_FOR_EACH_CPU void sum_f16(const std::byte* const* rows, int64_t n, std::byte* out, int64_t hidden_size) {
  sum_loop<F16>(rows, n, out, hidden_size);
}

}  // namespace

void sum_rows(RowType type, const std::byte* const* rows, int64_t n, std::byte* out, int64_t hidden_size) {
  const auto bytes = static_cast<size_t>(hidden_size * element_bytes(type));
  if (n == 0) {
    std::memset(out, 0, bytes);
  } else if (n == 1) {
    std::memcpy(out, rows[0], bytes);
  } else if (type == RowType::kF32) {
    sum_f32(rows, n, out, hidden_size);
  } else if (type == RowType::kBF16) {
    sum_bf16(rows, n, out, hidden_size);
  } else {
    sum_f16(rows, n, out, hidden_size);
  }
}

void zero_fill(std::byte* data, int64_t bytes) {
  if (bytes < kReleaseBytes) {
    std::memset(data, 0, static_cast<size_t>(bytes));
    return;
  }
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t end = begin + static_cast<uintptr_t>(bytes);
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = end / page * page;
  std::memset(data, 0, first - begin);
  std::memset(reinterpret_cast<void*>(last), 0, end - last);
  auto* pages = reinterpret_cast<std::byte*>(first);
  // Dropped pages of private anonymous memory read as zero; of any other kind of memory they may not.
  // So a mark goes into the first and the last page, and if either survives, everything is written.
  auto* head = reinterpret_cast<volatile uint64_t*>(first);
  auto* tail = reinterpret_cast<volatile uint64_t*>(last) - 1;
  *head = 1;
  *tail = 1;
  if (madvise(pages, last - first, MADV_DONTNEED) != 0 || *head != 0 || *tail != 0) {
    std::memset(pages, 0, last - first);
  }
}

}  // namespace moriep
