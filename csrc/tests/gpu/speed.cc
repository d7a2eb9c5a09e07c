// Times of the exchanges of one rank, R = 1, in recorded launches: H = 7168 in bfloat16, 8 of 32
// experts. Prints bytes that had to move over time, and that as a share of what a copy reaches.
// What was timed is checked after it: every value, against the routing sorted on the host.
#include <cstdlib>
#include <numeric>
#include <random>

#include "filled.h"
#include "gpu/kernels.h"
#include "pair.h"
#include "timing.h"

namespace moriep::gpu {
namespace {

constexpr int64_t kHidden = 7168;
constexpr int64_t kRowBytes = kHidden * 2;
constexpr int32_t kExperts = 32;
constexpr int32_t kTopK = 8;

__global__ void copy_kernel(const uint4* from, uint4* to, int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += stride) {
    to[i] = from[i];
  }
}

// A routing to 8 of 32 experts, and the plan that follows from it.
struct Routes {
  explicit Routes(int64_t num_tokens)
      : shape(shape_of(1, num_tokens, kTopK, kHidden, kExperts, block_of(num_tokens))),
        routes(static_cast<size_t>(num_tokens * kTopK)),
        owners(static_cast<size_t>(shape.capacity), -1),
        row_weights(static_cast<size_t>(shape.capacity), 0.0f),
        sizes(kExperts, 0) {
    std::mt19937 random(static_cast<uint32_t>(num_tokens));
    std::vector<int32_t> experts(kExperts);
    for (int64_t t = 0; t < num_tokens; ++t) {
      std::iota(experts.begin(), experts.end(), 0);
      std::shuffle(experts.begin(), experts.end(), random);
      for (int k = 0; k < kTopK; ++k) {
        ids.push_back(experts[static_cast<size_t>(k)]);
        weights.push_back(static_cast<float>((t * kTopK + k) % 1021 + 1));
      }
    }
    size_t row = 0;
    for (int32_t e = 0; e < kExperts; ++e) {
      row = (row + static_cast<size_t>(shape.block) - 1) / static_cast<size_t>(shape.block) *
            static_cast<size_t>(shape.block);
      for (size_t route = 0; route < ids.size(); ++route) {
        if (ids[route] != e) continue;
        routes[route] = static_cast<int32_t>(row);
        owners[row] = static_cast<int32_t>(route / kTopK);
        row_weights[row] = weights[route];
        ++sizes[static_cast<size_t>(e)];
        ++row;
      }
    }
  }

  static int64_t block_of(int64_t num_tokens) {
    int64_t block = 8;
    while (block < 128 && block * 2 <= num_tokens * kTopK / kExperts / 4) block *= 2;
    return block;
  }

  Shape shape;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<int32_t> routes;     // the row of each
  std::vector<int32_t> owners;     // the token of each row, or -1
  std::vector<float> row_weights;  // 0 where nobody owns the row
  std::vector<int32_t> sizes;
};

// The exchanges of so many tokens, and their results.
class Exchanges {
 public:
  Exchanges(Group& group, int64_t num_tokens, gpuStream_t stream)
      : me_(*group.local(0)),
        host_(num_tokens),
        owners_(host_.owners),
        rank_(std::vector<int32_t>{0}),
        order_(std::vector<int32_t>{0}),
        order_out_(1),
        ids_(host_.ids),
        weights_(host_.weights),
        x_(num_tokens * kHidden),
        rows_(host_.shape.capacity * kHidden),
        y_(num_tokens * kHidden),
        row_weights_(host_.shape.capacity),
        sizes_(kExperts),
        routes_(num_tokens * kTopK),
        places_(num_tokens),
        counts_(1 << 20),
        marks_(host_.shape.capacity / 32 + 1),
        wrong_(1),
        call_{.shape = host_.shape,
              .type = RowType::kBF16,
              .config = "speed",
              .rank = rank_.data(),
              .order = order_.data(),
              .order_out = order_out_.data(),
              .phase = Phase::kBoth,
              .stream = stream} {
    fill_kernel<<<static_cast<int>(num_tokens), kCheckThreads>>>(x_.data(), nullptr, kHidden, 0,
                                                                 kSeedX);
    check_gpu(gpuGetLastError(), "fill");
    const int64_t chunk = plan_chunk_routes(kExperts) / kTopK;
    plan_ = PlanArgs{.team = {},
                     .sizes = {1, static_cast<int32_t>(num_tokens), kTopK, kExperts, kExperts,
                               static_cast<int32_t>(host_.shape.block),
                               static_cast<int32_t>(host_.shape.capacity), 1, 0, 1, kRowBytes},
                     .step = {Kind::kDispatch, 0, rank_.data(), order_.data(), order_out_.data()},
                     .staged = {},
                     .ids = ids_.data(),
                     .weights = weights_.data(),
                     .tokens_per_chunk = static_cast<int32_t>(chunk),
                     .chunks_per_node = static_cast<int32_t>((num_tokens + chunk - 1) / chunk),
                     .counts = counts_.data(),
                     .written = marks_.data(),
                     .routes = routes_.data(),
                     .places = places_.data(),
                     .group_sizes = sizes_.data(),
                     .row_weights = row_weights_.data(),
                     .words = nullptr,
                     .all_words = nullptr};
    CHECK_OK(group.team(me_, &plan_.team));
  }

  const Shape& shape() const { return host_.shape; }

  void dispatch(Wire wire = Wire::kRows) {
    Call call = call_;
    call.wire = wire;
    CHECK_OK(
        gpu::dispatch(me_, call,
                      {bytes(x_), ids_.data(), weights_.data(), bytes(rows_), row_weights_.data(),
                       sizes_.data(), routes_.data(), places_.data(), nullptr, nullptr}));
  }
  void plan() { check_gpu(launch_plan(static_cast<gpuStream_t>(call_.stream), plan_), "plan"); }
  void replay() {
    CHECK_OK(gpu::replay(me_, call_, {bytes(x_), routes_.data(), ids_.data(), bytes(rows_)}));
  }
  void combine() {
    CHECK_OK(gpu::combine(
        me_, call_,
        {bytes(rows_), nullptr, routes_.data(), places_.data(), ids_.data(), bytes(y_), nullptr}));
  }

  // Before anything that makes a plan.
  void poison_plan() {
    routes_.poison();
    places_.poison();
    sizes_.poison();
    row_weights_.poison();
  }
  void poison_rows() { rows_.poison(); }
  // Before combine: rows as experts would leave them.
  void make_expert_rows() {
    y_.poison();
    fill_kernel<<<static_cast<int>(host_.shape.capacity), kCheckThreads>>>(
        rows_.data(), owners_.data(), kHidden, 0, kSeedRows);
    check_gpu(gpuGetLastError(), "fill");
    check_gpu(gpuDeviceSynchronize(), "fill");
  }

  // Each says whether all that was written is right. A plan alone writes no weight of a row that
  // nobody owns.
  bool plan_is_right(bool whole) const {
    const auto weights = row_weights_.host();
    for (size_t row = 0; row < weights.size(); ++row) {
      const bool seen = whole || host_.owners[row] >= 0;
      if (seen && !(weights[row] == host_.row_weights[row])) return false;
    }
    for (const int32_t place : places_.host()) {
      if (place < 0) return false;
    }
    return routes_.host() == host_.routes && sizes_.host() == host_.sizes;
  }
  bool rows_are_right() {
    return none_wrong([&](uint32_t* wrong) {
      check_rows_kernel<<<static_cast<int>(host_.shape.capacity), kCheckThreads>>>(
          rows_.data(), owners_.data(), kHidden, kSeedX, wrong);
    });
  }
  bool sums_are_right() {
    const Array<int32_t> routes(host_.routes);
    return none_wrong([&](uint32_t* wrong) {
      check_sums_kernel<<<static_cast<int>(host_.shape.num_tokens), kCheckThreads>>>(
          y_.data(), routes.data(), kTopK, kHidden, kSeedRows, wrong);
    });
  }

  BlockLimits& limits() { return me_.max_blocks; }

 private:
  static constexpr uint32_t kSeedX = 0, kSeedRows = 1;

  static std::byte* bytes(const Array<uint16_t>& array) {
    return reinterpret_cast<std::byte*>(array.data());
  }

  template <typename F>
  bool none_wrong(const F& count) {
    check_gpu(gpuMemset(wrong_.data(), 0, sizeof(uint32_t)), "count");
    count(wrong_.data());
    check_gpu(gpuGetLastError(), "check");
    check_gpu(gpuDeviceSynchronize(), "check");
    return wrong_.host()[0] == 0;
  }

  LocalRank& me_;
  const Routes host_;
  const Array<int32_t> owners_, rank_, order_, order_out_;
  const Array<int32_t> ids_;
  const Array<float> weights_;
  Array<uint16_t> x_, rows_, y_;
  Array<float> row_weights_;
  Array<int32_t> sizes_, routes_, places_, counts_;
  Array<uint32_t> marks_, wrong_;
  const Call call_;
  PlanArgs plan_;
};

class Bench {
 public:
  Bench(int repeats, const char* path)
      : repeats_(repeats),
        lanes_(1),
        group_(1, std::chrono::duration<double>(10), 0),
        report_(path, Fields()
                          .text("program", "speed")
                          .text("device", device_name())
                          .integer("hidden_size", kHidden)
                          .text("dtype", "bfloat16")
                          .integer("num_experts", kExperts)
                          .integer("top_k", kTopK)) {
    CHECK_OK(group_.add_local(0, 0));
    check_gpu(gpuDeviceGetAttribute(&num_processors_, gpuDevAttrMultiProcessorCount, 0),
              "processors");
  }

  int run(int64_t only_tokens, const std::vector<int>& blocks_per_processor) {
    copy();
    for (const int64_t tokens : {128, 1024, 4096, 8192}) {
      if (only_tokens > 0 && tokens != only_tokens) continue;
      for (const int blocks : blocks_per_processor) exchanges(tokens, blocks);
      pairs(tokens);
    }
    return report_.finish();
  }

 private:
  Time time(int repeats, const std::function<void()>& work) {
    return lanes_.recorded(repeats, [&](int) { work(); });
  }

  void copy() {
    const int64_t copied = int64_t{1} << 30;
    const Array<std::byte> from(copied), to(copied);
    const auto words = copied / 16;
    const auto done = [&](const char* what, const Time& time) {
      const double speed = 2.0 * static_cast<double>(copied) / time.best_us * 1e-6;
      copy_speed_ = std::max(copy_speed_, speed);
      const bool right = to.host() == from.host();
      std::printf("%s over 1 GiB: %.2f TB/s read and written%s\n", what, speed,
                  right ? "" : " WRONG");
      report_.add(Fields().text("op", what).time(time).number("tb_s", speed), right);
    };
    for (const bool kernel : {false, true}) {
      check_gpu(gpuMemset(from.data(), kernel ? 1 : 2, static_cast<size_t>(copied)), "fill");
      done(kernel ? "copy kernel" : "memcpyAsync", time(4, [&] {
             if (kernel) {
               copy_kernel<<<static_cast<int>(words / 1024), 1024, 0, lanes_.stream(0)>>>(
                   reinterpret_cast<const uint4*>(from.data()), reinterpret_cast<uint4*>(to.data()),
                   words);
             } else {
               check_gpu(gpuMemcpyAsync(to.data(), from.data(), static_cast<size_t>(copied),
                                        gpuMemcpyDeviceToDevice, lanes_.stream(0)),
                         "copy");
             }
           }));
    }
  }

  // With so many blocks a processor at most in pull and in reduce; 0 leaves what the library takes.
  void exchanges(int64_t tokens, int blocks) {
    Exchanges all(group_, tokens, lanes_.stream(0));
    const BlockLimits usual = all.limits();
    if (blocks > 0)
      all.limits().pull = all.limits().fp8_pull = all.limits().reduce = blocks * num_processors_;
    const auto say = [&](const char* what, const Time& time, int64_t rows, bool right) {
      const double speed = static_cast<double>(rows * kRowBytes) / time.best_us * 1e-6;
      std::printf("T=%-5lld limit %-4d %-19s %8.1f us (median %.1f)",
                  static_cast<long long>(tokens), blocks, what, time.best_us, time.median_us);
      Fields fields = Fields()
                          .integer("tokens", tokens)
                          .integer("blocks_per_processor", blocks)
                          .text("op", what)
                          .time(time);
      if (rows > 0) {
        std::printf("  %.2f TB/s  %.2f of copy", speed, speed / copy_speed_);
        fields.number("tb_s", speed).number("of_copy", speed / copy_speed_);
      }
      std::printf("%s\n", right ? "" : "  WRONG");
      report_.add(fields, right);
    };
    // Every row of the capacity is written: with a token, or with zeros.
    const int64_t dispatched = tokens + all.shape().capacity;
    all.poison_plan();
    all.poison_rows();
    const Time whole = time(repeats_, [&] { all.dispatch(); });
    const bool right = all.plan_is_right(true) && all.rows_are_right();
    say("dispatch", whole, dispatched, right);
    all.poison_plan();
    all.poison_rows();
    const Time fp8 = time(repeats_, [&] { all.dispatch(Wire::kFp8); });
    say("dispatch, fp8 wire", fp8, dispatched, all.plan_is_right(true) && all.rows_are_right());
    all.poison_plan();
    const Time plan = time(repeats_, [&] { all.plan(); });
    say("plan", plan, 0, all.plan_is_right(false));
    say("rows only", {whole.best_us - plan.best_us, whole.median_us - plan.median_us}, dispatched,
        right);
    all.poison_rows();
    const Time replay = time(repeats_, [&] { all.replay(); });
    say("replay", replay, dispatched, all.rows_are_right());
    all.make_expert_rows();
    const Time combine = time(repeats_, [&] { all.combine(); });
    say("combine", combine, 9 * tokens, all.sums_are_right());
    CHECK_OK(group_.failure());
    all.limits() = usual;
  }

  // Both ranks of a group on this device; beside bfloat16 and the fp8 wire the bytes of packed
  // tokens, which are what a wire costs whose rows other kernels pack before and unpack after.
  void pairs(int64_t tokens) {
    constexpr int64_t kPacked = kHidden / kFp8Group * (kFp8Group + 4);
    const Case plain = Pair::case_of(tokens, kHidden, RowType::kBF16, Wire::kRows);
    const Oracle routing(plain);
    Group group(2, std::chrono::duration<double>(10), int64_t{256} << 20);
    for (int32_t r = 0; r < 2; ++r) CHECK_OK(group.add_local(r, 0));
    CHECK_OK(group.link_locals());
    const auto measure = [&](const char* what, const Case& test) {
      Pair pair(group, routing, test, lanes_.stream(0));
      pair.poison_rows();
      const Time taken = time(repeats_, [&] { pair.dispatch(); });
      const bool right = pair.rows_are_right();
      CHECK_OK(group.failure());
      std::printf("T=%-5lld two ranks  %-19s %8.1f us (median %.1f) for both%s\n",
                  static_cast<long long>(tokens), what, taken.best_us, taken.median_us,
                  right ? "" : "  WRONG");
      report_.add(
          Fields().integer("tokens", tokens).integer("ranks", 2).text("op", what).time(taken),
          right);
    };
    measure("dispatch", plain);
    measure("dispatch by put",
            Pair::case_of(tokens, kHidden, RowType::kBF16, Wire::kRows, Delivery::kPut));
    measure("dispatch, fp8 wire", Pair::case_of(tokens, kHidden, RowType::kBF16, Wire::kFp8));
    measure("by put, fp8 wire",
            Pair::case_of(tokens, kHidden, RowType::kBF16, Wire::kFp8, Delivery::kPut));
    measure("dispatch of bytes", Pair::case_of(tokens, kPacked, RowType::kU8, Wire::kRows));
  }

  const int repeats_;
  int num_processors_ = 0;
  double copy_speed_ = 0;
  Lanes lanes_;
  Group group_;
  Report report_;
};

// "0,4,8" as numbers.
std::vector<int> numbers_of(const char* text) {
  std::vector<int> numbers;
  for (char* end = nullptr; *text != '\0'; text = *end == ',' ? end + 1 : end) {
    numbers.push_back(static_cast<int>(std::strtol(text, &end, 10)));
    if (end == text) check::fail(__FILE__, __LINE__, std::string("no number: ") + text);
  }
  return numbers;
}

}  // namespace
}  // namespace moriep::gpu

// Arguments: launches in a recording; the only number of tokens to run (0: all); the most blocks a
// processor in pull and in reduce, each of a list like 0,4,8 in turn (0: as the library takes
// them); and a file for the results as JSON.
int main(int argc, char** argv) {
  using namespace moriep::gpu;
  Bench bench(argc > 1 ? std::atoi(argv[1]) : 20, argc > 4 ? argv[4] : nullptr);
  return bench.run(argc > 2 ? std::atoll(argv[2]) : 0, numbers_of(argc > 3 ? argv[3] : "0"));
}
