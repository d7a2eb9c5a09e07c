#include "rows.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

// One binary for every x86-64 machine: the loops are compiled several times and the loader picks.
// ThreadSanitizer runs before the loader's choice is possible, so it gets the plain version.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define MORIEP_FOR_EACH_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
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
  static float load(uint16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  static uint16_t store(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded =
        (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const uint32_t nan = (bits >> 16) | 0x40;        // stays NaN when its payload is cut
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
  }
};

struct F16 {
  using Bits = _Float16;
  static float load(_Float16 bits) { return static_cast<float>(bits); }
  static _Float16 store(float value) { return static_cast<_Float16>(value); }
};

// Copies between ranges that do not overlap; a streamed copy needs an aligned target.
void copy_bytes(const std::byte* from, std::byte* to, int64_t bytes, Store store) {
#if defined(__SSE2__)
  if (store == Store::kStreamed && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    const int64_t lines = bytes / 64;
    for (int64_t line = 0; line < lines; ++line, from += 64, to += 64) {
      const auto* in = reinterpret_cast<const __m128i*>(from);
      auto* out = reinterpret_cast<__m128i*>(to);
      const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
      const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
      _mm_stream_si128(out, a);
      _mm_stream_si128(out + 1, b);
      _mm_stream_si128(out + 2, c);
      _mm_stream_si128(out + 3, d);
    }
    bytes %= 64;
  }
#else
  (void)store;
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Adds N rows in one pass, from left to right; N is known, so that the loop has no inner loop.
template <typename Type, size_t... J>
[[gnu::always_inline]] inline void add_rows(const std::byte* const* rows, int64_t start,
                                            int64_t size, typename Type::Bits* to,
                                            std::index_sequence<J...>) {
  const typename Type::Bits* from[] = {reinterpret_cast<const typename Type::Bits*>(rows[J]) +
                                       start...};
  for (int64_t i = 0; i < size; ++i) to[i] = Type::store((... + Type::load(from[J][i])));
}

// Adds any number of rows, one after the other.
template <typename Type>
[[gnu::always_inline]] inline void add_rows(const std::byte* const* rows, int64_t n, int64_t start,
                                            int64_t size, typename Type::Bits* to) {
  using Bits = typename Type::Bits;
  float sums[kChunk];
  const auto* first = reinterpret_cast<const Bits*>(rows[0]) + start;
  for (int64_t i = 0; i < size; ++i) sums[i] = Type::load(first[i]);
  for (int64_t row = 1; row < n; ++row) {
    const auto* next = reinterpret_cast<const Bits*>(rows[row]) + start;
    for (int64_t i = 0; i < size; ++i) sums[i] += Type::load(next[i]);
  }
  for (int64_t i = 0; i < size; ++i) to[i] = Type::store(sums[i]);
}

template <typename Type>
[[gnu::always_inline]] inline void sum_loop(const std::byte* const* rows, int64_t n, std::byte* out,
                                            int64_t hidden_size, Store store) {
  using Bits = typename Type::Bits;
  alignas(64) Bits sums[kChunk];
  for (int64_t start = 0; start < hidden_size; start += kChunk) {
    const int64_t size = std::min(kChunk, hidden_size - start);
    if (n == 2) {
      add_rows<Type>(rows, start, size, sums, std::make_index_sequence<2>());
    } else if (n == 3) {
      add_rows<Type>(rows, start, size, sums, std::make_index_sequence<3>());
    } else if (n == 4) {
      add_rows<Type>(rows, start, size, sums, std::make_index_sequence<4>());
    } else {
      add_rows<Type>(rows, n, start, size, sums);
    }
    copy_bytes(reinterpret_cast<const std::byte*>(sums),
               out + start * static_cast<int64_t>(sizeof(Bits)),
               size * static_cast<int64_t>(sizeof(Bits)), store);
  }
}

MORIEP_FOR_EACH_CPU void sum_f32(const std::byte* const* rows, int64_t n, std::byte* out,
                                 int64_t hidden_size, Store store) {
  sum_loop<F32>(rows, n, out, hidden_size, store);
}

MORIEP_FOR_EACH_CPU void sum_bf16(const std::byte* const* rows, int64_t n, std::byte* out,
                                  int64_t hidden_size, Store store) {
  sum_loop<BF16>(rows, n, out, hidden_size, store);
}

MORIEP_FOR_EACH_CPU void sum_f16(const std::byte* const* rows, int64_t n, std::byte* out,
                                 int64_t hidden_size, Store store) {
  sum_loop<F16>(rows, n, out, hidden_size, store);
}

}  // namespace

void copy_row(const std::byte* from, std::byte* to, int64_t bytes, Store store) {
  copy_bytes(from, to, bytes, store);
}

void sum_rows(RowType type, const std::byte* const* rows, int64_t n, std::byte* out,
              int64_t hidden_size, Store store) {
  const int64_t bytes = hidden_size * element_bytes(type);
  if (n == 0) {
    std::memset(out, 0, static_cast<size_t>(bytes));
  } else if (n == 1) {
    copy_bytes(rows[0], out, bytes, store);
  } else if (type == RowType::kF32) {
    sum_f32(rows, n, out, hidden_size, store);
  } else if (type == RowType::kBF16) {
    sum_bf16(rows, n, out, hidden_size, store);
  } else {
    sum_f16(rows, n, out, hidden_size, store);
  }
}

void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void prefer_large_pages(std::byte* data, int64_t bytes) {
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const uintptr_t first =
      (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kLargePage * kLargePage;
  // Advice only: where the system does not grant it, the result is the same.
  if (first >= last) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_WRITE
  // The part before the first large page, in one system call instead of one fault a page.
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  if (begin < first) madvise(reinterpret_cast<void*>(begin), first - begin, MADV_POPULATE_WRITE);
#endif
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
  // Dropped pages of private anonymous memory read as zero; of any other kind of memory they may
  // not. So a mark goes into the first and the last page, and if either survives, everything is
  // written.
  auto* head = reinterpret_cast<volatile uint64_t*>(first);
  auto* tail = reinterpret_cast<volatile uint64_t*>(last) - 1;
  *head = 1;
  *tail = 1;
  if (madvise(pages, last - first, MADV_DONTNEED) != 0 || *head != 0 || *tail != 0) {
    std::memset(pages, 0, last - first);
  }
}

}  // namespace moriep
