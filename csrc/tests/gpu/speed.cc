// Times of the exchanges of one rank, R = 1, in recorded launches: H = 7168 in bfloat16, 8 of 32
// experts. Prints bytes that had to move over time, and that as a share of what a copy reaches.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "exercise.h"
#include "gpu/kernels.h"

namespace moriep::gpu {
namespace {

__global__ void copy_kernel(const uint4* from, uint4* to, int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    to[i] = from[i];
  }
}

float milliseconds(gpuStream_t stream, int repeats, const std::function<void()>& work) {
  gpuGraph_t graph;
  gpuGraphExec_t recorded;
  check_gpu(gpuStreamBeginCapture(stream, gpuStreamCaptureModeRelaxed), "capture");
  for (int i = 0; i < repeats; ++i) work();
  check_gpu(gpuStreamEndCapture(stream, &graph), "capture");
  check_gpu(gpuGraphInstantiate(&recorded, graph, 0), "instantiate");
  gpuEvent_t begin, end;
  check_gpu(gpuEventCreate(&begin), "event");
  check_gpu(gpuEventCreate(&end), "event");
  float best = 1e9;
  for (int batch = 0; batch < 6; ++batch) {
    check_gpu(gpuEventRecord(begin, stream), "event");
    check_gpu(gpuGraphLaunch(recorded, stream), "launch");
    check_gpu(gpuEventRecord(end, stream), "event");
    check_gpu(gpuEventSynchronize(end), "wait");
    float time = 0;
    check_gpu(gpuEventElapsedTime(&time, begin, end), "time");
    if (batch > 0) best = std::min(best, time / static_cast<float>(repeats));
  }
  check_gpu(gpuGraphExecDestroy(recorded), "destroy");
  check_gpu(gpuGraphDestroy(graph), "destroy");
  return best;
}

void run(int repeats, int64_t only_tokens, int num_processors) {
  Group group(1, std::chrono::duration<double>(10), 0);
  CHECK_OK(group.add_local(0, 0));
  gpuStream_t stream;
  check_gpu(gpuStreamCreate(&stream), "stream");
  const int64_t copied = int64_t{1} << 30;
  double copy_speed = 0;
  {
    Array<std::byte> from(copied), to(copied);
    const float time = milliseconds(stream, 4, [&] {
      check_gpu(gpuMemcpyAsync(to.data(), from.data(), copied, gpuMemcpyDeviceToDevice, stream),
                "copy");
    });
    copy_speed = 2.0 * static_cast<double>(copied) / time * 1e-9;
    std::printf("memcpyAsync of 1 GiB: %.2f TB/s read and written\n", copy_speed);
    const auto words = copied / 16;
    const float own = milliseconds(stream, 4, [&] {
      copy_kernel<<<static_cast<int>(words / 1024), 1024, 0, stream>>>(
          reinterpret_cast<const uint4*>(from.data()), reinterpret_cast<uint4*>(to.data()), words);
    });
    const double speed = 2.0 * static_cast<double>(copied) / own * 1e-9;
    std::printf("a copy kernel over 1 GiB: %.2f TB/s\n", speed);
    copy_speed = std::max(copy_speed, speed);
  }
  std::mt19937 random(1);
  for (const int64_t tokens : {128, 1024, 4096, 8192}) {
    if (only_tokens > 0 && tokens != only_tokens) continue;
    int64_t block = 8;
    while (block < 128 && block * 2 <= tokens * 8 / 32 / 4) block *= 2;
    const Shape shape = shape_of(1, tokens, 8, 7168, 32, block);
    std::vector<int32_t> ids;
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<int32_t> all(32);
      for (int i = 0; i < 32; ++i) all[static_cast<size_t>(i)] = i;
      std::shuffle(all.begin(), all.end(), random);
      ids.insert(ids.end(), all.begin(), all.begin() + 8);
    }
    const int64_t row_bytes = 7168 * 2;
    Array<int32_t> rank(std::vector<int32_t>{0}), order(std::vector<int32_t>{0}), order_out(1);
    Array<int32_t> device_ids(ids);
    Array<float> weights(std::vector<float>(ids.size(), 0.5f)), row_weights(shape.capacity);
    Array<std::byte> x(tokens * row_bytes), rows(shape.capacity * row_bytes), y(tokens * row_bytes);
    Array<int32_t> sizes(32), routes(tokens * 8), slots(tokens);
    const Call call{.shape = shape,
                    .type = RowType::kBF16,
                    .rank = rank.data(),
                    .order = order.data(),
                    .order_out = order_out.data(),
                    .stream = stream};
    LocalRank& me = *group.local(0);
    me.num_processors = num_processors;
    const auto dispatched = [&] {
      CHECK_OK(dispatch(me, call,
                        {x.data(), device_ids.data(), weights.data(), rows.data(),
                         row_weights.data(), sizes.data(), routes.data(), slots.data()}));
    };
    const auto replayed = [&] {
      CHECK_OK(replay(me, call, {x.data(), routes.data(), device_ids.data(), rows.data()}));
    };
    const auto combined = [&] {
      CHECK_OK(combine(me, call,
                       {rows.data(), nullptr, routes.data(), slots.data(), device_ids.data(),
                        y.data(), nullptr}));
    };
    const auto say = [&](const char* what, float time, int64_t moved) {
      const double speed = static_cast<double>(moved * row_bytes) / time * 1e-9;
      std::printf("T=%-5lld %-9s %8.1f us  %.2f TB/s  %.2f of copy\n",
                  static_cast<long long>(tokens), what, time * 1e3, speed, speed / copy_speed);
    };
    // Every row of the capacity is written: with a token, or with zeros.
    const float dispatch_time = milliseconds(stream, repeats, dispatched);
    say("dispatch", dispatch_time, tokens + shape.capacity);
    Array<int32_t> counts(1 << 20);
    Array<uint32_t> written(shape.capacity / 32 + 1);
    PlanArgs plan{.sizes = {1, static_cast<int32_t>(tokens), 8, 32, 32, static_cast<int32_t>(block),
                            static_cast<int32_t>(shape.capacity), 1, row_bytes},
                  .step = {Kind::kDispatch, 0, rank.data(), order.data(), order_out.data()},
                  .ids = device_ids.data(),
                  .weights = weights.data(),
                  .tokens_per_chunk = plan_chunk_routes(32) / 8,
                  .counts = counts.data(),
                  .written = written.data(),
                  .routes = routes.data(),
                  .slots = slots.data(),
                  .group_sizes = sizes.data(),
                  .row_weights = row_weights.data()};
    CHECK_OK(group.team(me, &plan.team));
    plan.chunks_per_rank =
        static_cast<int32_t>((tokens + plan.tokens_per_chunk - 1) / plan.tokens_per_chunk);
    const float plan_time =
        milliseconds(stream, repeats, [&] { check_gpu(launch_plan(stream, plan), "plan"); });
    std::printf("T=%-5lld plan      %8.1f us\n", static_cast<long long>(tokens), plan_time * 1e3);
    say("rows only", dispatch_time - plan_time, tokens + shape.capacity);
    say("replay", milliseconds(stream, repeats, replayed), tokens + shape.capacity);
    say("combine", milliseconds(stream, repeats, combined), 9 * tokens);
  }
}

}  // namespace
}  // namespace moriep::gpu

// Arguments: launches in a recording, the only number of tokens to run (0: all), and the number of
// processors to reckon with, which says how many blocks run.
int main(int argc, char** argv) {
  moriep::gpu::run(argc > 1 ? std::atoi(argv[1]) : 20, argc > 2 ? std::atoll(argv[2]) : 0,
                   argc > 3 ? std::atoi(argv[3]) : 132);
  return 0;
}
