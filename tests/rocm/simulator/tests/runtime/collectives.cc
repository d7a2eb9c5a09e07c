// Ranks that use collectives at the same time, as threads of one process and of two. It is built
// under sanitizers. Values are small whole numbers, so that every result is exact.
#include <hip/hip_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

#include <bit>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#include "../../src/collectives/nccl.h"

namespace {

constexpr int kRanks = 4;
constexpr int kRounds = 10;
constexpr int kMessages = 20;  // more than a mailbox holds
constexpr size_t kCount = 1000;

void check(int error, const char* what) {
  if (error == 0) return;
  std::fprintf(stderr, "%s gave %d\n", what, error);
  std::abort();
}
#define CHECK(call) check(static_cast<int>(call), #call)

int input(int rank, size_t i, int round) {
  return 1 + static_cast<int>((i + static_cast<size_t>(rank * 3 + round)) % 5);
}

struct Bfloat16 {
  uint16_t bits = 0;
  Bfloat16() = default;
  Bfloat16(int value)  // NOLINT: it converts as numbers do
      : bits(static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(value)) >> 16)) {}
  bool operator==(const Bfloat16&) const = default;
};

class Rank {
 public:
  Rank(ncclComm_t comm, int rank) : comm_(comm), rank_(rank) {
    CHECK(hipSetDevice(rank));
    CHECK(hipStreamCreateWithFlags(&stream_, hipStreamNonBlocking));
  }

  void run() {
    for (int round = 0; round < kRounds; ++round) {
      const auto over_ranks = [&](int start, const std::function<int(int, int)>& op) {
        return [=](size_t i) {
          int total = start;
          for (int r = 0; r < kRanks; ++r) total = op(total, input(r, i, round));
          return total;
        };
      };
      const auto sum = over_ranks(0, std::plus<int>());
      reduce<float>(round, ncclFloat32, ncclSum, sum);
      reduce<Bfloat16>(round, ncclBfloat16, ncclSum, sum);
      reduce<int64_t>(round, ncclInt64, ncclProd, over_ranks(1, std::multiplies<int>()));
      reduce<uint8_t>(round, ncclUint8, ncclMax,
                      over_ranks(0, [](int a, int b) { return std::max(a, b); }));
      reduce<double>(round, ncclFloat64, ncclMin,
                     over_ranks(100, [](int a, int b) { return std::min(a, b); }));
      reduce_scatter(round);
      gather(round);
      broadcast(round);
      messages(round);
    }
    replay();
    crossed();
    split();
    CHECK(ncclCommDestroy(comm_));
    CHECK(hipStreamDestroy(stream_));
  }

 private:
  template <typename T>
  T* array(size_t count, const std::function<int(size_t)>& value) {
    void* memory = nullptr;
    CHECK(hipMalloc(&memory, count * sizeof(T)));
    std::vector<T> host(count);
    for (size_t i = 0; i < count; ++i) host[i] = T(value(i));
    CHECK(hipMemcpyAsync(memory, host.data(), count * sizeof(T), hipMemcpyHostToDevice, stream_));
    return static_cast<T*>(memory);
  }

  // Waits for the stream, compares and frees.
  template <typename T>
  void expect(T* memory, size_t count, const std::function<int(size_t)>& value) {
    std::vector<T> host(count);
    CHECK(hipMemcpyAsync(host.data(), memory, count * sizeof(T), hipMemcpyDeviceToHost, stream_));
    for (size_t i = 0; i < count; ++i) {
      if (host[i] != T(value(i))) check(1, "a result that differs");
    }
    CHECK(hipFree(memory));
  }

  auto own(int round) const {
    return [=, this](size_t i) { return input(rank_, i, round); };
  }

  template <typename T>
  void reduce(int round, ncclDataType_t type, ncclRedOp_t op,
              const std::function<int(size_t)>& expected) {
    T* data = array<T>(kCount, own(round));
    CHECK(ncclAllReduce(data, data, kCount, type, op, comm_, stream_));
    expect(data, kCount, expected);
  }

  void reduce_scatter(int round) {
    auto* from = array<int32_t>(kCount * kRanks, own(round));
    auto* to = array<int32_t>(kCount, [](size_t) { return 0; });
    CHECK(ncclReduceScatter(from, to, kCount, ncclInt32, ncclSum, comm_, stream_));
    expect(to, kCount, [&](size_t i) {
      int total = 0;
      for (int r = 0; r < kRanks; ++r)
        total += input(r, i + kCount * static_cast<size_t>(rank_), round);
      return total;
    });
    CHECK(hipFree(from));
  }

  void gather(int round) {
    auto* data = array<int32_t>(kCount * kRanks, own(round));
    // In place: the own part is where it will be.
    const int32_t* part = data + kCount * static_cast<size_t>(rank_);
    CHECK(ncclAllGather(part, data, kCount, ncclInt32, comm_, stream_));
    expect(data, kCount * kRanks,
           [&](size_t i) { return input(static_cast<int>(i / kCount), i, round); });
  }

  void broadcast(int round) {
    const int root = round % kRanks;
    auto* data = array<int32_t>(kCount, own(round));
    CHECK(ncclBroadcast(data, data, kCount, ncclInt32, root, comm_, stream_));
    expect(data, kCount, [&](size_t i) { return input(root, i, round); });
  }

  // Many to everybody at once, oneself too.
  void messages(int round) {
    constexpr size_t kAll = kCount * kRanks * kMessages;
    auto* from = array<int32_t>(kAll, own(round));
    auto* to = array<int32_t>(kAll, [](size_t) { return 0; });
    CHECK(ncclGroupStart());
    for (size_t message = 0; message < kMessages; ++message) {
      for (int peer = 0; peer < kRanks; ++peer) {
        const size_t at = (static_cast<size_t>(peer) * kMessages + message) * kCount;
        CHECK(ncclSend(from + at, kCount, ncclInt32, peer, comm_, stream_));
        CHECK(ncclRecv(to + at, kCount, ncclInt32, peer, comm_, stream_));
      }
    }
    CHECK(ncclGroupEnd());
    expect(to, kAll, [&](size_t i) {
      const size_t block = kCount * kMessages;
      return input(static_cast<int>(i / block), i % block + static_cast<size_t>(rank_) * block,
                   round);
    });
    CHECK(hipFree(from));
  }

  hipGraphExec_t record_sum(int32_t* data) {
    hipGraph_t graph = nullptr;
    hipGraphExec_t executable = nullptr;
    CHECK(hipStreamBeginCapture(stream_, hipStreamCaptureModeRelaxed));
    CHECK(ncclAllReduce(data, data, kCount, ncclInt32, ncclSum, comm_, stream_));
    CHECK(hipStreamEndCapture(stream_, &graph));
    CHECK(hipGraphInstantiate(&executable, graph, nullptr, nullptr, 0));
    CHECK(hipGraphDestroy(graph));
    return executable;
  }

  void replay() {
    auto* data = array<int32_t>(kCount, [](size_t) { return 1; });
    CHECK(hipStreamSynchronize(stream_));
    hipGraphExec_t executable = record_sum(data);
    for (int i = 0; i < 3; ++i) CHECK(hipGraphLaunch(executable, stream_));
    expect(data, kCount, [](size_t) { return kRanks * kRanks * kRanks; });
    CHECK(hipGraphExecDestroy(executable));
  }

  // Asked for in one order on two streams, of which odd ranks come late to the first: as they are,
  // and from a graph.
  void crossed() {
    hipStream_t other = nullptr;
    CHECK(hipStreamCreateWithFlags(&other, hipStreamNonBlocking));
    for (const bool recorded : {false, true}) {
      auto* sums = array<int32_t>(kCount, [](size_t) { return 1; });
      auto* told = array<float>(kCount / 2, [&](size_t) { return rank_; });
      CHECK(hipStreamSynchronize(stream_));
      hipGraphExec_t executable = nullptr;
      if (recorded) executable = record_sum(sums);
      if (rank_ % 2 == 1) CHECK(hipLaunchHostFunc(stream_, come_late, nullptr));
      if (recorded) {
        CHECK(hipGraphLaunch(executable, stream_));
        CHECK(hipGraphExecDestroy(executable));
      } else {
        CHECK(ncclAllReduce(sums, sums, kCount, ncclInt32, ncclSum, comm_, stream_));
      }
      CHECK(ncclBroadcast(told, told, kCount / 2, ncclFloat32, 2, comm_, other));
      CHECK(hipStreamSynchronize(other));
      expect(sums, kCount, [](size_t) { return kRanks; });
      expect(told, kCount / 2, [](size_t) { return 2; });
    }
    CHECK(hipStreamDestroy(other));
  }

  static void come_late(void*) { std::this_thread::sleep_for(std::chrono::milliseconds(50)); }

  // Odd and even ranks, each in the opposite order; and a part for all but one.
  void split() {
    for (int round = 0; round < 3; ++round) {
      ncclComm_t part = nullptr;
      int ranks = 0;
      CHECK(ncclCommSplit(comm_, rank_ % 2, -rank_, &part, nullptr));
      CHECK(ncclCommCount(part, &ranks));
      if (ranks != kRanks / 2) check(1, "the size of a part");
      auto* own = array<int32_t>(1, [&](size_t) { return rank_; });
      auto* all = array<int32_t>(kRanks / 2, [](size_t) { return 0; });
      CHECK(ncclAllGather(own, all, 1, ncclInt32, part, stream_));
      expect(all, kRanks / 2, [&](size_t i) { return rank_ % 2 + (i == 0 ? 2 : 0); });
      CHECK(hipFree(own));
      CHECK(ncclCommDestroy(part));
    }
    ncclComm_t most = nullptr;
    CHECK(ncclCommSplit(comm_, rank_ == 0 ? -1 : 0, 0, &most, nullptr));
    if ((most == nullptr) != (rank_ == 0)) check(1, "who has a part");
    if (most != nullptr) CHECK(ncclCommDestroy(most));
  }

  ncclComm_t comm_;
  int rank_;
  hipStream_t stream_ = nullptr;
};

// The ranks of this process: every `processes`-th.
void run_ranks(const ncclUniqueId& id, int process, int processes) {
  std::vector<ncclComm_t> comms(kRanks, nullptr);
  CHECK(ncclGroupStart());
  for (int rank = process; rank < kRanks; rank += processes) {
    CHECK(ncclCommInitRankConfig(&comms[static_cast<size_t>(rank)], kRanks, id, rank, nullptr));
  }
  CHECK(ncclGroupEnd());
  std::vector<std::thread> threads;
  for (int rank = process; rank < kRanks; rank += processes) {
    threads.emplace_back([&, rank] { Rank(comms[static_cast<size_t>(rank)], rank).run(); });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace

int main() {
  // Children are made before anything has threads.
  ncclUniqueId id;
  CHECK(ncclGetUniqueId(&id));
  const pid_t child = fork();
  run_ranks(id, child == 0, 2);
  if (child == 0) return 0;
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) check(1, "the other process");
  CHECK(ncclGetUniqueId(&id));
  run_ranks(id, 0, 1);
  return 0;
}
