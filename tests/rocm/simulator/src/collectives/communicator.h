// One rank of a communicator: how it joins, how it finds its part when it is split, and how it
// waits for others.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "board.h"
#include "failure.h"

namespace gfx942::collectives {

using Clock = std::chrono::steady_clock;

class Communicator {
 public:
  Communicator(std::shared_ptr<Board> board, int rank, int ranks);
  // Puts the rank on the board. The failure is what keeps it from there.
  Failure enter();
  // Whether all ranks have; from then on their processes are known.
  bool complete(Failure* failure);

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  Board& board() const { return *board_; }
  bool shares_process(int peer) const;

  // Casts the rank's vote of its next split, and gives the split's number.
  uint64_t vote(int color, int key);
  // The rank's part of a split, once all have voted and the part's first rank has made a board. A
  // negative color has a part of no ranks.
  struct Part {
    BoardId id;
    int rank = 0;
    int ranks = 0;
  };
  std::optional<Part> part(uint64_t split);

  // Asks `advance` again at each change until it is true. It fails when a peer has ended or the
  // deadline passes; an abort ends it without a failure. `missing` gives the peers that it waits
  // for.
  Failure wait(const std::string& call, const std::function<bool(Failure*)>& advance,
               const std::function<std::set<int>()>& missing);

  // This rank's work runs one piece at a time, in the order in which it was asked for and on
  // whatever streams, as RCCL's does: so ranks that ask in one order agree.
  uint64_t take_turn();
  // Until all earlier turns were left, or the communicator is aborted.
  void await_turn(uint64_t turn);
  void leave_turn(uint64_t turn);

  void abort();
  bool aborted() const { return aborted_.load(std::memory_order_acquire); }
  // The first failure stays.
  void fail(ncclResult_t code);
  ncclResult_t error() const { return error_.load(std::memory_order_acquire); }

 private:
  const std::shared_ptr<Board> board_;
  const int rank_;
  const int ranks_;
  std::vector<std::unique_ptr<Process>> processes_;  // by rank
  std::mutex mutex_;
  std::condition_variable left_;
  uint64_t next_turn_ = 0;
  std::set<uint64_t> turns_;  // taken and not left
  uint64_t splits_ = 0;
  std::atomic<bool> aborted_{false};
  std::atomic<ncclResult_t> error_{ncclSuccess};
};

}  // namespace gfx942::collectives

// What a ncclComm_t points at.
struct ncclComm : gfx942::collectives::Communicator {
  using Communicator::Communicator;
};
