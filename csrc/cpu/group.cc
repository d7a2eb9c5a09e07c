#include "group.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <utility>

namespace moriep {
namespace {

// Longer waits would overflow the clock's nanoseconds.
constexpr std::chrono::duration<double> kLongestTimeout{1e9};

Status closed() { return Status(Code::kFailedPrecondition, "the group is closed"); }

}  // namespace

LocalRank::LocalRank(Group& group, int32_t rank, std::shared_ptr<Arena> arena)
    : group_(group), rank_(rank), arena_(std::move(arena)) {}

LocalRank::~LocalRank() { stop(); }

void LocalRank::submit(Op op, Done done) {
  if (getpid() != arena_->address().pid) {
    return done(Status(Code::kFailedPrecondition,
                       "a forked process cannot use its parent's groups; use spawn"));
  }
  Status refused;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    refused = stopping_ ? closed() : start_thread();
    if (refused.ok()) {
      queue_.push_back({std::move(op), std::move(done)});
      ready_.notify_one();
      return;
    }
  }
  done(refused);
}

Status LocalRank::start_thread() try {
  if (!thread_.joinable()) thread_ = std::thread([this] { work(); });
  return Status();
} catch (const std::system_error& error) {
  const std::string text =
      "rank " + std::to_string(rank_) + " cannot start its thread: " + error.what();
  fail(text);
  return Status(Code::kInternal, text);
}

void LocalRank::fail(const std::string& why) {
  Control& control = arena_->control();
  // The first reason stays: peers may be reading it.
  if (control.failed.load(std::memory_order_relaxed) != 0) return;
  copy_text(why, control.failure, kFailureChars);
  control.failed.store(1, std::memory_order_release);
  futex_wake_all(control.posted);
}

Status LocalRank::run(const Op& op) try { return op(); } catch (const std::exception& error) {
  // Memory has run out, most likely. The peers wait for this rank, so they have to hear of it.
  const std::string text =
      "rank " + std::to_string(rank_) + ", step " +
      std::to_string(arena_->control().posted.load(std::memory_order_relaxed) + 1) + ": " +
      error.what();
  fail(text);
  return Status(Code::kInternal, text);
}

void LocalRank::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    ready_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    {
      const Item item = std::move(queue_.front());
      queue_.pop_front();
      const bool begin = !stopping_;
      lock.unlock();
      item.done(begin ? run(item.op) : closed());
    }
    lock.lock();
  }
}

void LocalRank::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    ready_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  Control& control = arena_->control();
  control.closed.store(1, std::memory_order_release);
  futex_wake_all(control.posted);
}

Group::Group(int32_t num_ranks, std::chrono::duration<double> timeout)
    : num_ranks_(num_ranks),
      timeout_(std::min(timeout, kLongestTimeout)),
      arenas_(static_cast<size_t>(num_ranks)),
      locals_(static_cast<size_t>(num_ranks)) {}

Group::~Group() { stop(); }

Status Group::add_local(int32_t rank) {
  std::unique_ptr<Arena> arena;
  if (Status status = Arena::create(rank, num_ranks_, &arena); !status.ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  auto& place = arenas_[static_cast<size_t>(rank)];
  place = std::move(arena);
  locals_[static_cast<size_t>(rank)] = std::make_unique<LocalRank>(*this, rank, place);
  return Status();
}

Status Group::connect(int32_t rank, const ArenaAddress& address) {
  std::unique_ptr<Arena> arena;
  if (Status status = Arena::open(address, rank, num_ranks_, &arena); !status.ok()) return status;
  std::lock_guard<std::mutex> lock(mutex_);
  auto& place = arenas_[static_cast<size_t>(rank)];
  // Steps hold on to the arenas that they found.
  if (place != nullptr) {
    return Status(Code::kFailedPrecondition,
                  "rank " + std::to_string(rank) + " is connected already");
  }
  place = std::move(arena);
  changed_.notify_all();
  return Status();
}

void Group::connect_failed(const std::string& why) {
  std::lock_guard<std::mutex> lock(mutex_);
  connect_error_ = why;
  changed_.notify_all();
}

bool Group::connected() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& arena : arenas_) {
    if (arena == nullptr) return false;
  }
  return true;
}

Status Group::arenas(int32_t waiter, std::vector<Arena*>* out) {
  std::unique_lock<std::mutex> lock(mutex_);
  int32_t missing = -1;
  const auto settled = [this, &missing] {
    missing = -1;
    for (int32_t r = 0; r < num_ranks_ && missing < 0; ++r) {
      if (arenas_[static_cast<size_t>(r)] == nullptr) missing = r;
    }
    return missing < 0 || stopping() || !connect_error_.empty();
  };
  const bool in_time = changed_.wait_for(lock, timeout_, settled);
  const std::string who = "rank " + std::to_string(waiter);
  if (missing >= 0) {
    const std::string lacking = who + " has no connection to rank " + std::to_string(missing);
    if (!connect_error_.empty()) return Status(Code::kUnavailable, lacking + ": " + connect_error_);
    if (in_time) return Status(Code::kFailedPrecondition, lacking + ": the group is closed");
    return Status(Code::kDeadlineExceeded, lacking + " after " + std::to_string(timeout_.count()) +
                                               " s; does every process run the same program?");
  }
  out->clear();
  for (const auto& arena : arenas_) out->push_back(arena.get());
  return Status();
}

std::string Group::failure() {
  for (const auto& local : locals_) {
    if (local == nullptr) continue;
    Control& control = local->arena().control();
    if (control.failed.load(std::memory_order_acquire) != 0) return control.failure;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  return connect_error_;
}

void Group::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
    changed_.notify_all();
    // Waiting steps look at the flag when they wake; wake them first, then join all.
    for (const auto& arena : arenas_) {
      if (arena != nullptr) futex_wake_all(arena->control().posted);
    }
  }
  for (const auto& local : locals_) {
    if (local != nullptr) local->stop();
  }
}

}  // namespace moriep
