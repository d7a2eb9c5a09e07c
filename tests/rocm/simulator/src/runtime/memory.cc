#include "memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <mutex>

#include "settings.h"

namespace gfx942::runtime {
namespace {

constexpr uint32_t kMagic = 0x676678;
constexpr uint64_t kPage = 4096;
// Addresses of freed memory are not used again until this many more were freed: a kernel that still
// uses them is told so, and a running one that looked them up before finds pages there and no
// fault.
constexpr size_t kRetired = 256;

uint64_t mapped_bytes(uint64_t bytes) { return (bytes + kPage - 1) & ~(kPage - 1); }

std::string memfd_name(uint64_t nonce) {
  char name[32];
  std::snprintf(name, sizeof(name), "rocm-sim-%016llx", static_cast<unsigned long long>(nonce));
  return name;
}

}  // namespace

Memory& memory() {
  // Never destroyed: streams' threads may still use it while the process ends.
  static Memory* const kMemory = new Memory();
  return *kMemory;
}

const Block* Memory::at(uint64_t address) const {
  auto next = blocks_.upper_bound(address);
  if (next == blocks_.begin()) return nullptr;
  const Block& block = std::prev(next)->second;
  return address - block.allocation.first < block.allocation.bytes ? &block : nullptr;
}

std::optional<Allocation> Memory::find(uint64_t address) const {
  std::shared_lock lock(mutex_);
  const Block* block = at(address);
  return block == nullptr ? std::nullopt : std::optional(block->allocation);
}

std::optional<Block> Memory::block(const void* address) const {
  std::shared_lock lock(mutex_);
  const Block* block = at(reinterpret_cast<uint64_t>(address));
  return block == nullptr ? std::nullopt : std::optional(*block);
}

uint64_t Memory::used(int device) const {
  std::shared_lock lock(mutex_);
  const auto found = used_.find(device);
  return found == used_.end() ? 0 : found->second;
}

bool Memory::covers(const Range& range) const {
  const auto first = reinterpret_cast<uint64_t>(range.first);
  if (range.bytes == 0) return true;
  const Block* block = at(first);
  if (block == nullptr) return range.host_too && at(first + range.bytes - 1) == nullptr;
  return block->allocation.first + block->allocation.bytes - first >= range.bytes &&
         (block->allocation.writable || !range.written || block->owner == Owner::kConstants);
}

void Memory::insert(const Block& block) {
  Block& kept = blocks_[block.allocation.first] = block;
  const bool host = block.owner == Owner::kHost || block.owner == Owner::kRegistered;
  kept.allocation.device = host                          ? kHostMemory
                           : block.owner == Owner::kPeer ? kPeerMemory
                                                         : block.device;
  if (block.owner == Owner::kDevice) used_[block.device] += block.allocation.bytes;
  generation_.fetch_add(1, std::memory_order_release);
}

void* Memory::allocate(uint64_t bytes, Owner owner, int device, MemoryKind kind,
                       const std::string& what) {
  Block block;
  block.owner = owner;
  block.device = device;
  block.allocation = {0, bytes, kind, true, what + " " + std::to_string(bytes) + " bytes"};
  int flags = MAP_SHARED;
  if (owner == Owner::kDevice) {
    block.allocation.what += " on device " + std::to_string(device);
    if (used(device) + bytes > settings().memory_bytes) return nullptr;
    if (getrandom(&block.nonce, sizeof(block.nonce), 0) != sizeof(block.nonce)) return nullptr;
    block.fd = memfd_create(memfd_name(block.nonce).c_str(), MFD_CLOEXEC);
    if (block.fd < 0) return nullptr;
    if (ftruncate(block.fd, static_cast<off_t>(mapped_bytes(bytes))) != 0) {
      ::close(block.fd);
      return nullptr;
    }
  } else {
    flags |= MAP_ANONYMOUS;
  }
  void* address = mmap(nullptr, mapped_bytes(bytes), PROT_READ | PROT_WRITE, flags | MAP_NORESERVE,
                       block.fd, 0);
  if (address == MAP_FAILED) {
    if (block.fd >= 0) ::close(block.fd);
    return nullptr;
  }
  block.allocation.first = reinterpret_cast<uint64_t>(address);
  std::unique_lock lock(mutex_);
  insert(block);
  return address;
}

// Gives the memory back to the system but keeps the address for a while.
void Memory::retire(const Block& block) {
  void* address = reinterpret_cast<void*>(block.allocation.first);
  const uint64_t bytes = mapped_bytes(block.allocation.bytes);
  mmap(address, bytes, PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  if (block.fd >= 0) ::close(block.fd);
  retired_.push_back({address, bytes});
  if (retired_.size() > kRetired) {
    munmap(retired_.front().address, retired_.front().bytes);
    retired_.pop_front();
  }
}

bool Memory::release(const void* address, Owner owner) {
  std::unique_lock lock(mutex_);
  const auto found = blocks_.find(reinterpret_cast<uint64_t>(address));
  if (found == blocks_.end() || found->second.owner != owner) return false;
  const Block block = found->second;
  blocks_.erase(found);
  if (owner == Owner::kDevice) used_[block.device] -= block.allocation.bytes;
  generation_.fetch_add(1, std::memory_order_release);
  retire(block);
  return true;
}

bool Memory::enter(const Allocation& allocation, Owner owner, int device) {
  std::unique_lock lock(mutex_);
  const auto next = blocks_.lower_bound(allocation.first);
  if (at(allocation.first) != nullptr ||
      (next != blocks_.end() && next->first - allocation.first < allocation.bytes)) {
    return false;
  }
  insert({allocation, owner, device});
  return true;
}

bool Memory::remove(const void* address, Owner owner) {
  std::unique_lock lock(mutex_);
  const auto found = blocks_.find(reinterpret_cast<uint64_t>(address));
  if (found == blocks_.end() || found->second.owner != owner) return false;
  blocks_.erase(found);
  generation_.fetch_add(1, std::memory_order_release);
  return true;
}

std::optional<IpcHandle> Memory::share(const void* address) const {
  const auto found = block(address);
  if (!found || found->owner != Owner::kDevice) return std::nullopt;
  IpcHandle handle;
  handle.magic = kMagic;
  handle.pid = getpid();
  handle.fd = found->fd;
  handle.device = found->device;
  handle.bytes = found->allocation.bytes;
  handle.offset = reinterpret_cast<uint64_t>(address) - found->allocation.first;
  handle.nonce = found->nonce;
  handle.kind = static_cast<uint32_t>(found->allocation.kind);
  return handle;
}

void* Memory::open(const IpcHandle& handle) {
  if (handle.magic != kMagic || handle.offset >= handle.bytes) return nullptr;
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", handle.pid, handle.fd);
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return nullptr;
  // The number may be another file's by now: the name holds a nonce.
  std::snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
  char name[64] = {};
  struct stat info{};
  void* mapped = MAP_FAILED;
  if (readlink(path, name, sizeof(name) - 1) > 0 && fstat(fd, &info) == 0 &&
      std::string(name).starts_with("/memfd:" + memfd_name(handle.nonce)) &&
      static_cast<uint64_t>(info.st_size) == mapped_bytes(handle.bytes)) {
    mapped = mmap(nullptr, mapped_bytes(handle.bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  ::close(fd);
  if (mapped == MAP_FAILED) return nullptr;
  Block block;
  block.owner = Owner::kPeer;
  block.device = handle.device;
  block.allocation = {
      reinterpret_cast<uint64_t>(mapped), handle.bytes, static_cast<MemoryKind>(handle.kind), true,
      "memory of process " + std::to_string(handle.pid) + ", " + std::to_string(handle.bytes) +
          " bytes on device " + std::to_string(handle.device)};
  std::unique_lock lock(mutex_);
  insert(block);
  return static_cast<std::byte*>(mapped) + handle.offset;
}

bool Memory::close(const void* address) {
  const auto found = block(address);
  return found && found->owner == Owner::kPeer &&
         release(reinterpret_cast<const void*>(found->allocation.first), Owner::kPeer);
}

}  // namespace gfx942::runtime
