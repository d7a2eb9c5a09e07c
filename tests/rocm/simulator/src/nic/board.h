// What a job's adapters share with whoever watches them: what each queue pair has sent, and whether
// the link between them carries anything. It is the file that ROCM_SIM_NIC_BOARD names, which its
// maker has filled with zeros (tests/rocm/nic.py reads and writes it), or memory of the process's
// own.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>

namespace gfx942::nic {

// One queue pair's work, from the side that posts it.
struct Traffic {
  std::atomic<int32_t> pid;  // 0: nobody's yet
  std::atomic<int32_t> peer_pid;
  std::atomic<uint32_t> number;  // of the queue pair
  std::atomic<uint32_t> errors;  // completions that say so
  // Messages that have arrived, and the bytes that they brought.
  std::atomic<uint64_t> writes;
  std::atomic<uint64_t> sends;
  std::atomic<uint64_t> atomics;
  std::atomic<uint64_t> write_bytes;
  std::atomic<uint64_t> send_bytes;
  std::atomic<uint64_t> atomic_bytes;
};
static_assert(sizeof(Traffic) == 64);

struct Board {
  static constexpr int kMaxPairs = 1023;
  std::atomic<uint32_t> stopped;  // 1: nothing arrives, and nothing is lost either
  std::atomic<uint32_t> num_pairs;
  uint64_t reserved[7];
  Traffic pairs[kMaxPairs];
};
static_assert(sizeof(Board) == 65536);

// The board of this process.
Board& board();

// A line of the board for a queue pair.
Traffic& add_pair(uint32_t number);

}  // namespace gfx942::nic
