// What the ranks of a communicator share: a page where each says that it is there, and a mailbox
// from each rank to each other. Data does not pass through it: a post says where in device memory
// the data lies.
//
// It is a memfd like device memory, so that nothing is left behind however a process ends.
#pragma once

#include <hip/hip_runtime_api.h>
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>

namespace gfx942::collectives {

constexpr int kMaxRanks = 64;

// By which other processes find a board; it fits ncclUniqueId.
struct BoardId {
  uint32_t magic = 0;
  int32_t pid = 0;
  int32_t fd = -1;
  uint64_t nonce = 0;
};

// What two ranks must agree on.
struct Call {
  uint32_t kind = 0;
  uint32_t type = 0;
  uint32_t reduction = 0;
  int32_t root = 0;
  uint64_t count = 0;
  bool operator==(const Call&) const = default;
};

struct Post {
  Call call;
  uint64_t address = 0;  // in the sender's process
  hipIpcMemHandle_t handle = {};
};

// Posts from one rank to another, taken in the order in which they were posted.
struct Mailbox {
  static constexpr uint64_t kDepth = 8;
  std::atomic<uint64_t> posted;
  std::atomic<uint64_t> taken;
  Post posts[kDepth];
};

// A rank's part in splitting the communicator. Two of them alternate: a rank that casts its next
// but one vote knows that all have read this one, for all have cast the one between.
struct Vote {
  int32_t color = 0;
  int32_t key = 0;
  BoardId child;  // made by the first rank of a color
  std::atomic<uint64_t> cast;
  std::atomic<uint64_t> offered;
};

struct Member {
  std::atomic<int32_t> pid;  // 0 until the rank has joined
  int32_t ranks = 0;         // of the communicator, as this one was told
  Vote votes[2];
};

class Board {
 public:
  // Makes a board and keeps it open until withdraw().
  static std::optional<BoardId> create();
  // Null when it is no board, or the process that made it has ended. Ranks of one process share
  // one.
  static std::shared_ptr<Board> open(const BoardId& id);
  // Called when all ranks have joined: nobody opens it any more.
  static void withdraw(const BoardId& id);

  Board(void* mapped, const BoardId& id) : shared_(static_cast<Shared*>(mapped)), id_(id) {}
  ~Board();
  Board(const Board&) = delete;
  Board& operator=(const Board&) = delete;

  const BoardId& id() const { return id_; }
  Member& member(int rank) { return shared_->members[rank]; }
  Mailbox& mailbox(int from, int to) { return shared_->mailboxes[from][to]; }

  // A number that changes with every ring(): look at it, then at the board, then wait for the next.
  uint32_t bell() const { return shared_->bell.load(std::memory_order_acquire); }
  void ring();
  // Until the bell's number is another one, or for a short while.
  void wait(uint32_t bell) const;

 private:
  struct Shared {
    std::atomic<uint32_t> bell;
    Member members[kMaxRanks];
    Mailbox mailboxes[kMaxRanks][kMaxRanks];
  };

  Shared* const shared_;
  const BoardId id_;
};

// Tells whether a process has ended, whatever has its number by now.
class Process {
 public:
  explicit Process(pid_t pid);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  bool ended() const;

 private:
  const pid_t pid_;
  const int fd_;
};

}  // namespace gfx942::collectives
