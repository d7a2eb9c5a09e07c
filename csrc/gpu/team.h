// What a kernel knows of its group: the arenas of all ranks, and the step it is in.
//
// An arena is one allocation of a rank's device: a control page that peers write to, a workspace of
// its own, and two halves of data that alternate from step to step. A step has two phases. The
// first writes data, fences, and signals every peer at its end; the second waits for every peer at
// its beginning. No kernel does both, so ranks that share a device can run one after the other. Two
// halves are enough for the reason that layout.h gives: whoever is in the first phase of step n has
// left step n-1, in whose second phase it saw that every peer had left step n-2.
//
// All counters live in device memory: XLA replays recorded launches, and the host is not asked.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moriep/layout.h"
#include "moriep/plan.h"
#include "moriep/row_type.h"

namespace moriep::gpu {

inline constexpr int kMaxRanks = 64;
inline constexpr int kMaxLocalExperts = 1024;
inline constexpr int kMaxTopK = 256;
inline constexpr int64_t kControlBytes = 65536;
inline constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;
inline constexpr uint64_t kFailedBit = uint64_t{1} << 63;
// The words of a step that has failed: as a float NaN, as a count no number that is taken for one.
inline constexpr int32_t kPoisonWord = 0x7fffffff;

enum class Fault : int32_t {
  kNone = 0,
  kDeadline = 1,    // a peer did not arrive in time
  kPeerFailed = 2,  // a peer says that it has failed
  kDiffers = 3,     // a peer runs another exchange
  kWrongRank = 4,   // the program computes another rank than the group's table says
  kBadPlan = 5,     // the plan names a row or a place that does not exist
  kStopped = 6,     // a peer came, and did not do its part in time
  kDelivery = 7,    // a peer puts where this rank pulls, or the other way round
};

// Where the host reads what went wrong; in its own memory, so that a look costs no synchronisation.
struct FaultReport {
  uint64_t set;
  int32_t fault;
  int32_t kind;
  int32_t peer;
  int32_t pad;
  uint64_t step;
  int64_t here;
  int64_t there;
};

// What a rank says of the step that it has entered.
struct Post {
  uint64_t digest;  // of the kind, the sizes, the dtype and the config; the lowest bit: a Delivery
  int64_t order;    // the call's position in its program
};

struct alignas(128) Arrival {
  uint64_t step;  // whose data the peer has published; kFailedBit when it takes no further part
};

struct Control {
  Arrival arrived[kMaxRanks];   // peers write here
  Post posts[2][kMaxRanks];     // peers write here, before they arrive
  alignas(128) uint64_t epoch;  // steps that this rank has left
  uint32_t joined;              // blocks of the running kernel that are done
  uint32_t failed;              // this rank has failed: no more waits, results are poison
};
static_assert(sizeof(Control) <= kControlBytes);

// Passed to every kernel by value.
struct Team {
  Control* control[kMaxRanks];
  FaultReport* report;
  uint64_t timeout_ns;
  int64_t half_bytes;
  int32_t rank;
  int32_t num_ranks;
  // The ranks of this node, which reach each other's arenas, are a run. All ranks, but on MORI.
  int32_t first_near;
  int32_t num_near;
};

// The sizes of an exchange as kernels compute with them; exchange.cc checks that they fit.
struct Sizes {
  int32_t num_ranks;
  int32_t num_tokens;
  int32_t top_k;
  int32_t num_experts;
  int32_t num_local_experts;
  int32_t block;
  int32_t capacity;
  int32_t fanout;  // pushed rows that each token has room for
  int32_t num_words;
  int32_t num_nodes;
  int64_t row_bytes;
};

// What the first and the last kernel of a step need beside its data.
struct Stepping {
  Kind kind;
  uint64_t digest;
  const int32_t* rank;     // [1], as the program computes it
  const int32_t* order;    // [1]
  int32_t* order_out;      // [1]
  int32_t first_rank = 0;  // what the program calls the group's rank 0
};

}  // namespace moriep::gpu
