// Groups and their threads: order, exceptions, closing at any time, fork, and the C functions that
// Python calls.
#include "cpu/group.h"

#include <sys/resource.h>

#include <stdexcept>

#include "check.h"
#include "exercise.h"
#include "moriep/c_api.h"
#include "ranks.h"

namespace moriep {
namespace {

using Seconds = std::chrono::duration<double>;

Case small_case(int64_t num_ranks) {
  return {.shape = shape_of(num_ranks, 3, 2, 4, 6, 4), .with_scalars = true, .seed = 3};
}

TEST(steps_of_a_rank_run_in_order_on_one_thread, 20) {
  const auto group = make_threads(1);
  std::vector<int> order;
  std::set<std::thread::id> threads;
  std::vector<std::future<Status>> futures;
  for (int i = 0; i < 200; ++i) {
    futures.push_back(start(*group->local(0), [&, i] {
      order.push_back(i);
      threads.insert(std::this_thread::get_id());
      return Status();
    }));
  }
  for (auto& future : futures) CHECK_OK(future.get());
  for (int i = 0; i < 200; ++i) CHECK_EQ(order[static_cast<size_t>(i)], i);
  CHECK_EQ(threads.size(), size_t{1});
  CHECK(!threads.contains(std::this_thread::get_id()));
}

TEST(an_exception_fails_the_rank_and_not_the_process, 20) {
  const auto group = make_threads(2);
  const Case test = small_case(2);
  const Oracle want(test);
  for (int round = 0; round < 2; ++round) {
    const auto results = run_threads(*group, [&](LocalRank& me) {
      if (me.rank() == 0) return Exercise(me, test, want).run();
      if (round == 0) throw std::bad_alloc();
      throw std::runtime_error("later");
    });
    CHECK_EQ(results[1].code(), Code::kInternal);
    CHECK_CONTAINS(results[1].text(),
                   round == 0 ? "rank 1, step 1: std::bad_alloc" : "rank 1, step 1: later");
    CHECK_CONTAINS(results[0].text(), "rank 1, step 1: std::bad_alloc");
  }
}

// A size that no memory can hold ends as an error of the step, on every rank.
TEST(a_step_that_memory_cannot_hold_is_an_error, 20) {
  if (kSanitized) return;  // a sanitizer ends the program where malloc would give null
  const auto group = make_threads(2);
  const rlimit little{rlim_t{4} << 30, RLIM_INFINITY};
  CHECK_EQ(setrlimit(RLIMIT_AS, &little), 0);
  Case test = small_case(2);
  const Oracle want(test);
  Case huge = test;
  huge.shape.num_tokens = 0;
  huge.shape.top_k = INT32_MAX;
  CHECK_OK(check_shape(huge.shape));
  const auto results = run_threads(*group, [&](LocalRank& me) {
    if (me.rank() == 0) return Exercise(me, test, want).run();
    return combine(me, Call{huge.shape, RowType::kF32, 0, ""}, CombineBuffers{});
  });
  CHECK(!results[0].ok());
  CHECK_CONTAINS(results[1].text(), "rank 1, step 1: ");
  CHECK_CONTAINS(results[0].text(), results[1].text());
}

TEST(a_thread_that_cannot_start_is_an_error, 20) {
  Meeting* meeting = Meeting::make();
  Processes processes(1, 20, [&](int) {
    const auto group = make_threads(2);
    // The limit counts a user's processes and does not bind root.
    const rlimit none{0, 0};
    if (geteuid() == 0) CHECK_EQ(setresuid(65534, 65534, 65534), 0);
    CHECK_EQ(setrlimit(RLIMIT_NPROC, &none), 0);
    for (int round = 0; round < 2; ++round) {
      const Status status = start(*group->local(0), [] { return Status(); }).get();
      CHECK_EQ(status.code(), Code::kInternal);
      CHECK_CONTAINS(status.text(), "rank 0 cannot start its thread: ");
    }
    CHECK_CONTAINS(group->failure(), "rank 0 cannot start its thread: ");
    meeting->notes[0] = 1;
  });
  processes.expect_success();
  CHECK_EQ(meeting->notes[0].load(), 1);
}

TEST(groups_close_at_any_time, 40) {
  const Case test = small_case(3);
  const Oracle want(test);
  for (int round = 0; round < 60; ++round) {
    auto group = make_threads(3);
    std::vector<std::future<Status>> futures;
    for (int i = 0; i < 6; ++i) {
      for (int32_t rank = 0; rank < 3; ++rank) {
        LocalRank& me = *group->local(rank);
        futures.push_back(start(me, [&] { return Exercise(me, test, want).run(); }));
      }
    }
    if (round % 3 != 0) std::this_thread::sleep_for(std::chrono::microseconds(40 * round));
    group.reset();
    for (auto& future : futures) {
      const Status status = future.get();
      if (status.ok()) continue;
      const bool told = status.text().find("the group is closed") != std::string::npos ||
                        status.text().find("has left the group") != std::string::npos ||
                        status.text().find("the group failed before") != std::string::npos;
      if (!told) check::fail(__FILE__, __LINE__, status.text());
    }
  }
}

// A last reference that a step's callback holds is given up on a thread that is not the rank's own.
TEST(a_callback_may_hold_the_group, 20) {
  for (int round = 0; round < 50; ++round) {
    auto table = std::make_shared<GroupTable>();
    table->groups.push_back(make_threads(1));
    Registry::get().put("held", table);
    auto group = table->groups[0];
    table.reset();
    std::promise<void> done;
    LocalRank& me = *group->local(0);
    me.submit([] { return Status(); }, [&done, group](const Status&) { done.set_value(); });
    group.reset();
    if (round % 2 == 0) done.get_future().wait();
    moriep_close_all();
    if (round % 2 == 1) done.get_future().wait();
    CHECK(Registry::get().find("held") == nullptr);
  }
}

// A forked child has copies of the groups but no part in them: it must neither end them nor hang.
TEST(a_forked_child_leaves_its_parents_groups_alone, 40) {
  if (kSanitized)
    return;  // ThreadSanitizer does not follow a process that forks with threads running
  auto table = std::make_shared<GroupTable>();
  table->groups.push_back(make_threads(2));
  Group& group = *table->groups[0];
  Registry::get().put("forked", table);
  const Case test = small_case(2);
  const Oracle want(test);
  const auto step = [&] {
    for (const Status& status :
         run_threads(group, [&](LocalRank& me) { return Exercise(me, test, want).run(); })) {
      CHECK_OK(status);
    }
  };
  step();
  Processes child(1, 10, [&](int) {
    const Status status = start(*group.local(0), [] { return Status(); }).get();
    CHECK_EQ(status.code(), Code::kFailedPrecondition);
    CHECK_CONTAINS(status.text(), "forked");
    moriep_close_all();
    CHECK(Registry::get().find("forked") == nullptr);
  });
  child.expect_success();
  step();
  moriep_close_all();
}

struct Table {
  std::string name;
  int64_t num_groups = 1;
  int64_t num_ranks = 2;
  std::vector<int64_t> devices{10, 11};
  std::vector<uint8_t> local{1, 1};
  double timeout = 20;

  std::string open() const {
    char error[256] = "";
    const int32_t code = moriep_group_open(name.c_str(), num_groups, num_ranks, devices.data(),
                                           local.data(), timeout, error, sizeof(error));
    CHECK_EQ(code == 0, error[0] == '\0');
    return error;
  }
};

TEST(tables_open_fail_and_open_again, 20) {
  const Table table{.name = "api"};
  CHECK_EQ(moriep_group_state("api"), MORIEP_GROUP_ABSENT);
  CHECK_EQ(table.open(), "");
  CHECK_EQ(moriep_group_state("api"), MORIEP_GROUP_CONNECTED);
  const auto first = Registry::get().find("api");
  CHECK_EQ(table.open(), "");
  CHECK(Registry::get().find("api") == first);
  CHECK_EQ(first->place_of_device.at(11).second, 1);

  // A step is still waiting in the failed table when the new one takes its place.
  auto waiting = start(*first->groups[0]->local(0), [] {
    std::this_thread::sleep_for(Seconds(0.2));
    return Status();
  });
  first->groups[0]->local(1)->fail("broken");
  CHECK_EQ(moriep_group_state("api"), MORIEP_GROUP_FAILED);
  CHECK_EQ(table.open(), "");
  CHECK_EQ(moriep_group_state("api"), MORIEP_GROUP_CONNECTED);
  CHECK(Registry::get().find("api") != first);
  CHECK_OK(waiting.get());
  moriep_close_all();
  CHECK_EQ(moriep_group_state("api"), MORIEP_GROUP_ABSENT);
  CHECK_EQ(start(*first->groups[0]->local(0), [] { return Status(); }).get().text(),
           "the group is closed");
}

TEST(groups_without_a_local_rank_take_no_part, 20) {
  const Table table{.name = "sparse",
                    .num_groups = 3,
                    .num_ranks = 2,
                    .devices = {1, 2, 3, 4, 5, 6},
                    .local = {1, 1, 0, 0, 1, 0}};
  CHECK_EQ(table.open(), "");
  const auto opened = Registry::get().find("sparse");
  CHECK(opened->groups[1] == nullptr);
  CHECK_EQ(opened->place_of_device.size(), size_t{3});
  CHECK_EQ(moriep_group_state("sparse"), MORIEP_GROUP_OPEN);

  int64_t address[5] = {};
  char error[256] = "";
  const auto address_of = [&](int64_t group, int64_t rank) {
    return moriep_group_address("sparse", group, rank, address, error, sizeof(error));
  };
  CHECK_EQ(address_of(2, 0), 0);
  CHECK_EQ(address[0], getpid());
  CHECK(address_of(2, 1) != 0);
  CHECK_CONTAINS(error, "rank 1 is another process's");
  CHECK(address_of(1, 0) != 0);
  CHECK_CONTAINS(error, "no local group 1");
  CHECK(address_of(-1, 0) != 0);
  CHECK(address_of(3, 0) != 0);
  CHECK(address_of(2, 2) != 0);
  CHECK_CONTAINS(error, "no rank 2");
  CHECK(moriep_group_address("nobody", 0, 0, address, error, sizeof(error)) != 0);
  CHECK_CONTAINS(error, "group nobody is not open");
  // The text is cut to the buffer, whatever its size.
  CHECK(moriep_group_address("nobody", 0, 0, address, error, 6) != 0);
  CHECK_EQ(std::string(error), "group");
  CHECK(moriep_group_address("nobody", 0, 0, address, nullptr, 0) != 0);

  CHECK_EQ(address_of(2, 0), 0);
  address[3] ^= 1;
  CHECK(moriep_group_connect("sparse", 2, 1, address, error, sizeof(error)) != 0);
  moriep_group_connect_failed("sparse", 2, "no luck");
  const Status status = start(*opened->groups[2]->local(0), [&] {
                          std::vector<Arena*> arenas;
                          return opened->groups[2]->arenas(0, &arenas);
                        }).get();
  CHECK_CONTAINS(status.text(), "no luck");
  moriep_close_all();
}

TEST(two_processes_meet_through_the_c_functions, 30) {
  Meeting* meeting = Meeting::make();
  Processes processes(2, 30, [&](int process) {
    const bool first = process == 0;
    const Table table{.name = "pair",
                      .num_ranks = 3,
                      .devices = {5, 6, 7},
                      .local = {uint8_t{first}, uint8_t{first}, uint8_t{!first}}};
    CHECK_EQ(table.open(), "");
    const auto group = Registry::get().find("pair")->groups[0];
    int64_t address[3][5];
    char error[256] = "";
    for (int64_t rank = 0; rank < 3; ++rank) {
      if (group->is_remote(static_cast<int32_t>(rank))) continue;
      CHECK_EQ(moriep_group_address("pair", 0, rank, address[0], error, sizeof(error)), 0);
      std::memcpy(meeting->texts[rank], address[0], sizeof(address[0]));
    }
    meeting->barrier(2);
    for (int64_t rank = 0; rank < 3; ++rank) {
      if (!group->is_remote(static_cast<int32_t>(rank))) continue;
      std::memcpy(address[rank], meeting->texts[rank], sizeof(address[rank]));
      CHECK_EQ(moriep_group_connect("pair", 0, rank, address[rank], error, sizeof(error)), 0);
    }
    CHECK_EQ(moriep_group_state("pair"), MORIEP_GROUP_CONNECTED);
    const Case test = small_case(3);
    const Oracle want(test);
    std::vector<std::future<Status>> futures;
    for (int32_t rank = 0; rank < 3; ++rank) {
      if (group->is_remote(rank)) continue;
      LocalRank& me = *group->local(rank);
      futures.push_back(start(me, [&] { return Exercise(me, test, want).run(); }));
    }
    for (auto& future : futures) CHECK_OK(future.get());

    // The second process ends while the first waits for it: the first hears that it left, and ends
    // in turn.
    if (first) {
      const Status status = start(*group->local(0), [&] {
                              return Exercise(*group->local(0), test, want).run();
                            }).get();
      CHECK_CONTAINS(status.text(), "rank 2 has left the group");
    }
    moriep_close_all();
  });
  processes.expect_success();
}

TEST(a_process_ends_while_its_step_waits, 30) {
  Meeting* meeting = Meeting::make();
  Processes processes(2, 30, [&](int rank) {
    const auto group = join_group(*meeting, 2, rank, 1);
    const Case test = small_case(2);
    const Oracle want(test);
    LocalRank& me = *group->local(rank);
    meeting->barrier(2);
    if (rank == 1) {
      // Only the first process steps, waits, and closes; this one then learns that nobody is there.
      while (meeting->notes[0] == 0) std::this_thread::yield();
      const Status status = start(me, [&] { return Exercise(me, test, want).run(); }).get();
      CHECK_CONTAINS(status.text(), "the group is closed");
      return;
    }
    auto waiting = start(me, [&] { return Exercise(me, test, want).run(); });
    std::this_thread::sleep_for(Seconds(0.1));
    group->stop();
    CHECK_CONTAINS(waiting.get().text(), "the group is closed");
    meeting->notes[0] = 1;
  });
  processes.expect_success();
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
