// One rank's shared memory. It is a memfd: it has no name in any file system, so nothing is left
// behind however its owner ends, and it is not limited by the size of /dev/shm. Peers of the same
// user open it through /proc/<pid>/fd and check its mode, size, seals and a random nonce before
// they use it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moriep/layout.h"
#include "moriep/status.h"

namespace moriep {

// What a peer must know to open an arena; it travels as text through the key-value store.
struct ArenaAddress {
  int64_t pid = 0;
  int64_t start_time = 0;  // of the process, in clock ticks since boot: tells a reused pid apart
  int64_t fd = -1;
  uint64_t nonce[2] = {0, 0};
};

class Arena {
 public:
  static Status create(int32_t rank, int32_t num_ranks, std::unique_ptr<Arena>* out);
  static Status open(const ArenaAddress& address, int32_t rank, int32_t num_ranks,
                     std::unique_ptr<Arena>* out);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Control& control() const { return *control_; }
  const ArenaAddress& address() const { return address_; }

  // Maps the first `bytes` of a step's half, or gives the mapping that is already there. Pages take
  // memory only once they are written. A mapping stays valid until the arena is gone.
  Status half(uint32_t step, int64_t bytes, std::byte** out);

 private:
  struct Mapping {
    std::byte* data = nullptr;
    int64_t bytes = 0;
  };

  Arena() = default;
  Status map_control();

  int fd_ = -1;
  ArenaAddress address_;
  Control* control_ = nullptr;
  std::mutex mutex_;  // ranks of one process share a mapping of the same arena
  Mapping current_[kNumHalves];
  std::vector<Mapping> outgrown_;
};

// Start time of a process in clock ticks since boot; 0 when it is gone or a zombie, -1 when that
// cannot be told, for want of file descriptors for instance.
int64_t process_start_time(int64_t pid);

// Whether the process that made an arena has certainly ended.
bool has_ended(const ArenaAddress& address);

}  // namespace moriep
