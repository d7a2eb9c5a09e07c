#include "arena.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace moriep {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr int64_t kMapGranule = int64_t{1} << 21;

Status system_error(const std::string& what) {
  return Status(Code::kInternal, what + ": " + std::strerror(errno));
}

std::byte* map(int fd, int64_t offset, int64_t bytes) {
  void* data =
      mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, offset);
  return data == MAP_FAILED ? nullptr : static_cast<std::byte*>(data);
}

}  // namespace

int64_t process_start_time(int64_t pid) {
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%lld/stat", static_cast<long long>(pid));
  std::FILE* file = std::fopen(path, "re");
  if (file == nullptr) return errno == ENOENT || errno == ESRCH ? 0 : -1;
  char text[1024];
  const size_t size = std::fread(text, 1, sizeof(text) - 1, file);
  std::fclose(file);
  text[size] = '\0';
  // The command name may hold spaces and parentheses; the fields start after its last parenthesis.
  const char* after = std::strrchr(text, ')');
  char state = 0;
  long long start = 0;
  if (after == nullptr ||
      std::sscanf(
          after + 1,
          " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %lld",
          &state, &start) != 2) {
    return 0;
  }
  return state == 'Z' || state == 'X' ? 0 : start;
}

bool has_ended(const ArenaAddress& address) {
  const int64_t start = process_start_time(address.pid);
  return start >= 0 && start != address.start_time;
}

Status Arena::create(int32_t rank, int32_t num_ranks, std::unique_ptr<Arena>* out) {
  std::unique_ptr<Arena> arena(new Arena());
  arena->fd_ = memfd_create("moriep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (arena->fd_ < 0) return system_error("memfd_create");
  if (fchmod(arena->fd_, 0600) != 0) return system_error("fchmod of the arena");
  if (ftruncate(arena->fd_, kArenaBytes) != 0) return system_error("ftruncate of the arena");
  if (fcntl(arena->fd_, F_ADD_SEALS, kSeals) != 0) return system_error("sealing the arena");
  arena->address_.pid = getpid();
  arena->address_.start_time = process_start_time(getpid());
  arena->address_.fd = arena->fd_;
  if (getrandom(arena->address_.nonce, sizeof(arena->address_.nonce), 0) !=
      static_cast<ssize_t>(sizeof(arena->address_.nonce))) {
    return system_error("getrandom");
  }
  if (Status status = arena->map_control(); !status.ok()) return status;
  Control& control = arena->control();
  control.magic = kArenaMagic;
  control.version = kArenaVersion;
  control.rank = rank;
  control.num_ranks = num_ranks;
  std::memcpy(control.nonce, arena->address_.nonce, sizeof(control.nonce));
  *out = std::move(arena);
  return Status();
}

Status Arena::open(const ArenaAddress& address, int32_t rank, int32_t num_ranks,
                   std::unique_ptr<Arena>* out) {
  const std::string who =
      "rank " + std::to_string(rank) + " (process " + std::to_string(address.pid) + ")";
  if (address.start_time == 0 || process_start_time(address.pid) != address.start_time) {
    return Status(Code::kUnavailable,
                  who + " has ended, or runs on another machine or in another PID namespace");
  }
  char path[64];
  std::snprintf(path, sizeof(path), "/proc/%lld/fd/%lld", static_cast<long long>(address.pid),
                static_cast<long long>(address.fd));
  std::unique_ptr<Arena> arena(new Arena());
  arena->address_ = address;
  arena->fd_ = ::open(path, O_RDWR | O_CLOEXEC);
  if (arena->fd_ < 0) return system_error("opening the arena of " + who);
  struct stat info;
  if (fstat(arena->fd_, &info) != 0) return system_error("fstat of the arena of " + who);
  const int seals = fcntl(arena->fd_, F_GET_SEALS);
  if (!S_ISREG(info.st_mode) || info.st_size != kArenaBytes || info.st_uid != geteuid() ||
      (info.st_mode & 0777) != 0600 || seals < 0 || (seals & kSeals) != kSeals) {
    return Status(Code::kFailedPrecondition,
                  "the arena of " + who + " has another size, owner, mode or seals");
  }
  if (Status status = arena->map_control(); !status.ok()) return status;
  const Control& control = arena->control();
  if (control.magic != kArenaMagic || control.version != kArenaVersion || control.rank != rank ||
      control.num_ranks != num_ranks ||
      std::memcmp(control.nonce, address.nonce, sizeof(control.nonce)) != 0) {
    return Status(Code::kFailedPrecondition,
                  "the arena of " + who +
                      " is not the one announced; do all ranks run one version of jax_moriep?");
  }
  *out = std::move(arena);
  return Status();
}

Status Arena::map_control() {
  control_ = reinterpret_cast<Control*>(map(fd_, 0, kControlBytes));
  return control_ == nullptr ? system_error("mapping an arena") : Status();
}

Status Arena::half(uint32_t step, int64_t bytes, std::byte** out) {
  if (bytes > kHalfStride) {
    return Status(Code::kInvalidArgument, "a step needs " + std::to_string(bytes) +
                                              " bytes of arena, more than " +
                                              std::to_string(kHalfStride));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  Mapping& mapping = current_[step % kNumHalves];
  if (mapping.bytes < bytes) {
    // Doubling bounds the number of mappings that a growing size leaves behind.
    const auto rounded =
        static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max(bytes, kMapGranule))));
    std::byte* data = map(fd_, half_offset(step), rounded);
    if (data == nullptr) return system_error("mapping a half of an arena");
    // Another rank of this process may still use the smaller mapping.
    if (mapping.data != nullptr) outgrown_.push_back(mapping);
    mapping = {data, rounded};
  }
  *out = mapping.data;
  return Status();
}

Arena::~Arena() {
  for (const Mapping& mapping : current_) {
    if (mapping.data != nullptr) munmap(mapping.data, static_cast<size_t>(mapping.bytes));
  }
  for (const Mapping& mapping : outgrown_) munmap(mapping.data, static_cast<size_t>(mapping.bytes));
  if (control_ != nullptr) munmap(control_, kControlBytes);
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace moriep
