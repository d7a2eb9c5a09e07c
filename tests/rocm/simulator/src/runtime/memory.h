// The table of what is alive: device memory, pinned and registered host memory, code objects.
//
// Device memory is a memfd per allocation. It has no name in any file system, so nothing is left
// behind however the process ends, and another process opens it through /proc/<pid>/fd.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "../launch.h"

namespace gfx942::runtime {

// Constants are data of code objects that kernels only read. Copies write to them: AMD's loader
// puts all segments into one piece of memory, and XLA fills a deserialised program's constants so.
enum class Owner { kDevice, kHost, kRegistered, kPeer, kCode, kConstants };

struct Block {
  Allocation allocation;
  Owner owner = Owner::kDevice;
  int device = 0;
  int fd = -1;  // of the memfd, where there is one
  uint64_t nonce = 0;
};

// What travels between processes; it fits hipIpcMemHandle_t.
struct IpcHandle {
  uint32_t magic = 0;
  int32_t pid = 0;
  int32_t fd = -1;
  int32_t device = 0;
  uint64_t bytes = 0;
  uint64_t offset = 0;
  uint64_t nonce = 0;
  uint32_t kind = 0;
};

class Memory final : public AddressSpace {
 public:
  std::optional<Allocation> find(uint64_t address) const override;
  uint64_t generation() const override { return generation_.load(std::memory_order_acquire); }

  // Null when there is no memory. `what` begins the description in error texts.
  void* allocate(uint64_t bytes, Owner owner, int device, MemoryKind kind, const std::string& what);
  // False when nothing of this owner begins at the address.
  bool release(const void* address, Owner owner);

  // Memory that somebody else maps. False when it overlaps something alive.
  bool enter(const Allocation& allocation, Owner owner, int device);
  bool remove(const void* address, Owner owner);

  std::optional<Block> block(const void* address) const;
  uint64_t used(int device) const;

  std::optional<IpcHandle> share(const void* address) const;
  // Null when the memory or its owner is gone.
  void* open(const IpcHandle& handle);
  bool close(const void* address);

  // Runs an access of the host to device memory while nothing can be released. False, without
  // running it, unless each range lies in one thing alive or, where `host_too`, in none, and may be
  // written where it is `written`.
  struct Range {
    const void* first;
    uint64_t bytes;
    bool host_too;
    bool written;
  };
  template <typename Access>
  bool access(std::initializer_list<Range> ranges, Access run) const {
    std::shared_lock lock(mutex_);
    for (const Range& range : ranges) {
      if (!covers(range)) return false;
    }
    run();
    return true;
  }

 private:
  struct Mapping {
    void* address;
    uint64_t bytes;
  };

  const Block* at(uint64_t address) const;
  bool covers(const Range& range) const;
  void insert(const Block& block);
  void retire(const Block& block);

  mutable std::shared_mutex mutex_;
  std::map<uint64_t, Block> blocks_;  // by first address
  std::map<int, uint64_t> used_;      // device memory by device
  std::deque<Mapping> retired_;
  std::atomic<uint64_t> generation_{1};
};

Memory& memory();

}  // namespace gfx942::runtime
