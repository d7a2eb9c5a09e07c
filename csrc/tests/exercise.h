// One rank's dispatch, replay and combine of a case, every result compared with the oracle.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "cpu/exchange.h"
#include "oracle.h"

namespace moriep {

// A result buffer of exactly its size, so that AddressSanitizer sees the first byte beyond it, full
// of ones: NaN in every row type, and -1.
inline std::vector<std::byte> poisoned(int64_t bytes) {
  return std::vector<std::byte>(static_cast<size_t>(bytes), std::byte{0xff});
}

class Exercise {
 public:
  Exercise(LocalRank& me, const Case& test, const Oracle& want, int32_t order = 0)
      : me_(me),
        test_(test),
        want_(want),
        rank_(me.rank()),
        call_{test.shape, test.type, order, "test"} {}

  // Runs all three; stops at the first that gives no result.
  Status run() {
    if (Status status = dispatch_and_check(); !status.ok()) return status;
    if (Status status = replay_and_check(); !status.ok()) return status;
    return test_.type == RowType::kU8 ? Status() : combine_and_check();
  }

  Status dispatch_and_check() {
    const Shape& shape = test_.shape;
    const auto x = make_x(0);
    const auto& ids = want_.ids(rank_);
    std::vector<float> weights;
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t k = 0; k < shape.top_k; ++k)
        weights.push_back(static_cast<float>(want_.weight(rank_, t, k)));
    }
    auto rows = poisoned(shape.capacity * row_bytes());
    std::vector<float> row_weights(static_cast<size_t>(shape.capacity), NAN);
    std::vector<int32_t> group_sizes(static_cast<size_t>(shape.num_local_experts), -7);
    routes_.assign(static_cast<size_t>(shape.num_ranks * shape.num_routes()), -7);
    places_.assign(static_cast<size_t>(shape.num_ranks * shape.num_tokens), -7);
    const auto words = want_.words(rank_);
    std::vector<int32_t> all_words(static_cast<size_t>(shape.num_ranks * shape.num_words), -7);
    const DispatchBuffers at{x.data(),           ids.data(),         weights.data(), rows.data(),
                             row_weights.data(), group_sizes.data(), routes_.data(), places_.data(),
                             words.data(),       all_words.data()};
    if (Status status = dispatch(me_, call_, at); !status.ok()) return status;

    for (int64_t e = 0; e < shape.num_local_experts; ++e) {
      expect("group_sizes", e, group_sizes[static_cast<size_t>(e)],
             want_.group_sizes(rank_)[static_cast<size_t>(e)]);
    }
    for (int64_t source = 0; source < shape.num_ranks; ++source) {
      for (int64_t i = 0; i < shape.num_words; ++i) {
        const int64_t word = source * shape.num_words + i;
        expect("all_words", word, all_words[static_cast<size_t>(word)], want_.word(source, i));
      }
      for (int64_t t = 0; t < shape.num_tokens; ++t) {
        const int64_t token = source * shape.num_tokens + t;
        expect("places", token, places_[static_cast<size_t>(token)], want_.place(rank_, source, t));
        for (int64_t k = 0; k < shape.top_k; ++k) {
          const int64_t route = token * shape.top_k + k;
          expect("routes", route, routes_[static_cast<size_t>(route)],
                 want_.route(rank_, source, t, k));
        }
      }
    }
    for (int64_t row = 0; row < shape.capacity; ++row) {
      const Oracle::Row& owner = want_.rows(rank_)[static_cast<size_t>(row)];
      expect("row_weights", row, row_weights[static_cast<size_t>(row)],
             owner.source < 0 ? 0.0 : want_.weight(owner.source, owner.token, owner.k));
    }
    expect_rows("dispatch", rows, 0);
    return Status();
  }

  Status replay_and_check() {
    const auto x = make_x(1000);
    auto rows = poisoned(test_.shape.capacity * row_bytes());
    const ReplayBuffers at{x.data(), routes_.data(), want_.ids(rank_).data(), rows.data()};
    if (Status status = replay(me_, call_, at); !status.ok()) return status;
    expect_rows("replay", rows, 1000);
    return Status();
  }

  Status combine_and_check() {
    const Shape& shape = test_.shape;
    // Rows that nobody owns stay poisoned: combine must not read them.
    auto rows = poisoned(shape.capacity * row_bytes());
    std::vector<float> scalars(static_cast<size_t>(shape.capacity), NAN);
    for (int64_t row = 0; row < shape.capacity; ++row) {
      if (want_.rows(rank_)[static_cast<size_t>(row)].source < 0) continue;
      for (int64_t h = 0; h < shape.hidden_size; ++h) {
        put(test_.type, rows.data(), row * shape.hidden_size + h, want_.expert_row(rank_, row, h));
      }
      scalars[static_cast<size_t>(row)] = static_cast<float>(want_.row_scalar(rank_, row));
    }
    auto y = poisoned(shape.num_tokens * row_bytes());
    std::vector<float> token_scalars(static_cast<size_t>(shape.num_routes()), NAN);
    const bool carried = test_.with_scalars && shape.num_tokens > 0;
    const CombineBuffers at{rows.data(),
                            carried ? scalars.data() : nullptr,
                            routes_.data(),
                            places_.data(),
                            want_.ids(rank_).data(),
                            y.data(),
                            carried ? token_scalars.data() : nullptr};
    if (Status status = combine(me_, call_, at); !status.ok()) return status;

    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t h = 0; h < shape.hidden_size; ++h) {
        const int64_t i = t * shape.hidden_size + h;
        expect("y", i, get(test_.type, y.data(), i), want_.y(rank_, t, h));
      }
      for (int64_t k = 0; carried && k < shape.top_k; ++k) {
        const int64_t route = t * shape.top_k + k;
        expect("token_scalars", route, token_scalars[static_cast<size_t>(route)],
               want_.token_scalar(rank_, t, k));
      }
    }
    return Status();
  }

 private:
  int64_t row_bytes() const { return test_.shape.hidden_size * element_bytes(test_.type); }

  std::vector<std::byte> make_x(int64_t shift) const {
    auto x = poisoned(test_.shape.num_tokens * row_bytes());
    for (int64_t i = 0; i < test_.shape.num_tokens * test_.shape.hidden_size; ++i) {
      put(test_.type, x.data(), i,
          want_.x(rank_, i / test_.shape.hidden_size, i % test_.shape.hidden_size + shift));
    }
    return x;
  }

  void expect_rows(const char* what, const std::vector<std::byte>& rows, int64_t shift) const {
    const int64_t hidden_size = test_.shape.hidden_size;
    auto want = poisoned(row_bytes());
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

  void expect(const char* what, int64_t index, double got, double want) const {
    if (got == want) return;
    const Shape& shape = test_.shape;
    std::ostringstream text;
    text << what << "[" << index << "] on rank " << rank_ << " is " << got << " and not " << want
         << "; R=" << shape.num_ranks << " T=" << shape.num_tokens << " K=" << shape.top_k
         << " H=" << shape.hidden_size << " E=" << shape.num_experts
         << " L=" << shape.num_local_experts << " block=" << shape.block << " C=" << shape.capacity
         << " type=" << static_cast<int>(test_.type)
         << " routing=" << static_cast<int>(test_.routing) << " seed=" << test_.seed;
    check::fail(__FILE__, __LINE__, text.str());
  }

  LocalRank& me_;
  const Case& test_;
  const Oracle& want_;
  const int64_t rank_;
  const Call call_;
  std::vector<int32_t> routes_;
  std::vector<int32_t> places_;
};

// A shape with the capacity that drops nothing as long as a token's experts are distinct.
inline Shape shape_of(int64_t num_ranks, int64_t num_tokens, int64_t top_k, int64_t hidden_size,
                      int64_t num_experts, int64_t block) {
  const int64_t num_local_experts = (num_experts + num_ranks - 1) / num_ranks;
  const int64_t rows = num_ranks * num_tokens * std::min(top_k, num_local_experts);
  const int64_t padded = rows + std::min(num_local_experts, rows) * (block - 1);
  return Shape{.num_ranks = num_ranks,
               .num_tokens = num_tokens,
               .top_k = top_k,
               .hidden_size = hidden_size,
               .num_experts = num_experts,
               .num_local_experts = num_local_experts,
               .block = block,
               .capacity = std::max(block, padded / block * block),
               .num_words = num_tokens % 4};
}

}  // namespace moriep
