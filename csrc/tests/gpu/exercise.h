// One rank's dispatch, replay and combine of a case on a GPU, every result compared with the
// oracle.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"
#include "../oracle.h"
#include "gpu/exchange.h"
#include "names.h"

namespace moriep::gpu {

inline void check_gpu(gpuError_t error, const char* what) {
  if (error != gpuSuccess) {
    check::fail(__FILE__, __LINE__, std::string(what) + ": " + gpuGetErrorString(error));
  }
}

// An array on the device, of exactly its size; full of ones until something is put there.
template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size) {
    check_gpu(gpuMalloc(reinterpret_cast<void**>(&data_), bytes() + 1), "malloc");
    poison();
  }
  explicit Array(const std::vector<T>& values) : Array(static_cast<int64_t>(values.size())) {
    if (size_ > 0) {
      check_gpu(gpuMemcpy(data_, values.data(), bytes(), gpuMemcpyDefault), "copy in");
    }
  }
  ~Array() { (void)gpuFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  void poison() { check_gpu(gpuMemset(data_, 0xff, bytes() + 1), "poison"); }
  std::vector<T> host() const {
    std::vector<T> values(static_cast<size_t>(size_));
    if (size_ > 0) {
      check_gpu(gpuMemcpy(values.data(), data_, bytes(), gpuMemcpyDefault), "copy out");
    }
    return values;
  }

 private:
  size_t bytes() const { return static_cast<size_t>(size_) * sizeof(T); }
  int64_t size_;
  T* data_ = nullptr;
};

class Exercise {
 public:
  Exercise(LocalRank& me, const Case& test, const Oracle& want, int32_t order = 0,
           int32_t claimed_rank = -1)
      : me_(me),
        test_(test),
        want_(want),
        rank_of_me_(std::vector<int32_t>{claimed_rank < 0 ? me.rank : claimed_rank}),
        order_(std::vector<int32_t>{order}),
        order_out_(1),
        x_(make_x(0)),
        x_again_(make_x(1000)),
        ids_(want.ids(me.rank)),
        weights_(make_weights()),
        rows_(test.shape.capacity * row_bytes()),
        row_weights_(test.shape.capacity),
        group_sizes_(test.shape.num_local_experts),
        routes_(test.shape.num_ranks * test.shape.num_routes()),
        places_(test.shape.num_ranks * test.shape.num_tokens),
        words_(want.words(me.rank)),
        all_words_(test.shape.num_ranks * test.shape.num_words),
        expert_rows_(make_expert_rows()),
        scalars_(make_scalars()),
        y_(test.shape.num_tokens * row_bytes()),
        token_scalars_(test.shape.num_routes()) {}

  Status dispatch(Phase phase) {
    return gpu::dispatch(
        me_, call(phase),
        {x_.data(), ids_.data(), weights_.data(), rows_.data(), row_weights_.data(),
         group_sizes_.data(), routes_.data(), places_.data(), words_.data(), all_words_.data()});
  }
  Status replay(Phase phase) {
    return gpu::replay(me_, call(phase),
                       {x_again_.data(), routes_.data(), ids_.data(), rows_.data()});
  }
  Status combine(Phase phase) {
    const bool carried = test_.with_scalars && test_.shape.num_tokens > 0;
    return gpu::combine(
        me_, call(phase),
        {expert_rows_.data(), carried ? scalars_.data() : nullptr, routes_.data(), places_.data(),
         ids_.data(), y_.data(), carried ? token_scalars_.data() : nullptr});
  }

  // From the next dispatch on, and for its replay.
  void deliver_by(Delivery delivery) { test_.delivery = delivery; }
  void poison_results() {
    rows_.poison();
    row_weights_.poison();
    all_words_.poison();
    y_.poison();
    token_scalars_.poison();
  }
  void spoil_plan() {
    std::vector<int32_t> bad(static_cast<size_t>(test_.shape.num_ranks * test_.shape.num_routes()),
                             static_cast<int32_t>(test_.shape.capacity));
    check_gpu(gpuMemcpy(routes_.data(), bad.data(), bad.size() * 4, gpuMemcpyDefault), "spoil");
  }

  void check_dispatch() const {
    const Shape& shape = test_.shape;
    const auto group_sizes = group_sizes_.host();
    const auto routes = routes_.host();
    const auto places = places_.host();
    const auto row_weights = row_weights_.host();
    const auto all_words = all_words_.host();
    for (int64_t e = 0; e < shape.num_local_experts; ++e) {
      expect("group_sizes", e, group_sizes[static_cast<size_t>(e)],
             want_.group_sizes(me_.rank)[static_cast<size_t>(e)]);
    }
    for (int64_t source = 0; source < shape.num_ranks; ++source) {
      for (int64_t i = 0; i < shape.num_words; ++i) {
        const int64_t word = source * shape.num_words + i;
        expect("all_words", word, all_words[static_cast<size_t>(word)], want_.word(source, i));
      }
      for (int64_t t = 0; t < shape.num_tokens; ++t) {
        const int64_t token = source * shape.num_tokens + t;
        // Places differ from the CPU's, but say -1 for the same tokens.
        expect("places", token, places[static_cast<size_t>(token)] < 0,
               want_.place(me_.rank, source, t) < 0);
        for (int64_t k = 0; k < shape.top_k; ++k) {
          const int64_t route = token * shape.top_k + k;
          expect("routes", route, routes[static_cast<size_t>(route)],
                 want_.route(me_.rank, source, t, k));
        }
      }
    }
    for (int64_t row = 0; row < shape.capacity; ++row) {
      const Oracle::Row& owner = want_.rows(me_.rank)[static_cast<size_t>(row)];
      expect("row_weights", row, row_weights[static_cast<size_t>(row)],
             owner.source < 0 ? 0.0 : want_.weight(owner.source, owner.token, owner.k));
    }
    expect("order", 0, order_out_.host()[0], order_.host()[0] + 1);
    expect_rows("dispatch", 0);
  }

  void check_replay() const { expect_rows("replay", 1000); }

  void check_combine() const {
    const Shape& shape = test_.shape;
    const bool carried = test_.with_scalars && shape.num_tokens > 0;
    const auto y = y_.host();
    const auto token_scalars = token_scalars_.host();
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t h = 0; h < shape.hidden_size; ++h) {
        const int64_t i = t * shape.hidden_size + h;
        expect("y", i, get(test_.type, y.data(), i), want_.y(me_.rank, t, h));
      }
      for (int64_t k = 0; carried && k < shape.top_k; ++k) {
        const int64_t route = t * shape.top_k + k;
        expect("token_scalars", route, token_scalars[static_cast<size_t>(route)],
               want_.token_scalar(me_.rank, t, k));
      }
    }
  }

  // Results as bytes, for comparison between runs.
  std::vector<std::byte> rows() const { return rows_.host(); }
  std::vector<std::byte> bits() const {
    std::vector<std::byte> all = rows_.host();
    const auto append = [&all](const auto& values) {
      const auto* begin = reinterpret_cast<const std::byte*>(values.data());
      all.insert(all.end(), begin, begin + values.size() * sizeof(values[0]));
    };
    append(row_weights_.host());
    append(group_sizes_.host());
    append(routes_.host());
    append(places_.host());
    append(all_words_.host());
    append(y_.host());
    append(token_scalars_.host());
    return all;
  }

 private:
  int64_t row_bytes() const { return test_.shape.hidden_size * element_bytes(test_.type); }

  Call call(Phase phase) const {
    return Call{.shape = test_.shape,
                .type = test_.type,
                .wire = test_.wire,
                .delivery = test_.delivery,
                .config = "test",
                .rank = rank_of_me_.data(),
                .order = order_.data(),
                .order_out = order_out_.data(),
                .phase = phase,
                .stream = nullptr};
  }

  std::vector<std::byte> make_x(int64_t shift) const {
    std::vector<std::byte> x(static_cast<size_t>(test_.shape.num_tokens * row_bytes()));
    for (int64_t i = 0; i < test_.shape.num_tokens * test_.shape.hidden_size; ++i) {
      put(test_.type, x.data(), i,
          want_.x(me_.rank, i / test_.shape.hidden_size, i % test_.shape.hidden_size + shift));
    }
    return x;
  }

  std::vector<float> make_weights() const {
    std::vector<float> weights;
    for (int64_t t = 0; t < test_.shape.num_tokens; ++t) {
      for (int64_t k = 0; k < test_.shape.top_k; ++k)
        weights.push_back(static_cast<float>(want_.weight(me_.rank, t, k)));
    }
    return weights;
  }

  // Rows that nobody owns stay poisoned: combine must not read them.
  std::vector<std::byte> make_expert_rows() const {
    std::vector<std::byte> rows(static_cast<size_t>(test_.shape.capacity * row_bytes()),
                                std::byte{0xff});
    for (int64_t row = 0; row < test_.shape.capacity; ++row) {
      if (want_.rows(me_.rank)[static_cast<size_t>(row)].source < 0) continue;
      for (int64_t h = 0; h < test_.shape.hidden_size; ++h) {
        put(test_.type, rows.data(), row * test_.shape.hidden_size + h,
            want_.expert_row(me_.rank, row, h));
      }
    }
    return rows;
  }

  std::vector<float> make_scalars() const {
    std::vector<float> scalars(static_cast<size_t>(test_.shape.capacity), NAN);
    for (int64_t row = 0; row < test_.shape.capacity; ++row) {
      if (want_.rows(me_.rank)[static_cast<size_t>(row)].source < 0) continue;
      scalars[static_cast<size_t>(row)] = static_cast<float>(want_.row_scalar(me_.rank, row));
    }
    return scalars;
  }

  void expect_rows(const char* what, int64_t shift) const {
    const int64_t hidden_size = test_.shape.hidden_size;
    const auto rows = rows_.host();
    std::vector<std::byte> want(static_cast<size_t>(row_bytes()));
    for (int64_t row = 0; row < test_.shape.capacity; ++row) {
      const Oracle::Row& owner = want_.rows(me_.rank)[static_cast<size_t>(row)];
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
    text << what << "[" << index << "] on rank " << me_.rank << " is " << got << " and not " << want
         << "; R=" << shape.num_ranks << " T=" << shape.num_tokens << " K=" << shape.top_k
         << " H=" << shape.hidden_size << " E=" << shape.num_experts
         << " L=" << shape.num_local_experts << " block=" << shape.block << " C=" << shape.capacity
         << " type=" << static_cast<int>(test_.type) << " wire=" << static_cast<int>(test_.wire)
         << " by " << delivery_name(test_.delivery)
         << " routing=" << static_cast<int>(test_.routing) << " seed=" << test_.seed;
    check::fail(__FILE__, __LINE__, text.str());
  }

  LocalRank& me_;
  Case test_;
  const Oracle& want_;
  Array<int32_t> rank_of_me_, order_, order_out_;
  Array<std::byte> x_, x_again_;
  Array<int32_t> ids_;
  Array<float> weights_;
  Array<std::byte> rows_;
  Array<float> row_weights_;
  Array<int32_t> group_sizes_, routes_, places_, words_, all_words_;
  Array<std::byte> expert_rows_;
  Array<float> scalars_;
  Array<std::byte> y_;
  Array<float> token_scalars_;
};

// The shape of a layer with the capacity that drops nothing, times `share`.
inline Shape shape_of(int64_t num_ranks, int64_t num_tokens, int64_t top_k, int64_t hidden_size,
                      int64_t num_experts, int64_t block, double share = 1.0) {
  const int64_t num_local_experts = (num_experts + num_ranks - 1) / num_ranks;
  const auto rows = static_cast<int64_t>(static_cast<double>(num_ranks * num_tokens) * share *
                                         static_cast<double>(std::min(top_k, num_local_experts)));
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

}  // namespace moriep::gpu
