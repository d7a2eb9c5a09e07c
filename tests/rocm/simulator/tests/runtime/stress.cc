// Threads that use streams, events, graphs and memory of two devices at once. It launches no
// kernel: it is built under sanitizers, which look for races and for use of freed memory in the
// runtime.
#include <hip/hip_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kThreads = 4;
constexpr int kRounds = 100;
constexpr int kReplays = 3;
constexpr size_t kBytes = 4096;

void check(hipError_t error, const char* what) {
  if (error == hipSuccess) return;
  std::fprintf(stderr, "%s gave %d\n", what, static_cast<int>(error));
  std::abort();
}
#define CHECK(call) check(call, #call)

hipStream_t create_stream() {
  hipStream_t stream = nullptr;
  CHECK(hipStreamCreateWithFlags(&stream, hipStreamNonBlocking));
  return stream;
}

unsigned char* allocate() {
  void* memory = nullptr;
  CHECK(hipMalloc(&memory, kBytes));
  return static_cast<unsigned char*>(memory);
}

// A graph that copies `from` to `to`, captured on a stream of its own.
hipGraphExec_t capture_copy(void* to, const void* from) {
  hipStream_t stream = create_stream();
  hipGraph_t graph = nullptr;
  hipGraphExec_t executable = nullptr;
  CHECK(hipStreamBeginCapture(stream, hipStreamCaptureModeRelaxed));
  CHECK(hipMemcpyAsync(to, from, kBytes, hipMemcpyDeviceToDevice, stream));
  CHECK(hipStreamEndCapture(stream, &graph));
  CHECK(hipGraphInstantiate(&executable, graph, nullptr, nullptr, 0));
  CHECK(hipGraphDestroy(graph));
  CHECK(hipStreamDestroy(stream));
  return executable;
}

void round(int value) {
  hipStream_t first = create_stream();
  hipStream_t second = create_stream();
  hipEvent_t event = nullptr;
  CHECK(hipEventCreateWithFlags(&event, hipEventDisableTiming));
  unsigned char* one = allocate();
  unsigned char* other = allocate();
  hipGraphExec_t graph = capture_copy(other, one);
  CHECK(hipMemsetAsync(one, value, kBytes, first));
  CHECK(hipEventRecord(event, first));
  CHECK(hipStreamWaitEvent(second, event, 0));
  for (int i = 0; i < kReplays; ++i) CHECK(hipGraphLaunch(graph, second));
  CHECK(hipGraphExecDestroy(graph));
  std::vector<unsigned char> result(kBytes);
  CHECK(hipMemcpyAsync(result.data(), other, kBytes, hipMemcpyDeviceToHost, second));
  for (const unsigned char byte : result) {
    if (byte != value) check(hipErrorUnknown, "a copy");
  }
  CHECK(hipEventDestroy(event));
  CHECK(hipFree(one));
  CHECK(hipStreamDestroy(first));
  CHECK(hipStreamDestroy(second));
  CHECK(hipFree(other));
}

}  // namespace

int main() {
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([thread] {
      CHECK(hipSetDevice(thread % 2));
      for (int i = 0; i < kRounds; ++i) round(1 + (thread * kRounds + i) % 200);
    });
  }
  for (auto& thread : threads) thread.join();
  return 0;
}
