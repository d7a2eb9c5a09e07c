// The calls of csrc/interop: what is lent, how it is counted, and that it may outlive the call.
#include <thread>

#include "check.h"
#include "interop/call.h"

namespace moriep {
namespace {

constexpr dlpack::Type kF32{.code = dlpack::kFloat, .bits = 32, .lanes = 1};
constexpr dlpack::Type kU32{.code = dlpack::kUInt, .bits = 32, .lanes = 1};

float g_memory[24];

void add_tensors(Call* call) {
  const int64_t dims[] = {2, 3, 4};
  call->add(g_memory, kF32, dims, 3, true);
  call->add(g_memory + 1, kF32, nullptr, 0, false);
}

TEST(a_loan_describes_the_tensor, 10) {
  Call call("f", {.type = dlpack::kCuda, .id = 5}, nullptr);
  add_tensors(&call);
  dlpack::ManagedVersioned* lent = call.lend_versioned(0, kU32, true);
  CHECK(lent->version.major == 1);
  CHECK(lent->flags == dlpack::kReadOnly);
  const dlpack::Tensor& tensor = lent->tensor;
  CHECK(tensor.data == g_memory && tensor.byte_offset == 0);
  CHECK(tensor.device.type == 2 && tensor.device.id == 5);
  CHECK(tensor.type.code == dlpack::kUInt && tensor.type.bits == 32 && tensor.type.lanes == 1);
  CHECK(tensor.ndim == 3);
  for (int i = 0; i < 3; ++i) CHECK(tensor.shape[i] == i + 2);
  CHECK(tensor.strides[0] == 12 && tensor.strides[1] == 4 && tensor.strides[2] == 1);
  lent->deleter(lent);

  dlpack::Managed* scalar = call.lend(1, kF32);
  CHECK(scalar->tensor.data == g_memory + 1 && scalar->tensor.ndim == 0);
  CHECK(scalar->tensor.shape != nullptr && scalar->tensor.strides != nullptr);
  scalar->deleter(scalar);
}

TEST(loans_are_counted_and_outlive_the_call, 10) {
  dlpack::Managed* kept = nullptr;
  {
    Call call("f", {.type = dlpack::kCpu, .id = 0}, nullptr);
    add_tensors(&call);
    kept = call.lend(0, kF32);
    void* returned = moriep_interop_lend(&call, 1, kF32.code, kF32.bits, 1, 0);
    CHECK(moriep_interop_lent(&call) == 2);
    moriep_interop_take_back(returned, 1);
    moriep_interop_take_back(moriep_interop_lend(&call, 1, kF32.code, kF32.bits, 0, 0), 0);
    CHECK(call.lent() == 1);
  }
  CHECK(kept->tensor.shape[2] == 4);
  kept->deleter(kept);
}

int32_t succeed(const CallFields* fields) {
  CHECK(std::string_view(fields->function, static_cast<size_t>(fields->function_size)) == "name");
  CHECK(fields->num_inputs == 1 && fields->num_tensors == 2);
  CHECK(fields->tensors[1].data == g_memory + 1);
  CHECK(fields->stream == g_memory + 2);
  return 1;
}

int32_t fail(const CallFields* fields) {
  moriep_interop_fail(fields->call, "a text", 6);
  return 0;
}

int32_t break_down(const CallFields*) { return 0; }

TEST(the_runner_runs_and_its_failure_is_the_error, 10) {
  Call call("name", {.type = dlpack::kRocm, .id = 0}, g_memory + 2);
  add_tensors(&call);
  CHECK(!call.run());
  CHECK_CONTAINS(call.error(), "Python is ending");
  moriep_interop_set_runner(succeed);
  CHECK(call.run());
  moriep_interop_set_runner(fail);
  CHECK(!call.run());
  CHECK_EQ(call.error(), "a text");
  moriep_interop_set_runner(break_down);
  CHECK(!call.run());
  CHECK_CONTAINS(call.error(), "an exception of its own");
  CHECK(moriep_interop_stop(0) == 1);
}

std::atomic<bool> g_entered{false};
std::atomic<bool> g_leave{false};

int32_t wait_to_leave(const CallFields*) {
  g_entered = true;
  while (!g_leave) std::this_thread::yield();
  return 1;
}

TEST(the_end_waits_for_calls_that_run, 10) {
  moriep_interop_set_runner(wait_to_leave);
  std::thread other([] {
    Call call("name", {.type = dlpack::kCpu, .id = 0}, nullptr);
    CHECK(call.run());
  });
  while (!g_entered) std::this_thread::yield();
  CHECK(moriep_interop_stop(0.01) == 0);
  Call late("name", {.type = dlpack::kCpu, .id = 0}, nullptr);
  CHECK(!late.run());
  g_leave = true;
  CHECK(moriep_interop_stop(5) == 1);
  other.join();
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
