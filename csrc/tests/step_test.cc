// A step's end, good and bad: what each rank is told when a peer is late, fails, leaves, or runs
// something else.
#include "cpu/step.h"

#include "check.h"
#include "ranks.h"

namespace moriep {
namespace {

using Seconds = std::chrono::duration<double>;

struct Tick {
  Kind kind = Kind::kDispatch;
  Shape shape{.num_ranks = 2,
              .num_tokens = 4,
              .top_k = 2,
              .hidden_size = 8,
              .num_experts = 4,
              .num_local_experts = 2,
              .block = 4,
              .capacity = 16};
  int32_t dtype = 1;
  bool with_scalars = false;
  int32_t order = 0;
  std::string config = "cfg";
};

// A step without payload.
Status tick(LocalRank& me, const Tick& what = {}) {
  Step step(me, what.kind, what.shape, what.dtype, what.with_scalars, what.order, what.config);
  std::vector<std::byte*> halves;
  if (Status status = step.halves(64, &halves); !status.ok()) return status;
  return step.publish_and_wait();
}

double since(Clock::time_point start) { return Seconds(Clock::now() - start).count(); }

TEST(steps_count_up_together, 20) {
  const auto group = make_threads(3);
  for (uint32_t n = 1; n <= 50; ++n) {
    for (const Status& status : run_threads(*group, [](LocalRank& me) { return tick(me); }))
      CHECK_OK(status);
    for (int32_t rank = 0; rank < 3; ++rank)
      CHECK_EQ(group->local(rank)->arena().control().posted.load(), n);
  }
}

TEST(a_late_peer_is_named_at_the_deadline, 20) {
  const auto group = make_threads(4, Seconds(0.3));
  for (const Status& status : run_threads(*group, [](LocalRank& me) { return tick(me); }))
    CHECK_OK(status);
  const auto begin = Clock::now();
  for (const Status& status :
       run_threads(*group, [](LocalRank& me) { return me.rank() == 2 ? Status() : tick(me); })) {
    if (status.ok()) continue;
    // Whoever gives up first names rank 2; the others hear it from there or from their own
    // deadline.
    CHECK_CONTAINS(status.text(), "rank 2");
    CHECK_CONTAINS(status.text(), "dispatch, rank ");
    CHECK_CONTAINS(status.text(), "step 2: ");
    CHECK_CONTAINS(status.text(), "waited 0.3 s");
    CHECK_CONTAINS(status.text(), "its last step was 1");
    CHECK_CONTAINS(status.text(), "JAX_MORIEP_TIMEOUT");
    CHECK(status.code() == Code::kDeadlineExceeded || status.code() == Code::kUnavailable);
  }
  CHECK(since(begin) >= 0.3);
  CHECK(since(begin) < 3.0);

  // The late rank learns why nobody waits for it any more, and no rank begins another step.
  const Status late = start(*group->local(2), [&] { return tick(*group->local(2)); }).get();
  CHECK_OK(late);  // all the others had published this step
  for (const Status& status : run_threads(*group, [](LocalRank& me) { return tick(me); })) {
    CHECK(!status.ok());
    CHECK_CONTAINS(status.text(), "waited 0.3 s for rank 2");
  }
  CHECK_CONTAINS(group->failure(), "rank 2");
}

TEST(a_rank_that_fails_tells_the_others_at_once, 20) {
  const auto group = make_threads(3);
  const auto begin = Clock::now();
  const auto results = run_threads(*group, [](LocalRank& me) {
    if (me.rank() != 1) return tick(me);
    std::this_thread::sleep_for(Seconds(0.1));  // the others wait by then
    Step step(me, Kind::kCombine, Tick().shape, 1, false, 0, "");
    return step.fail(Status(Code::kInvalidArgument, "the dog ate it"));
  });
  CHECK(since(begin) < 2.0);
  CHECK_EQ(results[1].code(), Code::kInvalidArgument);
  CHECK_EQ(results[1].text(), "combine, rank 1, step 1: the dog ate it");
  for (size_t rank : {size_t{0}, size_t{2}}) {
    CHECK_EQ(results[rank].code(), Code::kUnavailable);
    CHECK_CONTAINS(results[rank].text(), "dispatch, rank " + std::to_string(rank) + ", step 1: ");
    CHECK_CONTAINS(results[rank].text(), "combine, rank 1, step 1: the dog ate it");
  }
  const auto again = run_threads(*group, [](LocalRank& me) { return tick(me); });
  CHECK_EQ(again[1].code(), Code::kFailedPrecondition);
  CHECK_CONTAINS(again[1].text(),
                 "the group failed before: combine, rank 1, step 1: the dog ate it");
  CHECK_CONTAINS(again[1].text(), "jm.initialize");
  CHECK_EQ(group->failure(), std::string(group->local(0)->arena().control().failure));
}

TEST(a_failure_is_seen_past_a_rank_that_is_busy, 10) {
  const auto group = make_threads(3, Seconds(60));
  std::atomic<bool> told = false;
  // Rank 0 waits for rank 1 first, which is busy until rank 0 knows that rank 2 has failed.
  const auto results = run_threads(*group, [&](LocalRank& me) {
    if (me.rank() == 2) me.fail("rank 2 is out");
    while (me.rank() == 1 && !told) std::this_thread::yield();
    const Status status = me.rank() == 0 ? tick(me) : Status();
    if (me.rank() == 0) told = true;
    return status;
  });
  CHECK_CONTAINS(results[0].text(), "rank 2 failed: rank 2 is out");
}

// Its peers may still be in the step before the one that it failed in, and read what it published
// there.
TEST(a_rank_that_failed_writes_nothing_more, 10) {
  const auto group = make_threads(2, Seconds(0.05));
  for (const Status& status : run_threads(*group, [](LocalRank& me) { return tick(me); }))
    CHECK_OK(status);
  LocalRank& me = *group->local(0);
  CHECK(!start(me, [&] { return tick(me); }).get().ok());
  const Control& control = me.arena().control();
  std::vector<char> before(sizeof(Control)), after(sizeof(Control));
  std::memcpy(before.data(), static_cast<const void*>(&control), sizeof(Control));
  Tick other;
  other.kind = Kind::kCombine;
  other.config = "what comes next in the queue";
  CHECK_CONTAINS(start(me, [&] { return tick(me, other); }).get().text(),
                 "the group failed before");
  std::memcpy(after.data(), static_cast<const void*>(&control), sizeof(Control));
  CHECK(before == after);
}

TEST(the_first_reason_stays, 10) {
  const auto group = make_threads(1);
  group->local(0)->fail("first");
  group->local(0)->fail("second");
  CHECK_EQ(group->failure(), "first");
  group->local(0)->fail(std::string(5000, 'x'));
  CHECK_EQ(group->failure(), "first");
  const auto other = make_threads(1);
  other->local(0)->fail(std::string(5000, 'x'));
  CHECK_EQ(other->failure(), std::string(kFailureChars - 1, 'x'));
}

TEST(ranks_that_run_different_programs_show_both_values, 40) {
  const auto expect = [](const Tick& odd, const std::string& what, const std::string& usual,
                         const std::string& unusual) {
    const auto group = make_threads(3);
    const auto results = run_threads(
        *group, [&](LocalRank& me) { return me.rank() == 1 ? tick(me, odd) : tick(me); });
    for (int32_t rank = 0; rank < 3; ++rank) {
      const Status& status = results[static_cast<size_t>(rank)];
      CHECK_EQ(status.code(), Code::kInvalidArgument);
      const std::string& here = rank == 1 ? unusual : usual;
      const std::string& there = rank == 1 ? usual : unusual;
      CHECK_CONTAINS(status.text(), what + " " + here + " here and " + there + " there");
      CHECK_CONTAINS(status.text(),
                     rank == 1 ? " runs another program" : "rank 1 runs another program");
    }
  };
  Tick odd;
  odd.kind = Kind::kCombine;
  expect(odd, "the exchange is", "dispatch", "combine");
  odd = Tick();
  odd.order = 7;
  expect(odd, "the order (which call of the program it is) has", "0", "7");
  odd = Tick();
  odd.dtype = 2;
  expect(odd, "dtype", "float32", "bfloat16");
  odd = Tick();
  odd.with_scalars = true;
  expect(odd, "scalars carried", "0", "1");
  odd = Tick();
  odd.config = "another cfg";
  expect(odd, "config", "cfg", "another cfg");
  const std::pair<int64_t Shape::*, const char*> sizes[] = {
      {&Shape::num_tokens, "tokens per rank"},
      {&Shape::hidden_size, "hidden_size"},
      {&Shape::top_k, "top_k"},
      {&Shape::num_experts, "num_experts"},
      {&Shape::block, "block"},
      {&Shape::num_local_experts, "experts per rank"},
      {&Shape::capacity, "capacity"}};
  for (const auto& [field, name] : sizes) {
    odd = Tick();
    odd.shape.*field = 99;
    expect(odd, name, std::to_string(Tick().shape.*field), "99");
  }
}

TEST(a_long_config_is_cut, 10) {
  const auto group = make_threads(2);
  Tick what;
  what.config = std::string(5000, 'c');
  for (const Status& status : run_threads(*group, [&](LocalRank& me) { return tick(me, what); })) {
    CHECK_OK(status);
  }
}

TEST(one_rank_runs_more_steps, 20) {
  Meeting* meeting = Meeting::make();
  Processes processes(2, 20, [&](int rank) {
    auto group = join_group(*meeting, 2, rank, 1);
    LocalRank& me = *group->local(rank);
    for (int step = 0; step < 3; ++step) CHECK_OK(start(me, [&] { return tick(me); }).get());
    if (rank == 0) group.reset();
    if (rank == 1) {
      const auto begin = Clock::now();
      const Status status = start(me, [&] { return tick(me); }).get();
      CHECK(since(begin) < 2.0);
      CHECK_EQ(status.code(), Code::kUnavailable);
      CHECK_CONTAINS(status.text(), "rank 0 has left the group; its last step was 3");
    }
    meeting->barrier(2);
  });
  processes.expect_success();
}

// Two objects that stand for two processes: one leaves right after the step that both take.
TEST(who_leaves_after_a_step_has_not_left_it, 30) {
  for (int round = 0; round < (kSanitized ? 300 : 3000); ++round) {
    Group first(2, kPatience), second(2, kPatience);
    CHECK_OK(first.add_local(0));
    CHECK_OK(second.add_local(1));
    CHECK_OK(first.connect(1, second.local(1)->arena().address()));
    CHECK_OK(second.connect(0, first.local(0)->arena().address()));
    auto one = start(*first.local(0), [&] { return tick(*first.local(0)); });
    auto two = start(*second.local(1), [&] { return tick(*second.local(1)); });
    Group& quick = round % 2 == 0 ? first : second;
    CHECK_OK((round % 2 == 0 ? one : two).get());
    quick.stop();
    CHECK_OK((round % 2 == 0 ? two : one).get());
  }
}

TEST(stopping_a_group_ends_its_waiting_and_its_queued_steps, 20) {
  const auto group = make_threads(2);
  std::vector<std::future<Status>> futures;
  for (int i = 0; i < 5; ++i)
    futures.push_back(start(*group->local(0), [&] { return tick(*group->local(0)); }));
  std::this_thread::sleep_for(Seconds(0.1));
  const auto begin = Clock::now();
  group->stop();
  CHECK(since(begin) < 2.0);
  CHECK_CONTAINS(futures[0].get().text(), "the group is closed");
  for (int i = 1; i < 5; ++i)
    CHECK_CONTAINS(futures[static_cast<size_t>(i)].get().text(), "the group is closed");
  const Status late = start(*group->local(1), [] { return Status(); }).get();
  CHECK_EQ(late.code(), Code::kFailedPrecondition);
  CHECK_EQ(late.text(), "the group is closed");
  CHECK_EQ(group->local(1)->arena().control().closed.load(), 1u);
  group->stop();
}

TEST(a_missing_connection_is_waited_for_and_explained, 20) {
  {
    Group group(2, Seconds(0.2));
    CHECK_OK(group.add_local(0));
    CHECK(!group.connected());
    const Status status = start(*group.local(0), [&] { return tick(*group.local(0)); }).get();
    CHECK_EQ(status.code(), Code::kDeadlineExceeded);
    CHECK_CONTAINS(status.text(), "rank 0 has no connection to rank 1 after 0.2");
  }
  {
    Group group(2, kPatience);
    CHECK_OK(group.add_local(1));
    auto waiting = start(*group.local(1), [&] { return tick(*group.local(1)); });
    group.connect_failed("rank 0: it is on the moon");
    const Status status = waiting.get();
    CHECK_EQ(status.code(), Code::kUnavailable);
    CHECK_CONTAINS(status.text(), "rank 1 has no connection to rank 0: rank 0: it is on the moon");
  }
  {
    Group group(2, kPatience);
    CHECK_OK(group.add_local(0));
    auto waiting = start(*group.local(0), [&] { return tick(*group.local(0)); });
    std::this_thread::sleep_for(Seconds(0.05));
    group.stop();
    CHECK_CONTAINS(waiting.get().text(), "the group is closed");
  }
}

TEST(connections_made_while_steps_wait_are_used, 20) {
  for (int round = 0; round < 50; ++round) {
    Group first(2, kPatience), second(2, kPatience);
    CHECK_OK(first.add_local(0));
    CHECK_OK(second.add_local(1));
    auto one = start(*first.local(0), [&] { return tick(*first.local(0)); });
    auto two = start(*second.local(1), [&] { return tick(*second.local(1)); });
    CHECK_OK(first.connect(1, second.local(1)->arena().address()));
    CHECK_OK(second.connect(0, first.local(0)->arena().address()));
    CHECK_OK(one.get());
    CHECK_OK(two.get());
    CHECK(first.connected() && second.connected());
    CHECK_EQ(first.connect(1, second.local(1)->arena().address()).code(),
             Code::kFailedPrecondition);
  }
}

TEST(a_timeout_of_ages_is_no_overflow, 10) {
  for (double timeout : {1e12, 1e300}) {
    const auto group = make_threads(2, Seconds(timeout));
    for (const Status& status : run_threads(*group, [](LocalRank& me) {
           if (me.rank() == 1) std::this_thread::sleep_for(Seconds(0.1));
           return tick(me);
         })) {
      CHECK_OK(status);
    }
  }
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
