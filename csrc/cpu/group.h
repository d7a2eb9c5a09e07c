// Groups of ranks on one machine: who the ranks are, which of them live in this process, and the
// thread that runs each local rank's steps one after another.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "arena.h"
#include "moriep/registry.h"
#include "moriep/status.h"
#include "wait.h"

namespace moriep {

class Group;

// A rank that is a device of this process. Its steps run on a thread of its own, so that a step
// that waits for a peer never holds one of XLA's threads: with those parked, XLA could not run what
// the peer needs.
class LocalRank {
 public:
  using Op = std::function<Status()>;
  using Done = std::function<void(const Status&)>;

  LocalRank(Group& group, int32_t rank, std::shared_ptr<Arena> arena);
  ~LocalRank();

  Group& group() { return group_; }
  int32_t rank() const { return rank_; }
  Arena& arena() { return *arena_; }

  // Runs op after the ones submitted before it and hands its result to done. An exception from op
  // fails the rank.
  void submit(Op op, Done done);

  // Tells the peers, now and for good, why this rank takes no further part.
  void fail(const std::string& why);

  // Ends the thread; steps not yet begun end with an error.
  void stop();

 private:
  struct Item {
    Op op;
    Done done;
  };

  Status start_thread();
  Status run(const Op& op);
  void work();

  Group& group_;
  const int32_t rank_;
  const std::shared_ptr<Arena> arena_;
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Item> queue_;
  bool stopping_ = false;
  std::thread thread_;
};

// The ranks along one line of the mesh's expert-parallel axis.
class Group {
 public:
  Group(int32_t num_ranks, std::chrono::duration<double> timeout);
  ~Group();

  int32_t num_ranks() const { return num_ranks_; }
  std::chrono::duration<double> timeout() const { return timeout_; }
  bool stopping() const { return stopping_.load(std::memory_order_relaxed); }

  Status add_local(int32_t rank);
  Status connect(int32_t rank, const ArenaAddress& address);
  // Says why a rank cannot be reached; whoever waits for it gets this text.
  void connect_failed(const std::string& why);

  LocalRank* local(int32_t rank) { return locals_[static_cast<size_t>(rank)].get(); }
  // Gives every rank's arena, waiting until all are connected.
  Status arenas(int32_t waiter, std::vector<Arena*>* out);
  bool is_remote(int32_t rank) const { return locals_[static_cast<size_t>(rank)] == nullptr; }
  bool connected();
  // The first failure of a local rank, or why not all ranks will be connected, or an empty text.
  std::string failure();

  void stop();

 private:
  const int32_t num_ranks_;
  const std::chrono::duration<double> timeout_;
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string connect_error_;
  std::vector<std::shared_ptr<Arena>> arenas_;  // null until connected
  std::vector<std::unique_ptr<LocalRank>> locals_;
};

using GroupTable = GroupTableOf<Group>;
using Registry = RegistryOf<Group>;

}  // namespace moriep
