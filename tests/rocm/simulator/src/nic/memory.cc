#include "memory.h"

#include <infiniband/verbs.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

namespace gfx942::nic {
namespace {

constexpr size_t kPacket = 4096;

struct Region {
  uintptr_t begin;
  size_t bytes;
  int access;
};

struct Regions {
  std::mutex mutex;
  std::map<uint32_t, Region> by_key;
  uint32_t next = 0x100;
};

Regions& regions() {
  static auto* const kRegions = new Regions();
  return *kRegions;
}

int needed(Use use) {
  switch (use) {
    case Use::kLocalRead:
      return 0;
    case Use::kLocalWrite:
      return IBV_ACCESS_LOCAL_WRITE;
    case Use::kRemoteWrite:
      return IBV_ACCESS_REMOTE_WRITE;
    case Use::kRemoteAtomic:
      return IBV_ACCESS_REMOTE_ATOMIC;
  }
  return ~0;
}

void copy_words(std::byte* to, const std::byte* from, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    if (bytes - done >= 8 && reinterpret_cast<uintptr_t>(to + done) % 8 == 0) {
      uint64_t word = 0;
      std::memcpy(&word, from + done, 8);
      __atomic_store_n(reinterpret_cast<uint64_t*>(to + done), word, __ATOMIC_RELEASE);
      done += 8;
    } else {
      __atomic_store_n(reinterpret_cast<uint8_t*>(to + done), static_cast<uint8_t>(from[done]),
                       __ATOMIC_RELEASE);
      done += 1;
    }
  }
}

}  // namespace

uint32_t add_memory(void* at, size_t bytes, int access) {
  Regions& all = regions();
  std::lock_guard lock(all.mutex);
  const uint32_t key = all.next++;
  all.by_key[key] = {reinterpret_cast<uintptr_t>(at), bytes, access};
  return key;
}

void remove_memory(uint32_t key) {
  Regions& all = regions();
  std::lock_guard lock(all.mutex);
  all.by_key.erase(key);
}

bool allows(uint32_t key, const void* at, size_t bytes, Use use) {
  Regions& all = regions();
  std::lock_guard lock(all.mutex);
  const auto found = all.by_key.find(key);
  if (found == all.by_key.end()) return false;
  const Region& region = found->second;
  const auto begin = reinterpret_cast<uintptr_t>(at);
  return begin >= region.begin && bytes <= region.bytes &&
         begin - region.begin <= region.bytes - bytes &&
         (region.access & needed(use)) == needed(use);
}

void place(void* to, const void* from, size_t bytes, Delays* delays) {
  for (size_t done = 0; done < bytes; done += kPacket) {
    if (done > 0) std::this_thread::sleep_for(std::chrono::microseconds(delays->next() / 4));
    copy_words(static_cast<std::byte*>(to) + done, static_cast<const std::byte*>(from) + done,
               std::min(kPacket, bytes - done));
  }
}

}  // namespace gfx942::nic
