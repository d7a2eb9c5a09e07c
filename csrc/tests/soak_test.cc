// Many small steps that nothing but the protocol holds together: threads and processes run freely
// for a while.
#include "check.h"
#include "exercise.h"
#include "ranks.h"

namespace moriep {
namespace {

constexpr std::chrono::milliseconds kSoak{kSanitized ? 2500 : 1500};

// The cases that all ranks go through in turn, made once: the steps shall be busy with each other.
struct Cases {
  std::vector<Case> cases;
  std::vector<Oracle> oracles;

  explicit Cases(int64_t num_ranks) {
    for (int64_t i = 0; i < 7; ++i) {
      cases.push_back({.shape = shape_of(num_ranks, pick(1, i, 0, 0, 5), 1 + pick(2, i, 0, 0, 3),
                                         1 + pick(3, i, 0, 0, 20), 6, 2),
                       .type = i % 3 == 0 ? RowType::kBF16 : RowType::kF32,
                       .routing = i == 5 ? Routing::kInvalid : Routing::kUniform,
                       .with_scalars = i % 2 == 0,
                       .seed = static_cast<uint64_t>(i)});
    }
    for (const Case& test : cases) oracles.emplace_back(test);
  }

  Status run(LocalRank& me, int64_t step) const {
    const size_t i = static_cast<size_t>(step) % cases.size();
    return Exercise(me, cases[i], oracles[i], static_cast<int32_t>(step)).run();
  }
};

// Between two looks at the clock nothing but the steps themselves keeps the ranks together.
constexpr int64_t kRounds = 150;

Status run_rounds(LocalRank& me, const Cases& cases) {
  for (int64_t round = 0; round < kRounds; ++round) {
    if (Status status = cases.run(me, round); !status.ok()) return status;
  }
  return Status();
}

TEST(threads_run_freely, 60) {
  for (int32_t num_ranks : {2, 5}) {
    const Cases cases(num_ranks);
    const auto group = make_threads(num_ranks);
    const auto end = Clock::now() + kSoak;
    while (Clock::now() < end) {
      for (const Status& status :
           run_threads(*group, [&](LocalRank& me) { return run_rounds(me, cases); })) {
        CHECK_OK(status);
      }
    }
    const uint32_t steps = group->local(0)->arena().control().posted.load();
    CHECK(steps >= 3 * kRounds);
    std::printf("%u steps of %d threads\n", steps, num_ranks);
  }
}

TEST(processes_run_freely, 60) {
  constexpr int kProcesses = 3;
  const Cases cases(2 * kProcesses);
  Meeting* meeting = Meeting::make();
  Processes processes(kProcesses, 60, [&](int process) {
    const auto group = join_group(*meeting, 2 * kProcesses, 2 * process, 2);
    const auto end = Clock::now() + kSoak;
    do {
      std::vector<std::future<Status>> futures;
      for (int32_t rank : {2 * process, 2 * process + 1}) {
        LocalRank& me = *group->local(rank);
        futures.push_back(start(me, [&] { return run_rounds(me, cases); }));
      }
      for (auto& future : futures) CHECK_OK(future.get());
      if (process == 0)
        meeting->notes[0] =
            Clock::now() < end ? 0 : group->local(0)->arena().control().posted.load();
      meeting->barrier(kProcesses);
    } while (meeting->notes[0] == 0);
  });
  processes.expect_success();
  std::printf("%lld steps of %d processes\n", static_cast<long long>(meeting->notes[0]),
              kProcesses);
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
