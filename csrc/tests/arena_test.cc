// Arenas: private, of a fixed size, opened only by who knows the right address, and gone without a
// trace.
#include "cpu/arena.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <fstream>
#include <set>

#include "check.h"
#include "ranks.h"

namespace moriep {
namespace {

std::unique_ptr<Arena> make_arena(int32_t rank = 0, int32_t num_ranks = 2) {
  std::unique_ptr<Arena> arena;
  CHECK_OK(Arena::create(rank, num_ranks, &arena));
  return arena;
}

std::set<std::string> names_in(const std::string& folder) {
  std::set<std::string> names;
  DIR* stream = opendir(folder.c_str());
  if (stream == nullptr) return names;
  const int own = dirfd(stream);
  while (const dirent* entry = readdir(stream)) {
    if (entry->d_name != std::to_string(own)) names.insert(entry->d_name);
  }
  closedir(stream);
  return names;
}

int64_t lines_with(const std::string& path, const std::string& part) {
  std::ifstream file(path);
  int64_t found = 0;
  for (std::string line; std::getline(file, line);)
    found += line.find(part) != std::string::npos ? 1 : 0;
  return found;
}

Status open_status(const ArenaAddress& address, int32_t rank = 0, int32_t num_ranks = 2) {
  std::unique_ptr<Arena> arena;
  const Status status = Arena::open(address, rank, num_ranks, &arena);
  CHECK_EQ(status.ok(), arena != nullptr);
  return status;
}

TEST(an_arena_is_private_and_sealed, 10) {
  const auto arena = make_arena();
  const int fd = static_cast<int>(arena->address().fd);
  struct stat info;
  CHECK_EQ(fstat(fd, &info), 0);
  CHECK_EQ(info.st_mode & 0777, 0600u);
  CHECK_EQ(info.st_size, kArenaBytes);
  CHECK_EQ(info.st_uid, geteuid());
  CHECK_EQ(fcntl(fd, F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  CHECK_EQ(ftruncate(fd, 4096), -1);
  CHECK_EQ(ftruncate(fd, kArenaBytes + 4096), -1);
  CHECK_EQ(fcntl(fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  const auto other = make_arena();
  CHECK(other->address().nonce[0] != arena->address().nonce[0]);
  CHECK(other->address().nonce[1] != arena->address().nonce[1]);
}

TEST(a_fresh_arena_takes_no_memory, 10) {
  const auto arena = make_arena();
  struct stat info;
  CHECK_EQ(fstat(static_cast<int>(arena->address().fd), &info), 0);
  CHECK(info.st_blocks * 512 <= kControlBytes);
  std::byte* data = nullptr;
  CHECK_OK(arena->half(0, int64_t{1} << 34, &data));
  data[(int64_t{1} << 34) - 1] = std::byte{1};
  CHECK_EQ(fstat(static_cast<int>(arena->address().fd), &info), 0);
  CHECK(info.st_blocks * 512 <= int64_t{4} << 20);
}

TEST(an_opened_arena_is_the_same_memory, 10) {
  const auto arena = make_arena();
  std::unique_ptr<Arena> opened;
  CHECK_OK(Arena::open(arena->address(), 0, 2, &opened));
  CHECK(&opened->control() != &arena->control());
  arena->control().posted.store(41);
  CHECK_EQ(opened->control().posted.load(), 41u);
  for (uint32_t half = 0; half < kNumHalves; ++half) {
    std::byte *ours = nullptr, *theirs = nullptr;
    CHECK_OK(arena->half(half, 1, &ours));
    CHECK_OK(opened->half(half, 1, &theirs));
    ours[0] = std::byte{static_cast<unsigned char>(half + 5)};
    CHECK_EQ(static_cast<int>(theirs[0]), static_cast<int>(half + 5));
  }
}

TEST(a_wrong_address_is_refused, 10) {
  const auto arena = make_arena();
  const ArenaAddress right = arena->address();
  CHECK_OK(open_status(right));

  ArenaAddress wrong = right;
  wrong.nonce[1] ^= 1;
  CHECK_EQ(open_status(wrong).code(), Code::kFailedPrecondition);
  CHECK_CONTAINS(open_status(wrong).text(), "is not the one announced");
  CHECK_EQ(open_status(right, 1).code(), Code::kFailedPrecondition);
  CHECK_EQ(open_status(right, 0, 3).code(), Code::kFailedPrecondition);
  arena->control().version += 1;
  CHECK_EQ(open_status(right).code(), Code::kFailedPrecondition);
  arena->control().version -= 1;

  for (int64_t start_time : {int64_t{0}, right.start_time + 1}) {
    wrong = right;
    wrong.start_time = start_time;
    CHECK_EQ(open_status(wrong).code(), Code::kUnavailable);
    CHECK_CONTAINS(open_status(wrong).text(),
                   "rank 0 (process " + std::to_string(getpid()) + ") has ended");
  }

  wrong = right;
  wrong.fd = 999;
  CHECK_CONTAINS(open_status(wrong).text(), "No such file");
  CHECK_OK(open_status(right));
}

TEST(a_process_that_has_ended_is_refused, 10) {
  Meeting* meeting = Meeting::make();
  Processes processes(1, 10, [&](int) {
    const auto arena = make_arena();
    meeting->addresses[0] = arena->address();
    meeting->barrier(2);
    meeting->barrier(2);
  });
  meeting->barrier(2);
  const ArenaAddress address = meeting->addresses[0];
  CHECK_OK(open_status(address));
  CHECK(!has_ended(address));
  meeting->barrier(2);
  // A zombie has ended too, though its pid is still taken.
  while (!has_ended(address)) std::this_thread::yield();
  CHECK_EQ(process_start_time(address.pid), 0);
  CHECK_EQ(open_status(address).code(), Code::kUnavailable);
  processes.expect_success();
  CHECK_EQ(process_start_time(address.pid), 0);
  CHECK(has_ended(address));
}

// A file with the announced nonce in it, but whose size its owner could still change, or did.
TEST(a_file_that_could_shrink_is_refused, 10) {
  const auto arena = make_arena();
  const auto copy_control = [&](int fd, int64_t size) {
    CHECK_EQ(fchmod(fd, 0600), 0);
    if (ftruncate(fd, size) != 0) return false;  // the file system has no files of this size
    CHECK_EQ(pwrite(fd, &arena->control(), sizeof(Control), 0),
             static_cast<ssize_t>(sizeof(Control)));
    return true;
  };
  ArenaAddress address = arena->address();
  const auto expect_refused = [&](int fd) {
    address.fd = fd;
    CHECK_EQ(open_status(address).code(), Code::kFailedPrecondition);
    CHECK_CONTAINS(open_status(address).text(), "has another size, owner, mode or seals");
    close(fd);
  };

  int fd = memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(copy_control(fd, kArenaBytes));
  expect_refused(fd);

  fd = memfd_create("small", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(copy_control(fd, kControlBytes));
  CHECK_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
  expect_refused(fd);

  fd = memfd_create("readable by others", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(copy_control(fd, kArenaBytes));
  CHECK_EQ(fchmod(fd, 0644), 0);
  CHECK_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL), 0);
  expect_refused(fd);

  // An ordinary file has no seals to ask for at all.
  fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0 && copy_control(fd, kArenaBytes)) expect_refused(fd);
}

TEST(nothing_is_left_after_close, 20) {
  const auto files = names_in("/proc/self/fd");
  const auto shared = names_in("/dev/shm");
  {
    const auto arena = make_arena();
    std::unique_ptr<Arena> opened;
    CHECK_OK(Arena::open(arena->address(), 0, 2, &opened));
    std::byte* data = nullptr;
    for (int64_t bytes = 1; bytes < int64_t{1} << 25; bytes *= 3)
      CHECK_OK(opened->half(1, bytes, &data));
    data[0] = std::byte{1};
    CHECK_EQ(names_in("/proc/self/fd").size(), files.size() + 2);
    CHECK(names_in("/dev/shm") == shared);
    CHECK(lines_with("/proc/self/maps", "memfd:moriep") > 2);
  }
  CHECK(names_in("/proc/self/fd") == files);
  CHECK(names_in("/dev/shm") == shared);
  CHECK_EQ(lines_with("/proc/self/maps", "memfd:moriep"), 0);
}

TEST(a_half_grows_without_moving_what_others_use, 20) {
  const auto arena = make_arena();
  std::byte *first = nullptr, *grown = nullptr, *again = nullptr;
  CHECK_OK(arena->half(3, 100, &first));
  CHECK_OK(arena->half(5, 100, &again));
  CHECK(first == again);
  first[99] = std::byte{7};
  CHECK_OK(arena->half(3, int64_t{3} << 20, &grown));
  CHECK_EQ(static_cast<int>(grown[99]), 7);
  first[99] = std::byte{8};  // the old mapping is still there, and of the same memory
  CHECK_EQ(static_cast<int>(grown[99]), 8);
  CHECK_OK(arena->half(3, 1, &again));
  CHECK(again == grown);
  CHECK_OK(arena->half(2, 1, &again));
  CHECK(again != grown);

  // A size that creeps up must not leave a mapping behind each time.
  for (int64_t bytes = 0; bytes < int64_t{1} << 28; bytes += int64_t{1} << 20)
    CHECK_OK(arena->half(2, bytes, &again));
  CHECK(lines_with("/proc/self/maps", "memfd:moriep") < 20);
}

TEST(a_half_has_a_largest_size, 10) {
  const auto arena = make_arena();
  std::byte* data = nullptr;
  CHECK_EQ(arena->half(0, kHalfStride + 1, &data).code(), Code::kInvalidArgument);
  CHECK_CONTAINS(arena->half(0, INT64_MAX, &data).text(), std::to_string(kHalfStride));
}

// Without file descriptors /proc cannot be read. A peer must not be called dead for that.
TEST(a_process_is_not_dead_because_descriptors_are_short, 10) {
  const auto arena = make_arena();
  rlimit old;
  CHECK_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
  const rlimit none{0, old.rlim_max};
  CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const int64_t start_time = process_start_time(getppid());
  const bool ended = has_ended(arena->address());
  CHECK_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
  CHECK_EQ(start_time, -1);
  CHECK(!ended);
}

TEST(start_times_are_those_of_the_kernel, 10) {
  const int64_t mine = process_start_time(getpid());
  CHECK(mine > 0);
  CHECK_EQ(mine, process_start_time(getpid()));
  CHECK_EQ(process_start_time(int64_t{1} << 40), 0);
  // A name full of what separates the fields must not shift them.
  const std::string strange = ") R 1 1 (";
  CHECK_EQ(prctl(PR_SET_NAME, strange.c_str()), 0);
  CHECK_EQ(process_start_time(getpid()), mine);
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
