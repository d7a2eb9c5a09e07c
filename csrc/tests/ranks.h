// Ranks for the tests: as threads of this process, or as forked processes that find each other's
// arenas through their addresses, as the processes of a job do.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/group.h"

namespace moriep {

inline constexpr std::chrono::duration<double> kPatience{20.0};

inline std::future<Status> start(LocalRank& rank, LocalRank::Op op) {
  auto promise = std::make_shared<std::promise<Status>>();
  std::future<Status> future = promise->get_future();
  rank.submit(std::move(op), [promise](const Status& status) { promise->set_value(status); });
  return future;
}

// A group whose ranks are all threads of this process.
inline std::unique_ptr<Group> make_threads(int32_t num_ranks,
                                           std::chrono::duration<double> timeout = kPatience) {
  auto group = std::make_unique<Group>(num_ranks, timeout);
  for (int32_t rank = 0; rank < num_ranks; ++rank) CHECK_OK(group->add_local(rank));
  return group;
}

// Runs op(rank) on every rank's thread at once and gives the results in the order of the ranks.
template <typename Op>
std::vector<Status> run_threads(Group& group, const Op& op) {
  std::vector<std::future<Status>> futures;
  for (int32_t rank = 0; rank < group.num_ranks(); ++rank) {
    LocalRank& me = *group.local(rank);
    futures.push_back(start(me, [&op, &me] { return op(me); }));
  }
  std::vector<Status> results;
  for (auto& future : futures) results.push_back(future.get());
  return results;
}

// What forked processes share beside their arenas: a place to announce addresses, a barrier and
// notes.
struct Meeting {
  static constexpr int kMaxRanks = 16;
  ArenaAddress addresses[kMaxRanks];
  std::atomic<int> announced[kMaxRanks];
  std::atomic<int64_t> arrivals;
  std::atomic<int64_t> notes[kMaxRanks];
  char texts[kMaxRanks][2048];

  static Meeting* make() {
    void* memory =
        mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return new (memory) Meeting();
  }

  // Waits until `num` processes have arrived as often as this one.
  void barrier(int num) {
    const int64_t round = arrivals.fetch_add(1) / num;
    while (arrivals.load() < (round + 1) * num) std::this_thread::yield();
  }

  void write(int who, const std::string& text) { copy_text(text, texts[who], sizeof(texts[who])); }
};

// Opens a group of which ranks [first, first + count) are this process's and connects it to the
// others.
inline std::unique_ptr<Group> join_group(Meeting& meeting, int32_t num_ranks, int32_t first,
                                         int32_t count,
                                         std::chrono::duration<double> timeout = kPatience) {
  auto group = std::make_unique<Group>(num_ranks, timeout);
  for (int32_t rank = first; rank < first + count; ++rank) {
    CHECK_OK(group->add_local(rank));
    meeting.addresses[rank] = group->local(rank)->arena().address();
    meeting.announced[rank].store(1);
  }
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    if (!group->is_remote(rank)) continue;
    while (meeting.announced[rank].load() == 0) std::this_thread::yield();
    CHECK_OK(group->connect(rank, meeting.addresses[rank]));
  }
  return group;
}

// Child processes, each running body(its number). None outlives its parent or the parent's
// deadline.
class Processes {
 public:
  Processes(int count, unsigned seconds, const std::function<void(int)>& body) {
    for (int i = 0; i < count; ++i) {
      const pid_t pid = fork();
      CHECK(pid >= 0);
      if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        check::set_deadline(seconds);
        body(i);
        _exit(0);
      }
      pids_.push_back(pid);
    }
  }

  ~Processes() {
    for (size_t i = 0; i < pids_.size(); ++i) {
      if (pids_[i] == 0) continue;
      signal(static_cast<int>(i), SIGCONT);
      signal(static_cast<int>(i), SIGKILL);
      wait(static_cast<int>(i));
    }
  }

  Processes(const Processes&) = delete;
  Processes& operator=(const Processes&) = delete;

  pid_t pid(int i) const { return pids_[static_cast<size_t>(i)]; }
  void signal(int i, int number) { CHECK_EQ(kill(pid(i), number), 0); }

  // Waits for a process; gives its exit code, or minus the signal that ended it.
  int wait(int i) {
    int status = 0;
    CHECK_EQ(waitpid(pid(i), &status, 0), pid(i));
    pids_[static_cast<size_t>(i)] = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

  void expect_success() {
    for (size_t i = 0; i < pids_.size(); ++i) {
      if (pids_[i] != 0) CHECK_EQ(wait(static_cast<int>(i)), 0);
    }
  }

 private:
  std::vector<pid_t> pids_;
};

}  // namespace moriep
