// What one rank's arena holds: a control page that peers watch, and two halves of data that
// alternate from step to step. Two are enough, because a rank leaves step n only after every peer
// has entered it, and thereby left step n-1: nobody can still be reading the half that step n+1
// writes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "moriep/plan.h"

namespace moriep {

inline constexpr uint64_t kArenaMagic = 0x50454952'4f4d5841;  // "AXMORIEP"
inline constexpr uint32_t kArenaVersion = 2;
inline constexpr int kNumHalves = 2;
inline constexpr int64_t kConfigChars = 1024;
inline constexpr int64_t kFailureChars = 512;
inline constexpr int64_t kPageBytes =
    65536;  // the largest page of the machines we know; 4096 divides it
inline constexpr int64_t kRowAlign = 64;

enum class Kind : int32_t { kDispatch = 1, kReplay = 2, kCombine = 3 };

inline const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::kDispatch:
      return "dispatch";
    case Kind::kReplay:
      return "combine's backward";
    case Kind::kCombine:
      return "combine";
  }
  return "unknown";
}

// What a rank says of the step that it has entered; every peer compares it with its own.
struct StepHeader {
  int32_t kind = 0;
  int32_t order = 0;  // the call's position in its program
  int32_t dtype = 0;
  int32_t with_scalars = 0;
  int64_t num_ranks = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 0;
  int64_t hidden_size = 0;
  int64_t num_experts = 0;
  int64_t num_local_experts = 0;
  int64_t block = 0;
  int64_t capacity = 0;
  int64_t num_words = 0;
  char config[kConfigChars] = {};
};

// One rank's control page. Only its owner writes it; peers read it and wait on `posted`.
struct Control {
  uint64_t magic;
  uint32_t version;
  int32_t rank;
  int32_t num_ranks;
  uint32_t pad;
  uint64_t nonce[2];

  // The step whose data this rank has published; a futex word. It only grows, modulo 2^32.
  alignas(64) std::atomic<uint32_t> posted;
  alignas(
      64) std::atomic<uint32_t> failed;  // 1: `failure` says why this rank takes no further part
  std::atomic<uint32_t> closed;          // 1: the owner has ended in good order
  char failure[kFailureChars];

  alignas(64) StepHeader headers[kNumHalves];
};

// Processes that share an arena may have been built apart: whoever moves a field raises
// kArenaVersion.
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);
static_assert(offsetof(Control, nonce) == 24 && offsetof(Control, posted) == 64);
static_assert(offsetof(Control, failed) == 128 && offsetof(Control, closed) == 132 &&
              offsetof(Control, failure) == 136);
static_assert(offsetof(Control, headers) == 704 && sizeof(StepHeader) == 1112 &&
              sizeof(Control) == 2944);

// Texts of a control page are cut to their field and always end with a zero.
inline void copy_text(const std::string& from, char* to, int64_t size) {
  const size_t length = std::min(from.size(), static_cast<size_t>(size) - 1);
  std::memcpy(to, from.data(), length);
  to[length] = '\0';
}

// Reads such a text without trusting that its writer ended it.
inline std::string read_text(const char* text, int64_t size) {
  return std::string(text, strnlen(text, static_cast<size_t>(size)));
}

inline constexpr int64_t kControlBytes =
    (sizeof(Control) + kPageBytes - 1) / kPageBytes * kPageBytes;

// Halves lie far apart in the sparse file, so that each can hold a step of any size without moving.
inline constexpr int64_t kHalfStride = int64_t{1} << 38;
inline constexpr int64_t kArenaBytes = kControlBytes + kNumHalves * kHalfStride;
inline int64_t half_offset(uint32_t step) {
  return kControlBytes + (step % kNumHalves) * kHalfStride;
}

inline int64_t align_up(int64_t bytes) { return (bytes + kRowAlign - 1) / kRowAlign * kRowAlign; }

// Byte offsets inside a half. A dispatch publishes routes, words and staged rows; a replay only
// rows; a combine receives one row per (token, rank) pair and, for the router's gradient, one
// scalar per route.
struct HalfLayout {
  int64_t ids = 0;
  int64_t weights = 0;
  int64_t words = 0;
  int64_t rows = 0;
  int64_t scalars = 0;
  int64_t row_stride = 0;
  int64_t bytes = 0;

  static HalfLayout of(Kind kind, const Shape& shape, int64_t row_bytes, bool with_scalars) {
    HalfLayout at;
    at.row_stride = align_up(row_bytes);
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) {
      const int64_t start = end;
      end = align_up(end + bytes);
      return start;
    };
    if (kind == Kind::kDispatch) {
      at.ids = take(shape.num_routes() * static_cast<int64_t>(sizeof(int32_t)));
      at.weights = take(shape.num_routes() * static_cast<int64_t>(sizeof(float)));
      at.words = take(shape.num_words * static_cast<int64_t>(sizeof(int32_t)));
    }
    if (with_scalars) at.scalars = take(shape.num_routes() * static_cast<int64_t>(sizeof(float)));
    const int64_t rows = kind == Kind::kCombine ? shape.max_fanout() : shape.num_tokens;
    at.rows = take(rows * at.row_stride);
    at.bytes = end;
    return at;
  }
};

}  // namespace moriep
