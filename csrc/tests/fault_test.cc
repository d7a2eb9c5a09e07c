// Processes that die or stop in the middle of their work, and plans that somebody has tampered
// with.
#include "check.h"
#include "exercise.h"
#include "ranks.h"

namespace moriep {
namespace {

using Seconds = std::chrono::duration<double>;

Case some_case(int64_t num_ranks, uint64_t seed) {
  return {.shape = shape_of(num_ranks, 6, 2, 32, 8, 4), .with_scalars = true, .seed = seed};
}

int64_t now_ms() {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now().time_since_epoch())
      .count();
}

// Steps until one fails; notes how far it got, and writes when and why it ended.
void step_until_failure(Meeting& meeting, Group& group, int32_t rank) {
  LocalRank& me = *group.local(rank);
  Status status;
  for (uint64_t seed = 0; status.ok(); ++seed) {
    const Case test = some_case(group.num_ranks(), seed);
    const Oracle want(test);
    status = start(me, [&] { return Exercise(me, test, want).run(); }).get();
    meeting.notes[rank].fetch_add(1);
  }
  meeting.notes[rank] = now_ms();
  meeting.write(rank, status.text());
}

// Starts processes that step for ever, and `signal`s one of them when all have run for a while.
void end_one(int num_ranks, int victim, int signal, double timeout, const std::string& said,
             double within) {
  Meeting* meeting = Meeting::make();
  Processes processes(num_ranks, 30, [&](int rank) {
    const auto group = join_group(*meeting, num_ranks, rank, 1, Seconds(timeout));
    step_until_failure(*meeting, *group, rank);
    const Status again = start(*group->local(rank), [&] {
                           const Case test = some_case(num_ranks, 1);
                           const Oracle want(test);
                           return Exercise(*group->local(rank), test, want).run();
                         }).get();
    CHECK_CONTAINS(again.text(), "the group failed before");
    CHECK_CONTAINS(again.text(), said);
  });
  for (int rank = 0; rank < num_ranks; ++rank) {
    while (meeting->notes[rank] < 5) std::this_thread::yield();
  }
  const int64_t begin = now_ms();
  processes.signal(victim, signal);
  for (int rank = 0; rank < num_ranks; ++rank) {
    if (rank == victim) continue;
    CHECK_EQ(processes.wait(rank), 0);
    const std::string text = meeting->texts[rank];
    CHECK_CONTAINS(text, said);
    CHECK_CONTAINS(text, "rank " + std::to_string(victim) + " (pid ");
    CHECK_CONTAINS(text, "rank " + std::to_string(rank) + ", step ");
    CHECK_CONTAINS(text, "its last step was ");
    CHECK(static_cast<double>(meeting->notes[rank] - begin) < within * 1000);
  }
  if (signal == SIGSTOP) {
    // It comes back, and learns what became of the group.
    processes.signal(victim, SIGCONT);
    CHECK_EQ(processes.wait(victim), 0);
    CHECK_CONTAINS(std::string(meeting->texts[victim]), said);
  } else {
    CHECK_EQ(processes.wait(victim), -signal);
  }
}

TEST(a_killed_process_is_named_within_a_second, 40) {
  for (int num_ranks : {2, 4}) {
    for (int victim : {0, num_ranks - 1}) end_one(num_ranks, victim, SIGKILL, 60, "has died", 1.0);
  }
}

TEST(a_stopped_process_is_named_at_the_deadline, 20) {
  end_one(3, 1, SIGSTOP, 0.5, "alive: stopped, or busy elsewhere", 5.0);
}

// The killed process has half of a step behind it: it has pushed rows and not yet said so.
TEST(a_process_killed_inside_a_step, 20) {
  Meeting* meeting = Meeting::make();
  Processes processes(3, 20, [&](int rank) {
    const auto group = join_group(*meeting, 3, rank, 1, Seconds(60));
    const Case test = some_case(3, 1);
    const Oracle want(test);
    LocalRank& me = *group->local(rank);
    const Status status = start(me, [&] {
                            Exercise exercise(me, test, want);
                            CHECK_OK(exercise.dispatch_and_check());
                            if (rank == 2) kill(getpid(), SIGKILL);
                            return exercise.combine_and_check();
                          }).get();
    CHECK_CONTAINS(status.text(), "combine, rank " + std::to_string(rank) + ", step 2: ");
    CHECK_CONTAINS(status.text(), "the process of rank 2 (pid ");
  });
  CHECK_EQ(processes.wait(2), -SIGKILL);
  processes.expect_success();
}

TEST(a_new_group_starts_at_once_after_a_kill, 30) {
  for (int round = 0; round < 3; ++round) {
    Meeting* meeting = Meeting::make();
    Processes processes(2, 20, [&](int rank) {
      const auto group = join_group(*meeting, 2, rank, 1);
      meeting->barrier(2);
      if (rank == 1 && round < 2) kill(getpid(), SIGKILL);
      const Case test = some_case(2, 3);
      const Oracle want(test);
      LocalRank& me = *group->local(rank);
      const Status status = start(me, [&] { return Exercise(me, test, want).run(); }).get();
      CHECK_EQ(status.ok(), round == 2);
    });
    CHECK_EQ(processes.wait(1), round < 2 ? -SIGKILL : 0);
    CHECK_EQ(processes.wait(0), 0);
  }
}

// A plan as dispatch could have made it, for one rank that holds everything.
struct Plans {
  Case test{.shape = shape_of(1, 4, 2, 8, 4, 4)};
  Oracle want{test};
  std::vector<int32_t> routes;
  std::vector<int32_t> places;
  std::vector<int32_t> ids = want.ids(0);

  Plans() {
    for (int64_t t = 0; t < 4; ++t) {
      places.push_back(want.place(0, 0, t));
      for (int64_t k = 0; k < 2; ++k) routes.push_back(want.route(0, 0, t, k));
    }
  }

  // Runs replay and combine along this plan on a group of its own; results must lie in their
  // buffers.
  std::vector<Status> run(int32_t num_ranks = 1) {
    test.shape.num_ranks = num_ranks;
    const auto group = make_threads(num_ranks);
    const auto run = [&](bool replayed) {
      return run_threads(*group, [&](LocalRank& me) {
        const Shape& shape = test.shape;
        const Call call{shape, RowType::kF32, 0, ""};
        auto tokens = poisoned(shape.num_tokens * shape.hidden_size * 4);
        auto rows = poisoned(shape.capacity * shape.hidden_size * 4);
        std::vector<float> scalars(static_cast<size_t>(shape.capacity)),
            token_scalars(static_cast<size_t>(shape.num_routes()));
        if (replayed)
          return replay(me, call, {tokens.data(), routes.data(), ids.data(), rows.data()});
        return combine(me, call,
                       {rows.data(), scalars.data(), routes.data(), places.data(), ids.data(),
                        tokens.data(), token_scalars.data()});
      });
    };
    std::vector<Status> results = run(true);
    if (results[0].ok()) results = run(false);
    return results;
  }
};

TEST(a_plan_that_names_what_is_not_there_is_refused, 20) {
  CHECK_OK(Plans().run()[0]);
  for (int32_t row : {16, 20, 1 << 20, INT32_MAX}) {
    Plans plans;
    plans.test.shape.capacity = 16;
    plans.routes[3] = row;
    const Status status = plans.run()[0];
    CHECK_EQ(status.code(), Code::kInvalidArgument);
    CHECK_CONTAINS(status.text(), "combine's backward, rank 0, step 1: plan.routes names row " +
                                      std::to_string(row) + " but the capacity is 16");
  }
  for (int32_t place : {4, 5, INT32_MAX}) {
    Plans plans;
    plans.places[1] = place;
    const Status status = plans.run()[0];
    CHECK_EQ(status.code(), Code::kInvalidArgument);
    CHECK_CONTAINS(status.text(), "combine, rank 0, step 2: plan.places names place " +
                                      std::to_string(place) + " but there are 4");
  }
}

TEST(negative_numbers_in_a_plan_are_no_rows, 20) {
  for (int32_t value : {-1, -2, -3, -1000, INT32_MIN}) {
    Plans plans;
    plans.routes.assign(plans.routes.size(), value);
    plans.places.assign(plans.places.size(), value);
    CHECK_OK(plans.run()[0]);
  }
  for (int32_t id : {-1, 4, INT32_MAX, INT32_MIN}) {
    Plans plans;
    plans.ids.assign(plans.ids.size(), id);
    CHECK_OK(plans.run()[0]);
  }
}

// Plans of random numbers that pass the checks give random results, but stay in their buffers. Such
// plans name one place twice, a race that is of their own making.
TEST(a_plan_of_noise_stays_in_bounds, 30) {
  if (kSanitizedThreads) return;
  for (int64_t round = 0; round < 40; ++round) {
    Plans plans;
    plans.test.shape = shape_of(3, 4, 2, 8, 6, 4);
    const Shape& shape = plans.test.shape;
    plans.routes.clear();
    plans.places.clear();
    plans.ids.clear();
    for (int64_t i = 0; i < 3 * shape.num_routes(); ++i) {
      plans.routes.push_back(static_cast<int32_t>(pick(1, round, i, 0, shape.capacity + 3) - 3));
    }
    for (int64_t i = 0; i < 3 * shape.num_tokens; ++i) {
      plans.places.push_back(
          static_cast<int32_t>(pick(2, round, i, 0, shape.max_fanout() + 2) - 2));
    }
    for (int64_t i = 0; i < shape.num_routes(); ++i) {
      plans.ids.push_back(static_cast<int32_t>(pick(3, round, i, 0, 9) - 1));
    }
    for (const Status& status : plans.run(3)) CHECK_OK(status);
  }
}

// A peer that is told of a bad plan stops too, instead of waiting for the deadline.
TEST(a_bad_plan_on_one_rank_ends_the_step_on_all, 20) {
  const auto group = make_threads(2);
  const Case test = some_case(2, 1);
  const Oracle want(test);
  const auto results = run_threads(*group, [&](LocalRank& me) {
    Exercise exercise(me, test, want);
    CHECK_OK(exercise.dispatch_and_check());
    if (me.rank() == 0) return exercise.replay_and_check();
    const std::vector<int32_t> routes(static_cast<size_t>(2 * test.shape.num_routes()), 1 << 30);
    auto rows = poisoned(test.shape.capacity * test.shape.hidden_size * 4);
    const auto x = poisoned(test.shape.num_tokens * test.shape.hidden_size * 4);
    return replay(me, Call{test.shape, test.type, 0, "test"},
                  {x.data(), routes.data(), want.ids(1).data(), rows.data()});
  });
  CHECK_EQ(results[1].code(), Code::kInvalidArgument);
  CHECK_EQ(results[0].code(), Code::kUnavailable);
  CHECK_CONTAINS(
      results[0].text(),
      "rank 1 failed: combine's backward, rank 1, step 2: plan.routes names row 1073741824");
}

// Peers write this rank's half. Whatever appears there, dispatch must not use it as an index
// unchecked.
TEST(noise_in_a_peers_arena_stays_in_bounds, 30) {
  for (int64_t round = 0; round < 30; ++round) {
    Group mine(2, kPatience), theirs(2, kPatience);
    CHECK_OK(mine.add_local(0));
    CHECK_OK(theirs.add_local(1));
    CHECK_OK(mine.connect(1, theirs.local(1)->arena().address()));
    const Case test = some_case(2, static_cast<uint64_t>(round));
    const Oracle want(test);
    // Rank 1 is played by hand: the right header, and noise for data.
    Control& control = theirs.local(1)->arena().control();
    std::byte* half = nullptr;
    CHECK_OK(theirs.local(1)->arena().half(1, 1 << 20, &half));
    for (int64_t i = 0; i < 1 << 16; ++i) {
      reinterpret_cast<int32_t*>(half)[i] = static_cast<int32_t>(pick(9, round, i, 0, INT64_MAX));
    }
    LocalRank& me = *mine.local(0);
    auto result = start(me, [&] {
      const Shape& shape = test.shape;
      std::vector<float> x(static_cast<size_t>(shape.num_tokens * shape.hidden_size)),
          weights(static_cast<size_t>(shape.num_routes()));
      auto rows = poisoned(shape.capacity * shape.hidden_size * 4);
      std::vector<float> row_weights(static_cast<size_t>(shape.capacity));
      std::vector<int32_t> sizes(static_cast<size_t>(shape.num_local_experts)),
          routes(static_cast<size_t>(2 * shape.num_routes())),
          places(static_cast<size_t>(2 * shape.num_tokens)),
          all_words(static_cast<size_t>(2 * shape.num_words));
      const auto words = want.words(0);
      return dispatch(me, Call{shape, test.type, 0, ""},
                      {reinterpret_cast<const std::byte*>(x.data()), want.ids(0).data(),
                       weights.data(), rows.data(), row_weights.data(), sizes.data(), routes.data(),
                       places.data(), words.data(), all_words.data()});
    });
    while (me.arena().control().posted.load(std::memory_order_acquire) == 0)
      std::this_thread::yield();
    control.headers[1] = me.arena().control().headers[1];
    control.posted.store(1, std::memory_order_release);
    futex_wake_all(control.posted);
    CHECK_OK(result.get());
  }
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
