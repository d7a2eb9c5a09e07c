// The GPU exchanges against the oracle: in several processes that share one device, and with
// several ranks on one stream, whose halves run one after the other.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>

#include "exercise.h"

namespace moriep::gpu {
namespace {

constexpr int64_t kHalfBytes = int64_t{8} << 20;

// JAX_MORIEP_TEST_STEPS: few where a GPU is simulated, many in a soak.
int num_steps(int by_default) {
  const char* text = std::getenv("JAX_MORIEP_TEST_STEPS");
  return text == nullptr ? by_default : std::max(1, std::atoi(text));
}

// Seconds that a test of so many steps may take.
unsigned deadline(unsigned seconds, int by_default, unsigned milliseconds_per_step) {
  return seconds + static_cast<unsigned>(num_steps(by_default)) * milliseconds_per_step / 1000;
}

// How many steps lie between two looks at the results.
int look_every(int steps) { return std::max(1, steps / 10); }

// What the processes of a test share.
struct Shared {
  int64_t words[8][kAddressWords];
  std::atomic<int32_t> ready[8];
  std::atomic<int32_t> done;
};

Shared* share() {
  void* data =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(data != MAP_FAILED);
  return new (data) Shared();
}

// Joins the group of `num_ranks` processes, all on device 0.
std::unique_ptr<Group> join(Shared& shared, int32_t me, int32_t num_ranks, double timeout) {
  auto group =
      std::make_unique<Group>(num_ranks, std::chrono::duration<double>(timeout), kHalfBytes);
  CHECK_OK(group->add_local(me, 0));
  CHECK_OK(group->address(me, shared.words[me]));
  shared.ready[me] = 1;
  for (int32_t r = 0; r < num_ranks; ++r) {
    while (shared.ready[r] == 0) usleep(1000);
    if (r != me) CHECK_OK(group->connect(r, shared.words[r]));
  }
  return group;
}

// Runs `body` in a process of its own for every rank; the parent never touches the device.
template <typename Body>
std::vector<pid_t> fork_ranks(int32_t num_ranks, const Body& body) {
  std::vector<pid_t> children;
  for (int32_t r = 0; r < num_ranks; ++r) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      check::set_deadline(150);
      body(r);
      std::_Exit(0);
    }
    children.push_back(child);
  }
  return children;
}

void expect_success(const std::vector<pid_t>& children) {
  for (const pid_t child : children) {
    int status = 0;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
  }
}

// Steps of processes that share a device take turns, which costs milliseconds each.
constexpr int kProcessSteps = 60;
constexpr unsigned kProcessStepMs = 20;

// Dispatch, replay and combine in turn, with the scalars that a gradient needs; results are equal
// to the oracle's and the same to the bit whenever they are looked at.
void check_processes(int32_t num_ranks) {
  Shared* shared = share();
  const auto children = fork_ranks(num_ranks, [&](int32_t me) {
    check::set_deadline(deadline(150, kProcessSteps, kProcessStepMs));
    const auto group = join(*shared, me, num_ranks, 60);
    for (const auto& [type, wire, delivery] :
         {std::tuple{RowType::kF32, Wire::kRows, Delivery::kPull},
          std::tuple{RowType::kBF16, Wire::kRows, Delivery::kPull},
          std::tuple{RowType::kBF16, Wire::kFp8, Delivery::kPull},
          std::tuple{RowType::kBF16, Wire::kRows, Delivery::kPut},
          std::tuple{RowType::kBF16, Wire::kFp8, Delivery::kPut}}) {
      Case test{shape_of(num_ranks, 33, 3, 72, 10, 4), type};
      test.with_scalars = true;
      test.wire = wire;
      test.delivery = delivery;
      const Oracle want(test);
      Exercise exercise(*group->local(me), test, want);
      std::vector<std::byte> dispatched, combined;
      const int rounds = (num_steps(kProcessSteps) + 8) / 9;
      for (int i = 0; i < rounds; ++i) {
        const bool look = i % look_every(rounds) == 0 || i == rounds - 1;
        if (look) exercise.poison_results();
        CHECK_OK(exercise.dispatch(Phase::kBoth));
        if (look) {
          check_gpu(gpuDeviceSynchronize(), "dispatch");
          CHECK_OK(group->failure());
          exercise.check_dispatch();
          if (i == 0) dispatched = exercise.bits();
          CHECK(exercise.bits() == dispatched);
        }
        CHECK_OK(exercise.replay(Phase::kBoth));
        CHECK_OK(exercise.combine(Phase::kBoth));
        if (look) {
          check_gpu(gpuDeviceSynchronize(), "combine");
          CHECK_OK(group->failure());
          exercise.check_replay();
          exercise.check_combine();
          if (i == 0) combined = exercise.bits();
          CHECK(exercise.bits() == combined);
        }
      }
    }
    // Nobody frees an arena that another still reads.
    ++shared->done;
    while (shared->done < num_ranks) usleep(1000);
  });
  expect_success(children);
}

TEST(two_processes, deadline(200, kProcessSteps, kProcessStepMs)) { check_processes(2); }
TEST(four_processes, deadline(200, kProcessSteps, kProcessStepMs)) { check_processes(4); }

TEST(a_killed_process_is_a_deadline_error, 200) {
  Shared* shared = share();
  const auto children = fork_ranks(3, [&](int32_t me) {
    const auto group = join(*shared, me, 3, 3);
    const Case test{shape_of(3, 17, 2, 64, 6, 4), RowType::kBF16};
    const Oracle want(test);
    Exercise exercise(*group->local(me), test, want);
    CHECK_OK(exercise.dispatch(Phase::kBoth));
    check_gpu(gpuDeviceSynchronize(), "dispatch");
    exercise.check_dispatch();
    ++shared->done;
    while (shared->done < 3) usleep(1000);
    if (me == 1) kill(getpid(), SIGKILL);
    CHECK_OK(exercise.dispatch(Phase::kBoth));
    check_gpu(gpuDeviceSynchronize(), "dispatch without a peer");
    const Status status = group->failure();
    // The second to notice may hear it from the first.
    CHECK(!status.ok());
    if (status.code() == Code::kDeadlineExceeded) {
      CHECK_CONTAINS(status.text(),
                     "dispatch, rank " + std::to_string(me) + ", step 2: rank 1 did not arrive");
    }
    // The next call says so at once, and enqueues nothing.
    CHECK_EQ(exercise.combine(Phase::kBoth).text(), status.text());
    CHECK((std::to_integer<int>(exercise.rows()[0]) & 0xff) == 0xff);
  });
  for (size_t r = 0; r < children.size(); ++r) {
    int status = 0;
    CHECK_EQ(waitpid(children[r], &status, 0), children[r]);
    if (r != 1) CHECK_EQ(status, 0);
  }
}

// A group whose ranks all live on device 0 of this process.
std::unique_ptr<Group> ranks_on_one_device(int32_t num_ranks, double timeout = 20) {
  auto group =
      std::make_unique<Group>(num_ranks, std::chrono::duration<double>(timeout), kHalfBytes);
  for (int32_t r = 0; r < num_ranks; ++r) CHECK_OK(group->add_local(r, 0));
  CHECK_OK(group->link_locals());
  return group;
}

using Exercises = std::vector<std::unique_ptr<Exercise>>;

Exercises exercises_of(Group& group, const Case& test, const Oracle& want) {
  Exercises all;
  for (int32_t r = 0; r < group.num_ranks(); ++r) {
    all.push_back(std::make_unique<Exercise>(*group.local(r), test, want));
  }
  return all;
}

void run(Exercises& all, Status (Exercise::*op)(Phase)) {
  for (const Phase phase : {Phase::kFirst, Phase::kSecond}) {
    for (const auto& one : all) CHECK_OK((one.get()->*op)(phase));
  }
}

// The results of all ranks after each exchange.
using Bits = std::vector<std::vector<std::byte>>;

Bits check_case(Group& group, const Case& test) {
  const Oracle want(test);
  Exercises all = exercises_of(group, test, want);
  Bits bits;
  const auto finish = [&](const char* what, void (Exercise::*check)() const) {
    check_gpu(gpuDeviceSynchronize(), what);
    CHECK_OK(group.failure());
    for (const auto& one : all) {
      (one.get()->*check)();
      bits.push_back(one->bits());
    }
  };
  run(all, &Exercise::dispatch);
  finish("dispatch", &Exercise::check_dispatch);
  for (const auto& one : all) one->poison_results();
  run(all, &Exercise::replay);
  finish("replay", &Exercise::check_replay);
  if (test.type == RowType::kU8) return bits;
  run(all, &Exercise::combine);
  finish("combine", &Exercise::check_combine);
  return bits;
}

// Results do not depend on who moves the tokens.
void check_both_ways(Group& group, Case test) {
  const Bits pulled = check_case(group, test);
  if (group.num_ranks() == 1) return;
  test.delivery = Delivery::kPut;
  CHECK(check_case(group, test) == pulled);
}

TEST(ranks_on_one_stream, 300) {
  for (const int32_t num_ranks : {1, 2, 3, 4, 5, 8}) {
    const auto group = ranks_on_one_device(num_ranks);
    uint64_t seed = 0;
    for (const RowType type : {RowType::kF32, RowType::kBF16, RowType::kF16, RowType::kU8}) {
      for (const Routing routing : {Routing::kUniform, Routing::kOneExpert, Routing::kInvalid,
                                    Routing::kDuplicates, Routing::kNone}) {
        for (const int64_t hidden : {int64_t{1}, int64_t{40}, int64_t{1111}}) {
          Case test{shape_of(num_ranks, 21, 3, hidden, 10, 4, hidden == 40 ? 0.5 : 1.0), type,
                    routing};
          test.with_scalars = hidden != 1 && type != RowType::kU8;
          test.seed = ++seed;
          // Of the other way, all routings in wide words, and one in the narrowest.
          const auto check = hidden == 40 || (hidden == 1111 && routing == Routing::kUniform)
                                 ? check_both_ways
                                 : [](Group& g, Case c) { (void)check_case(g, c); };
          check(*group, test);
          if (type == RowType::kU8 || routing != Routing::kUniform) continue;
          test.wire = Wire::kFp8;
          check_both_ways(*group, test);
        }
      }
    }
    check_both_ways(*group, Case{shape_of(num_ranks, 0, 2, 16, 4, 8), RowType::kF32});
    check_both_ways(*group, Case{shape_of(num_ranks, 700, 8, 24, 64, 16), RowType::kBF16});
    check_both_ways(*group, Case{shape_of(num_ranks, 90, 12, 24, 700, 8), RowType::kF32});
  }
}

TEST(tokens_of_several_nodes, 120) {
  for (const int32_t num_ranks : {1, 2, 3, 8}) {
    const auto group = ranks_on_one_device(num_ranks);
    // Of each node fewer tokens than a chunk of the sort has, more, and one.
    for (const auto& [num_tokens, num_nodes] :
         {std::pair{21, 3}, std::pair{700, 7}, std::pair{5, 5}}) {
      Case test{shape_of(num_ranks, num_tokens, 3, 40, 10, 4, 0.5), RowType::kBF16};
      test.shape.num_nodes = num_nodes;
      test.with_scalars = true;
      check_case(*group, test);
      test.type = RowType::kU8;
      test.with_scalars = false;
      check_case(*group, test);
    }
  }
}

constexpr int kStreamSteps = 2000;

void check_many_steps(Wire wire) {
  const auto group = ranks_on_one_device(3);
  Case test{shape_of(3, 50, 4, 136, 12, 8), RowType::kBF16};
  test.with_scalars = true;
  test.wire = wire;
  const Oracle want(test);
  Exercises all = exercises_of(*group, test, want);
  std::vector<std::vector<std::byte>> dispatched, combined;
  const auto look = [&](std::vector<std::vector<std::byte>>& first) {
    check_gpu(gpuDeviceSynchronize(), "steps");
    CHECK_OK(group->failure());
    const bool taken = first.size() == all.size();
    for (size_t r = 0; r < all.size(); ++r) {
      if (!taken) first.push_back(all[r]->bits());
      CHECK(all[r]->bits() == first[r]);
    }
  };
  for (int i = 0, steps = num_steps(kStreamSteps); i < steps; ++i) {
    const bool looked_at = i % look_every(steps) == 0;
    for (const auto& one : all) {
      // Steps of both ways follow each other in one arena.
      one->deliver_by(i % 3 == 0 ? Delivery::kPull : Delivery::kPut);
      if (looked_at) one->poison_results();
    }
    run(all, &Exercise::dispatch);
    if (looked_at) look(dispatched);
    run(all, &Exercise::replay);
    run(all, &Exercise::combine);
    if (looked_at) look(combined);
  }
}

TEST(many_steps_give_the_same_bits, deadline(120, kStreamSteps, 10)) {
  check_many_steps(Wire::kRows);
}
TEST(many_steps_of_float8_give_the_same_bits, deadline(120, kStreamSteps, 10)) {
  check_many_steps(Wire::kFp8);
}

TEST(faults_are_named, 60) {
  const Case test{shape_of(2, 9, 2, 32, 4, 4), RowType::kF32};
  const Oracle want(test);
  {  // Another place in the program.
    const auto group = ranks_on_one_device(2);
    Exercise a(*group->local(0), test, want, 5), b(*group->local(1), test, want, 7);
    CHECK_OK(a.dispatch(Phase::kFirst));
    CHECK_OK(b.dispatch(Phase::kFirst));
    CHECK_OK(a.dispatch(Phase::kSecond));
    check_gpu(gpuDeviceSynchronize(), "order");
    CHECK_CONTAINS(group->failure().text(), "rank 1 runs another program");
    CHECK_CONTAINS(group->failure().text(), "5 here and 7 there");
  }
  {  // Another exchange.
    const auto group = ranks_on_one_device(2);
    Exercise a(*group->local(0), test, want), b(*group->local(1), test, want);
    CHECK_OK(a.dispatch(Phase::kFirst));
    b.spoil_plan();
    CHECK_OK(b.replay(Phase::kFirst));
    CHECK_OK(a.dispatch(Phase::kSecond));
    check_gpu(gpuDeviceSynchronize(), "kind");
    CHECK_CONTAINS(group->failure().text(), "rank 1 runs another program");
  }
  {  // Another wire.
    const auto group = ranks_on_one_device(2);
    Case other = test;
    other.wire = Wire::kFp8;
    Exercise a(*group->local(0), test, want), b(*group->local(1), other, want);
    CHECK_OK(a.dispatch(Phase::kFirst));
    CHECK_OK(b.dispatch(Phase::kFirst));
    CHECK_OK(a.dispatch(Phase::kSecond));
    check_gpu(gpuDeviceSynchronize(), "wire");
    CHECK_CONTAINS(group->failure().text(), "rank 1 runs another program");
  }
  {  // Another way to deliver.
    const auto group = ranks_on_one_device(2);
    Case other = test;
    other.delivery = Delivery::kPut;
    Exercise a(*group->local(0), test, want), b(*group->local(1), other, want);
    CHECK_OK(a.dispatch(Phase::kFirst));
    CHECK_OK(b.dispatch(Phase::kFirst));
    CHECK_OK(a.dispatch(Phase::kSecond));
    check_gpu(gpuDeviceSynchronize(), "delivery");
    CHECK_CONTAINS(group->failure().text(), "this rank delivers by pull and rank 1 by put");
  }
  {  // Bytes on the fp8 wire.
    const auto group = ranks_on_one_device(1);
    const Status status = gpu::dispatch(
        *group->local(0), Call{.shape = test.shape, .type = RowType::kU8, .wire = Wire::kFp8}, {});
    CHECK_EQ(status.code(), Code::kInvalidArgument);
    CHECK_CONTAINS(status.text(), "bytes cannot be sent as fp8");
  }
  {  // A peer that never comes.
    const auto group = ranks_on_one_device(2, 0.5);
    Exercise a(*group->local(0), test, want);
    CHECK_OK(a.dispatch(Phase::kBoth));
    check_gpu(gpuDeviceSynchronize(), "deadline");
    CHECK_EQ(group->failure().code(), Code::kDeadlineExceeded);
    CHECK_CONTAINS(group->failure().text(), "dispatch, rank 0, step 1: rank 1 did not arrive");
  }
  for (const int32_t num_ranks : {1, 2}) {  // A plan that names rows beyond the capacity.
    const Case alone{shape_of(num_ranks, 9, 2, 32, 4, 4), RowType::kF32};
    const Oracle wanted(alone);
    const auto group = ranks_on_one_device(num_ranks);
    Exercises all = exercises_of(*group, alone, wanted);
    run(all, &Exercise::dispatch);
    check_gpu(gpuDeviceSynchronize(), "dispatch");
    all[0]->spoil_plan();
    // From the first launch on the fault may be known already, and the next call refused.
    for (const Phase phase : {Phase::kFirst, Phase::kSecond}) {
      for (const auto& one : all) (void)one->combine(phase);
    }
    check_gpu(gpuDeviceSynchronize(), "plan");
    CHECK_CONTAINS(group->failure().text(), "plan names row or place");
  }
  {  // A program that takes this device for another rank.
    const auto group = ranks_on_one_device(1);
    const Case alone{shape_of(1, 9, 2, 32, 4, 4), RowType::kF32};
    const Oracle wanted(alone);
    Exercise a(*group->local(0), alone, wanted, 0, 3);
    CHECK_OK(a.dispatch(Phase::kBoth));
    check_gpu(gpuDeviceSynchronize(), "rank");
    CHECK_CONTAINS(group->failure().text(), "this device is rank 3 of the running mesh");
  }
  {  // More than an arena holds.
    const auto group = ranks_on_one_device(2);
    const Case large{shape_of(2, 600, 2, 8192, 4, 4), RowType::kF32};
    const Status status =
        gpu::dispatch(*group->local(0), Call{.shape = large.shape, .type = large.type}, {});
    CHECK_CONTAINS(status.text(), "set JAX_MORIEP_ARENA_MB to at least");
  }
  {  // More than it holds when peers put.
    const auto group = ranks_on_one_device(3);
    const Case large{shape_of(3, 600, 2, 2048, 4, 4), RowType::kF32};
    const Call call{.shape = large.shape, .type = large.type, .delivery = Delivery::kPut};
    const Status status = gpu::dispatch(*group->local(0), call, {});
    CHECK_CONTAINS(status.text(), "a part for each of 2 peers");
    CHECK_CONTAINS(status.text(), "at least 19, or JAX_MORIEP_NATIVE_DISPATCH=pull");
  }
}

// It no longer waits for them, and so does not know what they still read.
TEST(a_failed_rank_writes_to_no_peer, 60) {
  Case test{shape_of(2, 9, 2, 32, 4, 4), RowType::kF32};
  test.delivery = Delivery::kPut;
  const Oracle want(test);
  const auto group = ranks_on_one_device(2, 0.5);
  const auto half_bytes = static_cast<size_t>(group->half_bytes());
  std::byte* halves = group->local(1)->arena + kControlBytes + kWorkspaceBytes;
  check_gpu(gpuMemset(halves, 0xff, 2 * half_bytes), "poison");
  Exercise a(*group->local(0), test, want);
  CHECK_OK(a.dispatch(Phase::kBoth));
  // Enqueued while the first still waits for its peer; or refused, where that has failed already.
  (void)a.dispatch(Phase::kFirst);
  check_gpu(gpuDeviceSynchronize(), "deadline");
  CHECK_EQ(group->failure().code(), Code::kDeadlineExceeded);
  std::vector<std::byte> found(2 * half_bytes);
  check_gpu(gpuMemcpy(found.data(), halves, found.size(), gpuMemcpyDefault), "look");
  const auto untouched = [&](size_t half) {
    const auto begin = found.begin() + static_cast<std::ptrdiff_t>(half * half_bytes);
    return std::all_of(begin, begin + static_cast<std::ptrdiff_t>(half_bytes),
                       [](std::byte byte) { return byte == std::byte{0xff}; });
  };
  CHECK(!untouched(1));  // of step 1
  CHECK(untouched(0));
}

}  // namespace
}  // namespace moriep::gpu

TEST_MAIN()
