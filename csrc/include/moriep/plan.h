// The rules of an exchange: which rank holds an expert, where a row lies, which ranks a token goes
// to. The Python module plan.py states the same rules; nothing here knows XLA, shared memory or a
// GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "moriep/status.h"

namespace moriep {

// A route in a plan: a row of this rank, or one of these.
inline constexpr int32_t kNotHere = -1;  // no route, or another rank's
inline constexpr int32_t kDropped = -2;  // this rank's, but beyond its capacity

// The static sizes of one exchange; the letters are those of docs/design.md.
struct Shape {
  int64_t num_ranks = 0;          // R
  int64_t num_tokens = 0;         // T, per rank
  int64_t top_k = 0;              // K
  int64_t hidden_size = 0;        // H
  int64_t num_experts = 0;        // E, as routed
  int64_t num_local_experts = 0;  // L
  int64_t block = 0;
  int64_t capacity = 0;   // C
  int64_t num_words = 0;  // W: what a dispatch carries from every rank to every rank
  // N: a rank's tokens are those of so many nodes, as many of each, one node's after the other's.
  // Rows are then ordered by expert, node, rank and token; all else is as with one.
  int64_t num_nodes = 1;

  int64_t num_routes() const { return num_tokens * top_k; }
  // Largest number of (token, rank) pairs that one rank's tokens can make.
  int64_t max_fanout() const { return num_tokens * (top_k < num_ranks ? top_k : num_ranks); }
};

// Refuses sizes that describe no layer, and sizes whose products could overflow: rows and places
// are int32, and a half of rows of the widest type must have a size that int64 holds.
inline Status check_shape(const Shape& shape) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  constexpr int64_t kMaxHidden = int64_t{1} << 28;
  constexpr int64_t kMaxExperts = int64_t{1} << 24;  // of which every step makes a table
  const auto [least, most] = std::minmax({shape.num_ranks, shape.top_k, shape.num_experts,
                                          shape.num_local_experts, shape.block, shape.capacity});
  constexpr int64_t kMaxWords = int64_t{1} << 26;
  const bool sane = least >= 1 && most <= kMax && shape.num_tokens >= 0 && shape.num_words >= 0 &&
                    shape.num_words <= kMaxWords && shape.num_tokens <= kMax &&
                    shape.num_nodes >= 1 && shape.num_tokens % shape.num_nodes == 0 &&
                    shape.hidden_size >= 0 && shape.hidden_size <= kMaxHidden &&
                    shape.num_experts <= kMaxExperts && shape.max_fanout() <= kMax &&
                    (shape.num_experts - 1) / shape.num_local_experts < shape.num_ranks;
  if (sane) return Status();
  return Status(Code::kInvalidArgument,
                "num_experts=" + std::to_string(shape.num_experts) +
                    ", num_local_experts=" + std::to_string(shape.num_local_experts) + ", block=" +
                    std::to_string(shape.block) + ", top_k=" + std::to_string(shape.top_k) +
                    ", hidden_size=" + std::to_string(shape.hidden_size) +
                    ", capacity=" + std::to_string(shape.capacity) +
                    ", num_words=" + std::to_string(shape.num_words) + " and " +
                    std::to_string(shape.num_tokens) + " tokens per rank of " +
                    std::to_string(shape.num_nodes) + " nodes do not describe a layer over " +
                    std::to_string(shape.num_ranks) + " ranks");
}

// The rank that holds each expert, looked up instead of divided: a plan asks for every route of the
// group.
class Owners {
 public:
  explicit Owners(const Shape& shape)
      : top_k_(shape.top_k), ranks_(static_cast<size_t>(shape.num_experts)) {
    for (size_t e = 0; e < ranks_.size(); ++e) {
      ranks_[e] = static_cast<int32_t>(static_cast<int64_t>(e) / shape.num_local_experts);
    }
  }

  // The rank that holds an expert, or -1 for an id that is no expert.
  int32_t rank_of(int32_t id) const {
    const auto index = static_cast<size_t>(static_cast<uint32_t>(id));
    return index < ranks_.size() ? ranks_[index] : -1;
  }

  // Writes the distinct ranks that a token goes to, in ascending order, and gives their number.
  int64_t ranks_of(const int32_t* ids, std::vector<int32_t>& out) const {
    out.clear();
    for (int64_t k = 0; k < top_k_; ++k) {
      const int32_t rank = rank_of(ids[k]);
      if (rank < 0) continue;
      // A token has few routes: inserting into a short sorted list beats any set.
      auto at = out.begin();
      while (at != out.end() && *at < rank) ++at;
      if (at == out.end() || *at != rank) out.insert(at, rank);
    }
    return static_cast<int64_t>(out.size());
  }

 private:
  int64_t top_k_;
  std::vector<int32_t> ranks_;
};

// First row of each local expert's run: runs follow each other, each starting at a multiple of
// `block`.
inline std::vector<int64_t> run_starts(const std::vector<int64_t>& counts, int64_t block) {
  std::vector<int64_t> starts(counts.size());
  int64_t next = 0;
  for (size_t e = 0; e < counts.size(); ++e) {
    starts[e] = next;
    next += (counts[e] + block - 1) / block * block;
  }
  return starts;
}

}  // namespace moriep
