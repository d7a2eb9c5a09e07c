// MORI's flags between nodes, a set for each step.
//
// In MORI's kernels a dispatch sets flags on other nodes, and the combine behind it reads and
// clears them: so dispatches and combines must alternate, and a flag that comes late, behind the
// clearing, is taken for one of the next dispatch. Here two sets alternate from step to step. A set
// is cleared in the step before its own, when all notices of that step have come and with them, in
// order, everything that was ever sent to it; and a combine finds in its set what its plan has
// kept. A third set, which no peer knows, is for a rank that has failed.
#pragma once

#include <cstdint>

namespace moriep::mori {

inline constexpr int kFlagSets = 3;
inline constexpr int kDetourSet = 2;
// Of the tokens of a rank: what MORI sends between nodes with one flag.
inline constexpr int32_t kChunk = 64;

inline int32_t num_chunks(int32_t max_tokens) { return (max_tokens + kChunk - 1) / kChunk; }

// What makes one set MORI's: words of its name for a buffer.
inline constexpr int kNameWords = 3;
struct FlagNames {
  uint64_t* at[kNameWords];
  uint64_t of[kFlagSets][kNameWords];
};

struct FlagArgs {
  FlagNames flags;
  FlagNames totals;
  uint64_t* sets[kFlagSets];  // [nodes, chunks] of a set, and behind them its totals [nodes]
  int32_t num_nodes;
  int32_t num_chunks;
  int32_t* sent_chunks;   // [nodes]: MORI's count of the chunks of a dispatch
  uint64_t* combines;     // how many there have been
  uint64_t* barrier;      // what MORI's combine waits for
  uint64_t* own_meeting;  // [R]: where a rank that has failed meets itself
};

// What a plan keeps of a dispatch between nodes, in words of XLA's memory.
struct BetweenPlan {
  int32_t* relayed;  // [nodes, T, K]: where tokens from other nodes went
  int32_t* sent;     // [T, nodes]: at which place of which chunk each token went to each node
  int32_t* flags;    // [nodes, chunks]
};

// The words of such a plan.
inline int64_t between_words(int64_t num_nodes, int64_t num_tokens, int64_t top_k) {
  if (num_nodes < 2) return 0;
  return num_nodes *
         (num_tokens * top_k + num_tokens + num_chunks(static_cast<int32_t>(num_tokens)));
}

}  // namespace moriep::mori
