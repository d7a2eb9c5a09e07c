// How a rank tells the ranks in its place on the other nodes that it has come to a step, and what
// it tells them. It is compiled twice: into the kernel that sends and waits, which is compiled with
// MORI's (kernels.hip), and into the library that launches it (csrc/mori).
//
// The notices travel by the queue pair by which MORI's kernels send, behind all that they have sent
// before. So whoever has a peer's notice of a step has everything of the steps before it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moriep::mori {

// What a rank says of a step, in front of the words of the ranks on its node.
struct Notice {
  uint64_t digest;
  int64_t order;
  int32_t failed;   // 1: it takes no further part
  int32_t culprit;  // the rank that it blames then
  uint64_t reserved;
};

inline constexpr size_t kNoticeBytes = size_t{128} << 10;
inline constexpr size_t kCountBytes = 4096;

// The parts of a rank's memory for notices: how many have come from each node, and for each of two
// alternating steps the one that goes and those that come. Two are enough: a rank that sends the
// notice of step n + 2 has been told by all that they have ended step n.
constexpr size_t count_at(int32_t node) { return static_cast<size_t>(node) * sizeof(uint64_t); }
constexpr size_t notice_out_at(uint64_t step, int32_t num_nodes) {
  return kCountBytes + (step % 2) * (static_cast<size_t>(num_nodes) + 1) * kNoticeBytes;
}
constexpr size_t notice_in_at(uint64_t step, int32_t num_nodes, int32_t node) {
  return notice_out_at(step, num_nodes) + (static_cast<size_t>(node) + 1) * kNoticeBytes;
}
constexpr size_t notices_bytes(int32_t num_nodes) { return kCountBytes + 2 * (static_cast<size_t>(num_nodes) + 1) * kNoticeBytes; }

struct RelayArgs {
  void* memory;           // MORI's name of the memory for notices, as its kernels take it
  const uint64_t* epoch;  // steps that this rank has left
  const uint32_t* failed;
  uint32_t* silent;  // 1: a failed rank has said so, and says no more
  uint64_t timeout_ns;
  uint64_t bytes;  // of a notice with its words
  int32_t rank;
  int32_t ranks_on_node;
  int32_t num_nodes;
};

}  // namespace moriep::mori
