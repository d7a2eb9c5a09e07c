// Expanding arrivals to rows and gathering rows back to them, against the oracle of the exchanges:
// a rank's arrivals are what the other ranks would have sent it, in an order of the test's choice.
#include "gpu/expand.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "exercise.h"

namespace moriep::gpu {
namespace {

// One rank's arrivals of a case, on the host. What lies beyond the count is what a transport may
// have left there: ids of real experts, sources of real tokens, and NaN.
struct Sent {
  std::vector<int32_t> ids, sources, count;
  std::vector<float> weights;
  std::vector<std::byte> tokens, tokens_again;
};

int64_t num_group_tokens(const Shape& shape) { return shape.num_ranks * shape.num_tokens; }

int64_t row_bytes_of(const Case& test) { return test.shape.hidden_size * element_bytes(test.type); }

bool goes_here(const Case& test, const Oracle& want, int32_t rank, int64_t source, int64_t token) {
  for (int64_t k = 0; k < test.shape.top_k; ++k) {
    if (want.route(rank, source, token, k) != kNotHere) return true;
  }
  return false;
}

Sent send(const Case& test, const Oracle& want, int32_t rank, uint64_t order) {
  const Shape& shape = test.shape;
  std::vector<int32_t> came, others;
  for (int64_t token = 0; token < num_group_tokens(shape); ++token) {
    const bool here =
        goes_here(test, want, rank, token / shape.num_tokens, token % shape.num_tokens);
    (here ? came : others).push_back(static_cast<int32_t>(token));
  }
  for (size_t i = came.size(); i > 1; --i) {
    std::swap(came[i - 1], came[static_cast<size_t>(pick(order, rank, static_cast<int64_t>(i), 0,
                                                         static_cast<int64_t>(i)))]);
  }
  Sent sent;
  sent.count = {static_cast<int32_t>(came.size())};
  sent.sources = came;
  sent.sources.insert(sent.sources.end(), others.begin(), others.end());
  sent.tokens.assign(sent.sources.size() * static_cast<size_t>(row_bytes_of(test)),
                     std::byte{0xff});
  sent.tokens_again = sent.tokens;
  for (size_t i = 0; i < sent.sources.size(); ++i) {
    const int64_t source = sent.sources[i] / std::max<int64_t>(1, shape.num_tokens);
    const int64_t token = sent.sources[i] % std::max<int64_t>(1, shape.num_tokens);
    const bool real = i < came.size();
    for (int64_t k = 0; k < shape.top_k; ++k) {
      const auto id = want.ids(source)[static_cast<size_t>(token * shape.top_k + k)];
      const auto local = static_cast<int32_t>(rank * shape.num_local_experts);
      sent.ids.push_back(real ? id : local);
      sent.weights.push_back(real ? static_cast<float>(want.weight(source, token, k)) : NAN);
    }
    for (int64_t h = 0; real && h < shape.hidden_size; ++h) {
      const int64_t at = static_cast<int64_t>(i) * shape.hidden_size + h;
      put(test.type, sent.tokens.data(), at, want.x(source, token, h));
      put(test.type, sent.tokens_again.data(), at, want.x(source, token, h + 1000));
    }
    // Without an order of its own in half of the cases: a token that came may then be named again.
    if (!real && order % 2 == 1) sent.sources[i] = came.empty() ? -7 : came[0];
  }
  return sent;
}

void expect(const Case& test, int32_t rank, const char* what, int64_t index, double got,
            double want) {
  if (got == want) return;
  const Shape& shape = test.shape;
  std::ostringstream text;
  text << what << "[" << index << "] on rank " << rank << " is " << got << " and not " << want
       << "; R=" << shape.num_ranks << " T=" << shape.num_tokens << " K=" << shape.top_k
       << " H=" << shape.hidden_size << " E=" << shape.num_experts << " block=" << shape.block
       << " C=" << shape.capacity << " type=" << static_cast<int>(test.type)
       << " routing=" << static_cast<int>(test.routing) << " seed=" << test.seed;
  check::fail(__FILE__, __LINE__, text.str());
}

class Adapter {
 public:
  Adapter(const Case& test, const Oracle& want, int32_t rank, uint64_t order)
      : test_(test),
        want_(want),
        rank_(rank),
        sent_(send(test, want, rank, order)),
        rank_of_me_(std::vector<int32_t>{rank}),
        count_(sent_.count),
        sources_(sent_.sources),
        ids_(sent_.ids),
        weights_(sent_.weights),
        tokens_(sent_.tokens),
        tokens_again_(sent_.tokens_again),
        rows_(test.shape.capacity * row_bytes_of(test)),
        row_weights_(test.shape.capacity),
        group_sizes_(test.shape.num_local_experts),
        routes_(test.shape.num_ranks * test.shape.num_routes()),
        workspace_(expand_words(test.shape)),
        expert_rows_(test.shape.capacity * row_bytes_of(test)),
        scalars_(test.shape.capacity),
        given_(static_cast<int64_t>(sent_.tokens.size())),
        token_scalars_(static_cast<int64_t>(sent_.ids.size())) {
    // Rows that nobody owns stay poisoned: gather must not read them.
    auto rows = expert_rows_.host();
    auto scalars = scalars_.host();
    for (int64_t row = 0; row < test.shape.capacity; ++row) {
      if (want.rows(rank)[static_cast<size_t>(row)].source < 0) continue;
      scalars[static_cast<size_t>(row)] = static_cast<float>(want.row_scalar(rank, row));
      for (int64_t h = 0; test.type != RowType::kU8 && h < test.shape.hidden_size; ++h) {
        put(test.type, rows.data(), row * test.shape.hidden_size + h,
            want.expert_row(rank, row, h));
      }
    }
    check_gpu(gpuMemcpy(expert_rows_.data(), rows.data(), rows.size(), gpuMemcpyDefault), "rows");
    check_gpu(gpuMemcpy(scalars_.data(), scalars.data(), scalars.size() * 4, gpuMemcpyDefault),
              "scalars");
  }

  void expand() {
    CHECK_OK(gpu::expand(
        call(), {tokens_.data(), ids_.data(), weights_.data(), rank_of_me_.data(), rows_.data(),
                 row_weights_.data(), group_sizes_.data(), routes_.data(), workspace_.data()}));
  }
  void reexpand() {
    CHECK_OK(gpu::reexpand(
        call(), {tokens_again_.data(), routes_.data(), rows_.data(), workspace_.data()}));
  }
  void gather() {
    const bool carried = test_.with_scalars;
    CHECK_OK(gpu::gather(call(),
                         {expert_rows_.data(), carried ? scalars_.data() : nullptr, routes_.data(),
                          given_.data(), carried ? token_scalars_.data() : nullptr}));
  }

  void poison_rows() { rows_.poison(); }
  void clear_rows() { check_gpu(gpuMemset(rows_.data(), 0, rows_.host().size()), "rows"); }
  void spoil_routes(int32_t row) {
    const std::vector<int32_t> bad(routes_.host().size(), row);
    check_gpu(gpuMemcpy(routes_.data(), bad.data(), bad.size() * 4, gpuMemcpyDefault), "spoil");
  }
  void spoil_arrivals() {
    const std::vector<int32_t> bad(sources_.host().size(), INT32_MAX);
    check_gpu(gpuMemcpy(sources_.data(), bad.data(), bad.size() * 4, gpuMemcpyDefault), "sources");
    const int32_t count = INT32_MAX;
    check_gpu(gpuMemcpy(count_.data(), &count, 4, gpuMemcpyDefault), "count");
  }

  void lose_arrivals() {
    const int32_t count = -1;
    check_gpu(gpuMemcpy(count_.data(), &count, 4, gpuMemcpyDefault), "count");
  }
  void check_poison() const {
    for (const std::byte byte : rows_.host()) CHECK(byte == std::byte{0xff});
    for (const float weight : row_weights_.host()) CHECK(std::isnan(weight));
    for (const int32_t size : group_sizes_.host()) CHECK(size == 0);
  }

  void check_expand() const {
    const Shape& shape = test_.shape;
    const auto group_sizes = group_sizes_.host();
    const auto routes = routes_.host();
    const auto row_weights = row_weights_.host();
    for (int64_t e = 0; e < shape.num_local_experts; ++e) {
      expect("group_sizes", e, group_sizes[static_cast<size_t>(e)],
             want_.group_sizes(rank_)[static_cast<size_t>(e)]);
    }
    for (int64_t route = 0; route < shape.num_ranks * shape.num_routes(); ++route) {
      const int64_t token = route / shape.top_k;
      expect("routes", route, routes[static_cast<size_t>(route)],
             want_.route(rank_, token / shape.num_tokens, token % shape.num_tokens,
                         route % shape.top_k));
    }
    for (int64_t row = 0; row < shape.capacity; ++row) {
      const Oracle::Row& owner = want_.rows(rank_)[static_cast<size_t>(row)];
      expect("row_weights", row, row_weights[static_cast<size_t>(row)],
             owner.source < 0 ? 0.0 : want_.weight(owner.source, owner.token, owner.k));
    }
    check_rows("rows", 0);
  }

  void check_rows(const char* what, int64_t shift) const {
    const int64_t hidden_size = test_.shape.hidden_size;
    const auto rows = rows_.host();
    std::vector<std::byte> want(static_cast<size_t>(row_bytes_of(test_)));
    for (int64_t row = 0; row < test_.shape.capacity; ++row) {
      const Oracle::Row& owner = want_.rows(rank_)[static_cast<size_t>(row)];
      for (int64_t h = 0; h < hidden_size; ++h) {
        put(test_.type, want.data(), h,
            owner.source < 0 ? 0.0 : want_.x(owner.source, owner.token, h + shift));
        expect(what, row * hidden_size + h, get(test_.type, rows.data(), row * hidden_size + h),
               get(test_.type, want.data(), h));
      }
    }
  }

  void check_gather() const {
    const Shape& shape = test_.shape;
    const auto given = given_.host();
    const auto token_scalars = token_scalars_.host();
    const size_t count = static_cast<size_t>(sent_.count[0]);
    for (size_t i = 0; i < count; ++i) {
      const int64_t source = sent_.sources[i] / shape.num_tokens;
      const int64_t token = sent_.sources[i] % shape.num_tokens;
      for (int64_t h = 0; h < shape.hidden_size; ++h) {
        double sum = 0;
        for (int64_t k = 0; k < shape.top_k; ++k) {
          const int32_t row = want_.route(rank_, source, token, k);
          if (row >= 0) sum += want_.expert_row(rank_, row, h);
        }
        const int64_t at = static_cast<int64_t>(i) * shape.hidden_size + h;
        expect("tokens", at, get(test_.type, given.data(), at), sum);
      }
      for (int64_t k = 0; test_.with_scalars && k < shape.top_k; ++k) {
        const int32_t row = want_.route(rank_, source, token, k);
        const size_t at = i * static_cast<size_t>(shape.top_k) + static_cast<size_t>(k);
        expect("token_scalars", static_cast<int64_t>(at), token_scalars[at],
               row < 0 ? 0.0 : want_.row_scalar(rank_, row));
      }
    }
    // The rest is not written.
    for (size_t at = count * static_cast<size_t>(row_bytes_of(test_)); at < given.size(); ++at) {
      CHECK(given[at] == std::byte{0xff});
    }
    for (size_t at = count * static_cast<size_t>(shape.top_k); at < token_scalars.size(); ++at) {
      CHECK(std::isnan(token_scalars[at]));
    }
  }

  std::vector<std::byte> rows() const { return rows_.host(); }
  std::vector<int32_t> routes() const { return routes_.host(); }

 private:
  LocalCall call() const {
    return LocalCall{.shape = test_.shape,
                     .type = test_.type,
                     .sources = sources_.data(),
                     .count = count_.data(),
                     .stream = nullptr};
  }
  void expect(const char* what, int64_t index, double got, double want) const {
    gpu::expect(test_, rank_, what, index, got, want);
  }

  const Case test_;
  const Oracle& want_;
  const int32_t rank_;
  const Sent sent_;
  Array<int32_t> rank_of_me_, count_, sources_, ids_;
  Array<float> weights_;
  Array<std::byte> tokens_, tokens_again_;
  Array<std::byte> rows_;
  Array<float> row_weights_;
  Array<int32_t> group_sizes_, routes_, workspace_;
  Array<std::byte> expert_rows_;
  Array<float> scalars_;
  Array<std::byte> given_;
  Array<float> token_scalars_;
};

void check_case(const Case& test) {
  const Oracle want(test);
  for (int32_t rank = 0; rank < test.shape.num_ranks; ++rank) {
    Adapter adapter(test, want, rank, test.seed);
    adapter.expand();
    check_gpu(gpuDeviceSynchronize(), "expand");
    adapter.check_expand();
    adapter.poison_rows();
    adapter.reexpand();
    check_gpu(gpuDeviceSynchronize(), "reexpand");
    adapter.check_rows("rows again", 1000);
    if (test.type == RowType::kU8) continue;
    adapter.gather();
    check_gpu(gpuDeviceSynchronize(), "gather");
    adapter.check_gather();
  }
}

TEST(rows_and_tokens, 300) {
  CHECK_OK(preload_expand_kernels());
  uint64_t seed = 0;
  for (const int32_t num_ranks : {1, 2, 5, 8}) {
    for (const RowType type : {RowType::kF32, RowType::kBF16, RowType::kF16, RowType::kU8}) {
      for (const Routing routing : {Routing::kUniform, Routing::kOneExpert, Routing::kInvalid,
                                    Routing::kDuplicates, Routing::kNone}) {
        const int64_t hidden = std::vector<int64_t>{1, 40, 1111}[++seed % 3];
        Case test{shape_of(num_ranks, 21, 3, hidden, 10, 4, hidden == 40 ? 0.5 : 1.0), type,
                  routing};
        test.with_scalars = hidden != 1 && type != RowType::kU8;
        test.seed = seed;
        check_case(test);
      }
    }
    check_case(Case{shape_of(num_ranks, 0, 2, 16, 4, 8), RowType::kF32});
  }
  check_case(Case{shape_of(3, 300, 8, 24, 64, 16), RowType::kBF16});
  check_case(Case{shape_of(2, 40, 12, 24, 700, 8), RowType::kF32});
  Case far{shape_of(2, 40, 12, 24, 700, 8, 0.25), RowType::kF32, Routing::kUniform};
  far.with_scalars = true;
  check_case(far);
}

TEST(the_order_of_arrivals_does_not_matter, 60) {
  Case test{shape_of(4, 64, 8, 512, 16, 8), RowType::kBF16};
  const Oracle want(test);
  std::vector<std::byte> rows;
  std::vector<int32_t> routes;
  for (const uint64_t order : {0, 1, 2, 3}) {
    Adapter adapter(test, want, 1, order);
    adapter.expand();
    check_gpu(gpuDeviceSynchronize(), "expand");
    if (order == 0) {
      rows = adapter.rows();
      routes = adapter.routes();
    }
    CHECK(adapter.rows() == rows);
    CHECK(adapter.routes() == routes);
  }
}

// A plan and arrivals are the user's arrays by the time they come back.
TEST(indices_that_make_no_sense_reach_no_memory, 60) {
  Case test{shape_of(2, 30, 3, 40, 6, 4), RowType::kF32};
  test.with_scalars = true;
  const Oracle want(test);
  for (const int32_t row : {INT32_MAX, INT32_MIN, static_cast<int32_t>(test.shape.capacity)}) {
    Adapter adapter(test, want, 0, 0);
    adapter.expand();
    adapter.spoil_routes(row);
    adapter.reexpand();
    adapter.gather();
    check_gpu(gpuDeviceSynchronize(), "bad routes");
    for (const std::byte byte : adapter.rows()) CHECK(byte == std::byte{0});
  }
  Adapter adapter(test, want, 0, 0);
  adapter.spoil_arrivals();
  adapter.expand();
  adapter.reexpand();
  adapter.gather();
  check_gpu(gpuDeviceSynchronize(), "bad arrivals");
  for (const std::byte byte : adapter.rows()) CHECK(byte == std::byte{0});
}

// Zeros would look like results, and reach a parameter by way of an average.
TEST(rows_of_a_failed_exchange_are_poison, 60) {
  for (const RowType type : {RowType::kF32, RowType::kBF16, RowType::kU8}) {
    for (const int64_t hidden : {24, 33}) {
      const Case test{shape_of(2, 30, 3, hidden, 6, 4), type};
      const Oracle want(test);
      Adapter adapter(test, want, 1, 0);
      adapter.expand();
      adapter.check_expand();
      adapter.lose_arrivals();
      adapter.reexpand();
      check_gpu(gpuDeviceSynchronize(), "reexpand");
      for (const std::byte byte : adapter.rows()) CHECK(byte == std::byte{0xff});
      adapter.clear_rows();
      adapter.expand();
      check_gpu(gpuDeviceSynchronize(), "expand");
      adapter.check_poison();
      for (const int32_t row : adapter.routes()) CHECK(row == kNotHere);
    }
  }
}

TEST(sizes_that_kernels_cannot_count_are_refused, 10) {
  const LocalCall call{.shape = shape_of(1, 4, 2, 8, 2000, 8), .type = RowType::kF32};
  CHECK_CONTAINS(expand(call, {}).text(), "more than the GPU kernels count");
  CHECK_CONTAINS(reexpand(call, {}).text(), "more than the GPU kernels count");
  CHECK_CONTAINS(gather(call, {}).text(), "more than the GPU kernels count");
}

}  // namespace
}  // namespace moriep::gpu

TEST_MAIN()
