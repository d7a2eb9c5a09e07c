// Dispatch, replay and combine against the oracle, all ranks as threads of this process.
#include <random>

#include "check.h"
#include "exercise.h"
#include "ranks.h"

namespace moriep {
namespace {

constexpr Routing kRoutings[] = {Routing::kUniform, Routing::kOneExpert, Routing::kInvalid,
                                 Routing::kDuplicates, Routing::kNone};
constexpr RowType kTypes[] = {RowType::kF32, RowType::kBF16, RowType::kF16, RowType::kU8};

void run_case(Group& group, const Case& test) {
  const Oracle want(test);
  for (const Status& status :
       run_threads(group, [&](LocalRank& me) { return Exercise(me, test, want).run(); })) {
    CHECK_OK(status);
  }
}

// Fills both halves of every arena with NaN and -1, as far as `bytes`.
void poison_arenas(Group& group, int64_t bytes) {
  for (int32_t rank = 0; rank < group.num_ranks(); ++rank) {
    for (uint32_t half = 0; half < kNumHalves; ++half) {
      std::byte* data = nullptr;
      CHECK_OK(group.local(rank)->arena().half(half, bytes, &data));
      std::memset(data, 0xff, static_cast<size_t>(bytes));
    }
  }
}

TEST(every_group_size_type_and_routing, 60) {
  uint64_t seed = 0;
  for (int32_t num_ranks = 1; num_ranks <= 8; ++num_ranks) {
    const auto group = make_threads(num_ranks);
    for (int64_t num_experts : {int64_t{8}, int64_t{10}}) {
      for (Routing routing : kRoutings) {
        const RowType type = kTypes[seed % 4];
        run_case(*group, {.shape = shape_of(num_ranks, 5, 3, 7, num_experts, 4),
                          .type = type,
                          .routing = routing,
                          .with_scalars = seed % 3 == 0,
                          .seed = ++seed});
        poison_arenas(*group, 1 << 14);
      }
    }
  }
}

TEST(every_type_carries_scalars_or_not, 30) {
  const auto group = make_threads(4);
  for (RowType type : kTypes) {
    for (bool with_scalars : {false, true}) {
      for (uint64_t seed = 0; seed < 6; ++seed) {
        run_case(*group, {.shape = shape_of(4, 9, 4, 16, 10, 8),
                          .type = type,
                          .with_scalars = with_scalars,
                          .seed = seed});
        poison_arenas(*group, 1 << 16);
      }
    }
  }
}

TEST(odd_sizes, 30) {
  uint64_t seed = 100;
  for (int32_t num_ranks : {1, 3, 5}) {
    const auto group = make_threads(num_ranks);
    // No tokens, one of everything, more experts per token than experts, fewer experts than ranks,
    // no columns.
    for (const Shape& shape :
         {shape_of(num_ranks, 0, 2, 4, 6, 4), shape_of(num_ranks, 1, 1, 1, 1, 1),
          shape_of(num_ranks, 3, 5, 3, 2, 2), shape_of(num_ranks, 4, 2, 33, 2, 8),
          shape_of(num_ranks, 4, 2, 0, 6, 4), shape_of(num_ranks, 2, 9, 65, 13, 3)}) {
      for (RowType type : kTypes) {
        run_case(*group,
                 {.shape = shape, .type = type, .with_scalars = seed % 2 == 0, .seed = ++seed});
      }
    }
  }
}

TEST(more_experts_than_the_group_routes_to, 20) {
  const auto group = make_threads(3);
  Shape shape = shape_of(3, 6, 2, 5, 12, 4);
  // ep_moe pads the experts: rank 2 then holds some that no id names, and ids of the padding are
  // dropped.
  shape.num_experts = 7;
  for (Routing routing : kRoutings)
    run_case(*group, {.shape = shape, .routing = routing, .with_scalars = true, .seed = 5});
}

TEST(tokens_of_several_nodes, 30) {
  for (int32_t num_ranks : {1, 2, 3}) {
    const auto group = make_threads(num_ranks);
    for (int64_t num_nodes : {2, 3, 12}) {
      for (Routing routing : kRoutings) {
        Case test{
            .shape = shape_of(num_ranks, 12, 3, 6, 6, 4), .routing = routing, .with_scalars = true};
        test.shape.num_nodes = num_nodes;
        run_case(*group, test);
        test.shape.capacity = 8;
        run_case(*group, test);
        poison_arenas(*group, 1 << 14);
      }
    }
  }
}

TEST(rows_beyond_the_capacity_are_dropped, 30) {
  int64_t dropped = 0;
  for (int32_t num_ranks : {1, 2, 4}) {
    const auto group = make_threads(num_ranks);
    for (int64_t capacity : {4, 8, 12, 20}) {
      for (Routing routing : kRoutings) {
        Case test{
            .shape = shape_of(num_ranks, 8, 3, 6, 6, 4), .routing = routing, .with_scalars = true};
        test.shape.capacity = capacity;
        test.seed = static_cast<uint64_t>(capacity);
        dropped += Oracle(test).num_dropped();
        run_case(*group, test);
        poison_arenas(*group, 1 << 14);
      }
    }
  }
  CHECK(dropped > 100);
}

TEST(sizes_that_grow_and_shrink_on_one_group, 40) {
  const auto group = make_threads(3);
  for (uint64_t step = 0; step < 60; ++step) {
    // Some steps need more than the 2 MiB that are mapped at first, so that halves are mapped
    // again.
    const int64_t num_tokens =
        step % 20 == 13 ? 300 : pick(1, static_cast<int64_t>(step), 0, 0, 12);
    const int64_t hidden_size =
        step % 20 == 13 ? 1024 : pick(2, static_cast<int64_t>(step), 0, 0, 40);
    // The oracle's cost grows with the square of the tokens: few experts and one route suffice for
    // the large ones.
    const int64_t top_k = num_tokens == 300 ? 1 : 1 + pick(3, static_cast<int64_t>(step), 0, 0, 4);
    run_case(*group, {.shape = shape_of(3, num_tokens, top_k, hidden_size, 4, 2),
                      .type = kTypes[step % 3],
                      .with_scalars = step % 2 == 0,
                      .seed = step});
  }
}

TEST(step_numbers_wrap, 20) {
  const auto group = make_threads(3);
  for (int32_t rank = 0; rank < 3; ++rank)
    group->local(rank)->arena().control().posted.store(0xfffffff9u);
  for (uint64_t seed = 0; seed < 8; ++seed) {
    run_case(*group, {.shape = shape_of(3, 4, 2, 8, 6, 4), .with_scalars = true, .seed = seed});
  }
  CHECK_EQ(group->local(0)->arena().control().posted.load(), 0xfffffff9u + 24);
}

// Dispatch of normal numbers and combine of what it gave: sums now round.
std::vector<std::byte> round_trip(LocalRank& me, const Oracle& inputs, const Case& test,
                                  Status* status) {
  const Shape& shape = test.shape;
  const int64_t row_bytes = shape.hidden_size * element_bytes(test.type);
  std::mt19937 random(static_cast<uint32_t>(me.rank()));
  std::normal_distribution<float> normal;
  auto x = poisoned(shape.num_tokens * row_bytes);
  for (int64_t i = 0; i < shape.num_tokens * shape.hidden_size; ++i) {
    const float value = normal(random);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    if (test.type == RowType::kF32) reinterpret_cast<float*>(x.data())[i] = value;
    if (test.type == RowType::kBF16)
      reinterpret_cast<uint16_t*>(x.data())[i] = static_cast<uint16_t>(bits >> 16);
    if (test.type == RowType::kF16)
      reinterpret_cast<_Float16*>(x.data())[i] = static_cast<_Float16>(value);
  }
  std::vector<float> weights(static_cast<size_t>(shape.num_routes()), 1.0f);
  auto rows = poisoned(shape.capacity * row_bytes);
  auto y = poisoned(shape.num_tokens * row_bytes);
  std::vector<float> row_weights(static_cast<size_t>(shape.capacity));
  std::vector<int32_t> group_sizes(static_cast<size_t>(shape.num_local_experts));
  std::vector<int32_t> routes(static_cast<size_t>(shape.num_ranks * shape.num_routes()));
  std::vector<int32_t> places(static_cast<size_t>(shape.num_ranks * shape.num_tokens));
  const auto* ids = inputs.ids(me.rank()).data();
  const Call call{shape, test.type, 0, ""};
  *status = dispatch(me, call,
                     {x.data(), ids, weights.data(), rows.data(), row_weights.data(),
                      group_sizes.data(), routes.data(), places.data(), nullptr, nullptr});
  if (!status->ok()) return {};
  *status = combine(me, call,
                    {rows.data(), nullptr, routes.data(), places.data(), ids, y.data(), nullptr});
  // A token's rows are copies of it, so their sum is a multiple of it: rounded twice at most, per
  // rank and per token.
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    int64_t num_rows = 0;
    for (int64_t k = 0; k < shape.top_k; ++k) num_rows += ids[t * shape.top_k + k] >= 0 ? 1 : 0;
    for (int64_t h = 0; h < shape.hidden_size; ++h) {
      const int64_t i = t * shape.hidden_size + h;
      const double want = static_cast<double>(num_rows) * get(test.type, x.data(), i);
      const double epsilon = test.type == RowType::kF32   ? 1e-6
                             : test.type == RowType::kF16 ? 2e-3
                                                          : 1.6e-2;
      CHECK(std::fabs(get(test.type, y.data(), i) - want) <= epsilon * std::fabs(want) + 1e-7);
    }
  }
  return y;
}

TEST(results_repeat_bit_for_bit, 30) {
  for (RowType type : {RowType::kF32, RowType::kBF16, RowType::kF16}) {
    const Case test{.shape = shape_of(4, 40, 4, 37, 8, 8), .type = type, .seed = 9};
    const Oracle inputs(test);
    std::vector<std::vector<std::byte>> first(4);
    for (int repeat = 0; repeat < 8; ++repeat) {
      // Two groups in turn: the result depends on the inputs alone, not on what an arena held.
      const auto group = make_threads(4);
      if (repeat % 2 == 1) poison_arenas(*group, 1 << 16);
      for (const Status& status : run_threads(*group, [&](LocalRank& me) {
             Status result;
             const auto y = round_trip(me, inputs, test, &result);
             auto& want = first[static_cast<size_t>(me.rank())];
             if (repeat == 0) want = y;
             CHECK(y == want);
             return result;
           })) {
        CHECK_OK(status);
      }
    }
  }
}

TEST(several_groups_at_once, 40) {
  constexpr int kGroups = 4;
  std::vector<std::thread> drivers;
  for (int i = 0; i < kGroups; ++i) {
    drivers.emplace_back([i] {
      const auto group = make_threads(1 + i);
      for (uint64_t seed = 0; seed < 15; ++seed) {
        run_case(*group,
                 {.shape = shape_of(1 + i, 4 + i, 2, 8, 6, 4), .with_scalars = true, .seed = seed});
      }
    });
  }
  for (auto& driver : drivers) driver.join();
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
