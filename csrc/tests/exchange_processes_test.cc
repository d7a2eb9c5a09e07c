// The same exchanges between forked processes, which share nothing but what the arenas' addresses
// lead to.
#include "check.h"
#include "exercise.h"
#include "ranks.h"

namespace moriep {
namespace {

constexpr RowType kTypes[] = {RowType::kF32, RowType::kBF16, RowType::kF16, RowType::kU8};

// Runs `steps` cases on the ranks of this process, all of them at once and without waiting for each
// other.
void run_cases(Group& group, int32_t first, int32_t count, uint64_t steps) {
  const int64_t num_ranks = group.num_ranks();
  std::vector<std::future<Status>> futures;
  for (int32_t rank = first; rank < first + count; ++rank) {
    LocalRank& me = *group.local(rank);
    futures.push_back(start(me, [&me, num_ranks, steps] {
      for (uint64_t step = 0; step < steps; ++step) {
        const auto number = static_cast<int64_t>(step);
        const Case test{
            .shape = shape_of(num_ranks, pick(1, number, 0, 0, 9), 1 + pick(2, number, 0, 0, 4),
                              pick(3, number, 0, 0, 50), 10, 4),
            .type = kTypes[step % 4],
            .routing = step % 5 == 4 ? Routing::kInvalid : Routing::kUniform,
            .with_scalars = step % 2 == 0,
            .seed = step};
        const Oracle want(test);
        if (Status status = Exercise(me, test, want, static_cast<int32_t>(step)).run();
            !status.ok())
          return status;
      }
      return Status();
    }));
  }
  for (auto& future : futures) CHECK_OK(future.get());
}

TEST(one_rank_per_process, 40) {
  for (int num_ranks : {2, 3, 5, 8}) {
    Meeting* meeting = Meeting::make();
    Processes processes(num_ranks, 40, [&](int rank) {
      const auto group = join_group(*meeting, num_ranks, rank, 1);
      run_cases(*group, rank, 1, 40);
      meeting->barrier(num_ranks);
    });
    processes.expect_success();
  }
}

TEST(several_ranks_per_process, 40) {
  Meeting* meeting = Meeting::make();
  Processes processes(2, 40, [&](int process) {
    const auto group = join_group(*meeting, 6, process * 3, 3);
    run_cases(*group, process * 3, 3, 60);
    meeting->barrier(2);
  });
  processes.expect_success();
}

// Two groups of two processes each, crossed as the axes of a mesh are: every process is in both.
TEST(a_process_in_two_groups, 40) {
  Meeting* meetings[] = {Meeting::make(), Meeting::make()};
  Processes processes(2, 40, [&](int process) {
    const auto first = join_group(*meetings[0], 2, process, 1);
    const auto second = join_group(*meetings[1], 4, process * 2, 2);
    std::thread other([&] { run_cases(*second, process * 2, 2, 50); });
    run_cases(*first, process, 1, 50);
    other.join();
    meetings[0]->barrier(2);
  });
  processes.expect_success();
}

// A rank may go as soon as its own last step has ended: its peers have its data, dead or alive.
TEST(a_rank_leaves_after_its_last_step, 60) {
  const int rounds = kSanitized ? 100 : 1000;
  for (int round = 0; round < rounds; ++round) {
    Meeting* meeting = Meeting::make();
    Processes processes(2, 20, [&](int rank) {
      const auto group = join_group(*meeting, 2, rank, 1);
      run_cases(*group, rank, 1, 2);
      if (round % 2 == rank) kill(getpid(), SIGKILL);
    });
    for (int rank = 0; rank < 2; ++rank)
      CHECK_EQ(processes.wait(rank), round % 2 == rank ? -SIGKILL : 0);
    CHECK_EQ(munmap(meeting, sizeof(Meeting)), 0);
  }
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
