#include "board.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <map>
#include <mutex>
#include <string>

namespace gfx942::collectives {
namespace {

constexpr uint32_t kMagic = 0x676379;
// Nobody rings for a process that was killed, so that a waiting rank looks by itself.
constexpr timespec kLook = {0, 20'000'000};

struct Boards {
  std::mutex mutex;
  std::map<uint64_t, int> offered;                  // file descriptors of what this process made
  std::map<uint64_t, std::weak_ptr<Board>> opened;  // by nonce
};

// Never destroyed: streams' threads may still use it while the process ends.
Boards& boards() {
  static auto* const kBoards = new Boards();
  return *kBoards;
}

std::string memfd_name(uint64_t nonce) {
  char name[40];
  std::snprintf(name, sizeof(name), "rocm-sim-board-%016llx",
                static_cast<unsigned long long>(nonce));
  return name;
}

// A file descriptor of the board, which the process that made it has open; -1 when it has not.
int reach(const BoardId& id) {
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", id.pid, id.fd);
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return -1;
  // The number may be another file's by now: the name holds a nonce.
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
  char name[80] = {};
  if (readlink(path, name, sizeof(name) - 1) > 0 &&
      std::string(name).starts_with("/memfd:" + memfd_name(id.nonce))) {
    return fd;
  }
  ::close(fd);
  return -1;
}

}  // namespace

std::optional<BoardId> Board::create() {
  BoardId id;
  id.magic = kMagic;
  id.pid = getpid();
  if (getrandom(&id.nonce, sizeof(id.nonce), 0) != sizeof(id.nonce)) return std::nullopt;
  id.fd = memfd_create(memfd_name(id.nonce).c_str(), MFD_CLOEXEC);
  if (id.fd < 0) return std::nullopt;
  // New pages are zeros, which is what an empty board is made of.
  if (ftruncate(id.fd, sizeof(Shared)) != 0) {
    ::close(id.fd);
    return std::nullopt;
  }
  std::lock_guard lock(boards().mutex);
  boards().offered[id.nonce] = id.fd;
  return id;
}

std::shared_ptr<Board> Board::open(const BoardId& id) {
  if (id.magic != kMagic) return nullptr;
  std::lock_guard lock(boards().mutex);
  auto& opened = boards().opened[id.nonce];
  if (auto board = opened.lock()) return board;
  const int fd = reach(id);
  if (fd < 0) return nullptr;
  void* mapped = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (mapped == MAP_FAILED) return nullptr;
  auto board = std::make_shared<Board>(mapped, id);
  opened = board;
  return board;
}

void Board::withdraw(const BoardId& id) {
  std::lock_guard lock(boards().mutex);
  const auto offered = boards().offered.extract(id.nonce);
  if (!offered.empty()) ::close(offered.mapped());
}

Board::~Board() {
  munmap(shared_, sizeof(Shared));
  std::lock_guard lock(boards().mutex);
  const auto opened = boards().opened.find(id_.nonce);
  if (opened != boards().opened.end() && opened->second.expired()) boards().opened.erase(opened);
}

void Board::ring() {
  shared_->bell.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &shared_->bell, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

void Board::wait(uint32_t bell) const {
  syscall(SYS_futex, &shared_->bell, FUTEX_WAIT, bell, &kLook, nullptr, 0);
}

Process::Process(pid_t pid) : pid_(pid), fd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {}

Process::~Process() {
  if (fd_ >= 0) ::close(fd_);
}

bool Process::ended() const {
  if (fd_ < 0) return true;
  pollfd poll = {fd_, POLLIN, 0};
  return ::poll(&poll, 1, 0) > 0;
}

}  // namespace gfx942::collectives
