// Waiting for another rank: a short spin, then a futex in slices, with a deadline and an eye on the
// peer.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace moriep {

using Clock = std::chrono::steady_clock;

// Long enough to cost nothing, short enough that a dead peer is noticed soon.
inline constexpr std::chrono::milliseconds kSlice{50};

// Sleeps until the word differs from `seen`, somebody wakes it, or a slice has passed.
void futex_wait_slice(const std::atomic<uint32_t>& word, uint32_t seen);

// Wakes everybody who waits on the word, in every process.
void futex_wake_all(const std::atomic<uint32_t>& word);

// Steps are counted modulo 2^32.
inline bool reached(uint32_t posted, uint32_t step) {
  return static_cast<int32_t>(posted - step) >= 0;
}

}  // namespace moriep
