#include "group.h"

#include <algorithm>
#include <thread>

#include "../runtime/service.h"

namespace gfx942::collectives {
namespace {

constexpr std::chrono::microseconds kPause{200};

// What one group asks of one rank on one stream.
struct Batch {
  std::shared_ptr<Communicator> communicator;
  hipStream_t stream = nullptr;
  std::vector<Operation> operations;
};

struct Group {
  int depth = 0;
  std::vector<Setup> setups;
  std::vector<Batch> batches;
};

thread_local Group group;

const Batch& batch_of(void* data) { return *static_cast<const Batch*>(data); }

uint64_t take_turn(void* data) { return batch_of(data).communicator->take_turn(); }

void leave(void* data, uint64_t turn) { batch_of(data).communicator->leave_turn(turn); }

hipError_t run_batch(void* data, uint64_t turn) {
  const Batch& batch = batch_of(data);
  Communicator& communicator = *batch.communicator;
  communicator.await_turn(turn);
  if (communicator.aborted()) return hipSuccess;
  const Failure failure = run(communicator, batch.operations);
  if (failure.code == ncclSuccess) return hipSuccess;
  communicator.fail(report(failure));
  return hipErrorLaunchFailure;
}

void release_batch(void* data) { delete static_cast<Batch*>(data); }

ncclResult_t enqueue(Batch batch) {
  const hipStream_t stream = batch.stream;
  const char* name = name_of(batch.operations.front().kind);
  const hipSimService service = {name,  take_turn,     run_batch,
                                 leave, release_batch, new Batch(std::move(batch))};
  const hipError_t error = hipSimEnqueue(stream, &service);
  if (error == hipSuccess) return ncclSuccess;
  return report({ncclUnhandledCudaError,
                 std::string(name) + " got " + hipGetErrorName(error) + " from its stream"});
}

ncclResult_t finish(std::vector<Setup> setups) {
  const auto until = Clock::now() + std::chrono::duration<double>(deadline_seconds());
  while (true) {
    for (auto next = setups.begin(); next != setups.end();) {
      Failure failure;
      const bool done = next->advance(&failure);
      if (failure.code != ncclSuccess) {
        failure.text = next->call + ": " + failure.text;
        return report(failure);
      }
      next = done ? setups.erase(next) : std::next(next);
    }
    if (setups.empty()) return ncclSuccess;
    if (Clock::now() > until) {
      return report({ncclRemoteError, setups.front().call + " waited for other ranks longer than " +
                                          "ROCM_SIM_COLLECTIVE_DEADLINE=" +
                                          std::to_string(static_cast<int>(deadline_seconds())) +
                                          " s"});
    }
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace

ncclResult_t start_group() {
  ++group.depth;
  return ncclSuccess;
}

ncclResult_t end_group() {
  if (group.depth == 0) return report({ncclInvalidUsage, "ncclGroupEnd: no group was started"});
  if (--group.depth > 0) return ncclSuccess;
  const auto setups = std::exchange(group.setups, {});
  auto batches = std::exchange(group.batches, {});
  if (const ncclResult_t result = finish(setups); result != ncclSuccess) return result;
  for (Batch& batch : batches) {
    if (const ncclResult_t result = enqueue(std::move(batch)); result != ncclSuccess) return result;
  }
  return ncclSuccess;
}

ncclResult_t add(Setup setup) {
  start_group();
  group.setups.push_back(std::move(setup));
  return end_group();
}

ncclResult_t add(std::shared_ptr<Communicator> communicator, hipStream_t stream,
                 const Operation& operation) {
  start_group();
  auto& batches = group.batches;
  auto batch = std::find_if(batches.begin(), batches.end(), [&](const Batch& one) {
    return one.communicator == communicator && one.stream == stream;
  });
  if (batch == batches.end()) {
    batch = batches.insert(batches.end(), Batch{std::move(communicator), stream, {}});
  }
  batch->operations.push_back(operation);
  return end_group();
}

}  // namespace gfx942::collectives
