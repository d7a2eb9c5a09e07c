// The rules of an exchange: which rank holds an expert, where a row lies, which ranks a token goes to.
// The Python module plan.py states the same rules; nothing here knows XLA, shared memory or a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

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
  int64_t capacity = 0;  // C

  int64_t num_routes() const { return num_tokens * top_k; }
  // Largest number of (token, rank) pairs that one rank's tokens can make.
  int64_t max_fanout() const { return num_tokens * (top_k < num_ranks ? top_k : num_ranks); }
};

// The rank that holds an expert, or -1 for an id that is no expert.
inline int64_t rank_of(const Shape& shape, int32_t id) {
  if (id < 0 || id >= shape.num_experts) return -1;
  return id / shape.num_local_experts;
}

// Calls fn(rank) for each distinct rank that a token goes to, in ascending order. A token has few routes,
// so a sorted insertion into a small array beats any set.
template <typename Fn>
void for_each_rank(const Shape& shape, const int32_t* ids, std::vector<int64_t>& scratch, Fn&& fn) {
  scratch.clear();
  for (int64_t k = 0; k < shape.top_k; ++k) {
    const int64_t rank = rank_of(shape, ids[k]);
    if (rank < 0) continue;
    auto at = scratch.begin();
    while (at != scratch.end() && *at < rank) ++at;
    if (at == scratch.end() || *at != rank) scratch.insert(at, rank);
  }
  for (int64_t rank : scratch) fn(rank);
}

// First row of each local expert's run: runs follow each other, each starting at a multiple of `block`.
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
