// The rules of an exchange against the plainest way to state them.
#include "moriep/plan.h"

#include <set>

#include "check.h"
#include "moriep/layout.h"
#include "oracle.h"

namespace moriep {
namespace {

Shape sane_shape() {
  return {.num_ranks = 4,
          .num_tokens = 16,
          .top_k = 2,
          .hidden_size = 8,
          .num_experts = 10,
          .num_local_experts = 3,
          .block = 4,
          .capacity = 64};
}

TEST(every_id_has_one_rank_or_none, 10) {
  std::vector<int32_t> ids{INT32_MIN, INT32_MAX};
  for (int32_t id = -3; id < 24; ++id) ids.push_back(id);
  for (int64_t num_ranks = 1; num_ranks <= 9; ++num_ranks) {
    for (int64_t num_experts = 1; num_experts <= 20; ++num_experts) {
      for (int64_t padding = 0; padding < 2; ++padding) {
        Shape shape;
        shape.num_ranks = num_ranks;
        shape.num_experts = num_experts;
        shape.num_local_experts = (num_experts + num_ranks - 1) / num_ranks + padding;
        const Owners owners(shape);
        for (int32_t id : ids) {
          int32_t want = -1;
          for (int64_t rank = 0; rank < num_ranks; ++rank) {
            for (int64_t e = 0; e < shape.num_local_experts; ++e) {
              if (rank * shape.num_local_experts + e == id && id < num_experts)
                want = static_cast<int32_t>(rank);
            }
          }
          CHECK_EQ(owners.rank_of(id), want);
        }
      }
    }
  }
}

TEST(a_token_goes_once_to_each_of_its_ranks_in_order, 10) {
  std::vector<int32_t> got;
  for (int64_t round = 0; round < 3000; ++round) {
    Shape shape;
    shape.num_ranks = 1 + pick(1, round, 0, 0, 9);
    shape.num_experts = 1 + pick(2, round, 0, 0, 30);
    shape.num_local_experts = (shape.num_experts + shape.num_ranks - 1) / shape.num_ranks;
    shape.top_k = 1 + pick(3, round, 0, 0, 12);
    const Owners owners(shape);
    std::vector<int32_t> ids;
    std::set<int32_t> want;
    for (int64_t k = 0; k < shape.top_k; ++k) {
      ids.push_back(static_cast<int32_t>(pick(4, round, k, 0, shape.num_experts + 4) - 2));
      if (owners.rank_of(ids.back()) >= 0) want.insert(owners.rank_of(ids.back()));
    }
    shape.num_tokens = 1;
    CHECK(owners.ranks_of(ids.data(), got) <= shape.max_fanout());
    CHECK(got == std::vector<int32_t>(want.begin(), want.end()));
  }
}

TEST(runs_follow_each_other_at_multiples_of_the_block, 10) {
  for (int64_t round = 0; round < 2000; ++round) {
    const int64_t block = 1 + pick(1, round, 0, 0, 40);
    std::vector<int64_t> counts;
    for (int64_t e = 0; e < pick(2, round, 0, 0, 12); ++e)
      counts.push_back(pick(3, round, e, 0, 100));
    const auto starts = run_starts(counts, block);
    CHECK_EQ(starts.size(), counts.size());
    int64_t next = 0;
    for (size_t e = 0; e < counts.size(); ++e) {
      while (next % block != 0) ++next;
      CHECK_EQ(starts[e], next);
      next += counts[e];
    }
  }
}

TEST(sizes_that_describe_no_layer_are_refused, 10) {
  CHECK_OK(check_shape(sane_shape()));
  const auto expect_refused = [](int64_t Shape::* field, int64_t value) {
    Shape shape = sane_shape();
    shape.*field = value;
    CHECK_EQ(check_shape(shape).code(), Code::kInvalidArgument);
    CHECK_CONTAINS(check_shape(shape).text(), std::to_string(value));
  };
  for (auto field : {&Shape::num_ranks, &Shape::top_k, &Shape::num_experts,
                     &Shape::num_local_experts, &Shape::block, &Shape::capacity}) {
    for (int64_t value : {int64_t{0}, int64_t{-1}, INT64_MIN, int64_t{1} << 31, INT64_MAX})
      expect_refused(field, value);
  }
  for (auto field : {&Shape::num_tokens, &Shape::hidden_size}) {
    for (int64_t value : {int64_t{-1}, INT64_MIN, int64_t{1} << 31, INT64_MAX})
      expect_refused(field, value);
  }
  // One expert more than the ranks can hold; and a product of the two that wraps around to a small
  // number.
  expect_refused(&Shape::num_experts, 13);
  Shape many = sane_shape();
  many.num_local_experts = many.num_experts = (int64_t{1} << 24) + 1;
  CHECK_EQ(check_shape(many).code(), Code::kInvalidArgument);
  expect_refused(&Shape::num_local_experts, int64_t{1} << 62);
  // Places in an arena are int32.
  Shape shape = sane_shape();
  shape.num_tokens = INT32_MAX / 2 + 1;
  CHECK_EQ(check_shape(shape).code(), Code::kInvalidArgument);
  shape.num_tokens = INT32_MAX / 2;
  CHECK_OK(check_shape(shape));
  shape = sane_shape();
  shape.num_tokens = 0;
  shape.hidden_size = 0;
  CHECK_OK(check_shape(shape));
}

TEST(the_largest_sizes_do_not_overflow, 10) {
  Shape shape = sane_shape();
  shape.num_ranks = shape.capacity = shape.block = INT32_MAX;
  shape.top_k = 1;
  shape.num_tokens = INT32_MAX;
  shape.hidden_size = int64_t{1} << 28;
  CHECK_OK(check_shape(shape));
  for (Kind kind : {Kind::kDispatch, Kind::kReplay, Kind::kCombine}) {
    CHECK(HalfLayout::of(kind, shape, shape.hidden_size * 4, true).bytes > int64_t{1} << 60);
  }
}

// Parts of a half: aligned, apart from each other, and inside the bytes that a step asks for.
TEST(parts_of_a_half_do_not_overlap, 10) {
  for (int64_t round = 0; round < 3000; ++round) {
    Shape shape = sane_shape();
    shape.num_ranks = 1 + pick(1, round, 0, 0, 9);
    shape.num_tokens = pick(2, round, 0, 0, 50);
    shape.top_k = 1 + pick(3, round, 0, 0, 12);
    const int64_t row_bytes = pick(4, round, 0, 0, 300);
    for (Kind kind : {Kind::kDispatch, Kind::kReplay, Kind::kCombine}) {
      for (bool with_scalars : {false, true}) {
        const auto at = HalfLayout::of(kind, shape, row_bytes, with_scalars);
        CHECK(at.row_stride >= row_bytes && at.row_stride < row_bytes + kRowAlign &&
              at.row_stride % kRowAlign == 0);
        std::vector<std::pair<int64_t, int64_t>> parts;
        const int64_t route_bytes = shape.num_tokens * shape.top_k * 4;
        if (kind == Kind::kDispatch)
          parts.insert(parts.end(), {{at.ids, route_bytes}, {at.weights, route_bytes}});
        if (with_scalars) parts.emplace_back(at.scalars, route_bytes);
        const int64_t num_rows = kind == Kind::kCombine
                                     ? shape.num_tokens * std::min(shape.top_k, shape.num_ranks)
                                     : shape.num_tokens;
        parts.emplace_back(at.rows, num_rows * at.row_stride);
        std::sort(parts.begin(), parts.end());
        int64_t end = 0;
        for (const auto& [start, bytes] : parts) {
          CHECK(start >= end && start % kRowAlign == 0);
          end = start + bytes;
        }
        CHECK(end <= at.bytes && at.bytes < end + kRowAlign);
      }
    }
  }
}

TEST(halves_alternate_and_lie_in_the_arena, 10) {
  CHECK_EQ(half_offset(7), half_offset(9));
  CHECK_EQ(half_offset(0), half_offset(UINT32_MAX - 1));
  CHECK(half_offset(7) != half_offset(8));
  for (uint32_t step : {0u, 1u}) {
    CHECK_EQ(half_offset(step) % kPageBytes, 0);
    CHECK(half_offset(step) >= static_cast<int64_t>(sizeof(Control)));
    CHECK(half_offset(step) + kHalfStride <= kArenaBytes);
  }
}

TEST(texts_are_cut_and_read_back, 10) {
  char field[8];
  std::memset(field, 'x', sizeof(field));
  copy_text("four", field, sizeof(field));
  CHECK_EQ(read_text(field, sizeof(field)), "four");
  copy_text("much too long", field, sizeof(field));
  CHECK_EQ(read_text(field, sizeof(field)), "much to");
  std::memset(field, 'x', sizeof(field));  // a writer that never ended its text
  CHECK_EQ(read_text(field, sizeof(field)), "xxxxxxxx");
  CHECK_CONTAINS(kind_name(static_cast<Kind>(-5)), "unknown");
}

}  // namespace
}  // namespace moriep

TEST_MAIN()
