#include "communicator.h"

#include <unistd.h>

#include <algorithm>

namespace gfx942::collectives {

Communicator::Communicator(std::shared_ptr<Board> board, int rank, int ranks)
    : board_(std::move(board)), rank_(rank), ranks_(ranks) {}

Failure Communicator::enter() {
  Member& member = board_->member(rank_);
  int32_t nobody = 0;
  if (!member.pid.compare_exchange_strong(nobody, -1)) {
    return {ncclInvalidUsage,
            "two ranks of a communicator say that they are rank " + std::to_string(rank_)};
  }
  member.ranks = ranks_;
  member.pid.store(getpid(), std::memory_order_release);
  board_->ring();
  return {};
}

bool Communicator::complete(Failure* failure) {
  if (!processes_.empty()) return true;
  for (int peer = 0; peer < ranks_; ++peer) {
    Member& member = board_->member(peer);
    if (member.pid.load(std::memory_order_acquire) <= 0) return false;
    if (member.ranks != ranks_) {
      *failure = {ncclInvalidArgument,
                  "rank " + std::to_string(peer) + " joined a communicator of " +
                      std::to_string(member.ranks) + " ranks, rank " + std::to_string(rank_) +
                      " one of " + std::to_string(ranks_)};
      return false;
    }
  }
  for (int peer = 0; peer < ranks_; ++peer) {
    processes_.push_back(std::make_unique<Process>(board_->member(peer).pid.load()));
  }
  Board::withdraw(board_->id());
  return true;
}

bool Communicator::shares_process(int peer) const {
  return processes_[static_cast<size_t>(peer)]->pid() == getpid();
}

uint64_t Communicator::vote(int color, int key) {
  const uint64_t split = ++splits_;
  Vote& vote = board_->member(rank_).votes[split % 2];
  vote.color = color;
  vote.key = key;
  vote.cast.store(split, std::memory_order_release);
  board_->ring();
  return split;
}

std::optional<Communicator::Part> Communicator::part(uint64_t split) {
  const auto vote = [&](int rank) -> Vote& { return board_->member(rank).votes[split % 2]; };
  for (int peer = 0; peer < ranks_; ++peer) {
    if (vote(peer).cast.load(std::memory_order_acquire) < split) return std::nullopt;
  }
  Vote& own = vote(rank_);
  if (own.color < 0) return Part();
  std::vector<int> members;
  for (int peer = 0; peer < ranks_; ++peer) {
    if (vote(peer).color == own.color) members.push_back(peer);
  }
  std::stable_sort(members.begin(), members.end(),
                   [&](int a, int b) { return vote(a).key < vote(b).key; });
  const int first = members.front();
  if (first == rank_ && own.offered.load(std::memory_order_relaxed) < split) {
    const auto id = Board::create();
    if (!id) return std::nullopt;
    own.child = *id;
    own.offered.store(split, std::memory_order_release);
    board_->ring();
  }
  if (vote(first).offered.load(std::memory_order_acquire) < split) return std::nullopt;
  const auto place = std::find(members.begin(), members.end(), rank_) - members.begin();
  return Part{vote(first).child, static_cast<int>(place), static_cast<int>(members.size())};
}

Failure Communicator::wait(const std::string& call, const std::function<bool(Failure*)>& advance,
                           const std::function<std::set<int>()>& missing) {
  const auto until = Clock::now() + std::chrono::duration<double>(deadline_seconds());
  while (true) {
    const uint32_t bell = board_->bell();
    // Looked at first: what a process did before it ended, `advance` sees.
    std::set<int> ended;
    for (int peer = 0; peer < ranks_; ++peer) {
      if (processes_[static_cast<size_t>(peer)]->ended()) ended.insert(peer);
    }
    const bool late = Clock::now() > until;
    Failure failure;
    if (advance(&failure)) return {};
    if (failure.code != ncclSuccess) return failure;
    if (aborted()) return {};
    bool gone = false;
    std::string names;
    for (const int peer : missing()) {
      names += (names.empty() ? "" : ", ") + std::string("rank ") + std::to_string(peer) +
               " (process " + std::to_string(processes_[static_cast<size_t>(peer)]->pid()) +
               (ended.contains(peer) ? ", which has ended)" : ")");
      gone |= ended.contains(peer);
    }
    const std::string text = call + " of rank " + std::to_string(rank_) + " of " +
                             std::to_string(ranks_) + " waited for " + names;
    if (gone) return {ncclRemoteError, text};
    if (late) {
      return {ncclRemoteError, text + " longer than ROCM_SIM_COLLECTIVE_DEADLINE=" +
                                   std::to_string(static_cast<int>(deadline_seconds())) + " s"};
    }
    board_->wait(bell);
  }
}

uint64_t Communicator::take_turn() {
  std::lock_guard lock(mutex_);
  turns_.insert(next_turn_);
  return next_turn_++;
}

void Communicator::await_turn(uint64_t turn) {
  std::unique_lock lock(mutex_);
  left_.wait(lock, [&] { return *turns_.begin() == turn || aborted(); });
}

void Communicator::leave_turn(uint64_t turn) {
  std::lock_guard lock(mutex_);
  turns_.erase(turn);
  left_.notify_all();
}

void Communicator::abort() {
  {
    std::lock_guard lock(mutex_);
    aborted_.store(true, std::memory_order_release);
    left_.notify_all();
  }
  board_->ring();
}

void Communicator::fail(ncclResult_t code) {
  ncclResult_t none = ncclSuccess;
  error_.compare_exchange_strong(none, code);
}

}  // namespace gfx942::collectives
