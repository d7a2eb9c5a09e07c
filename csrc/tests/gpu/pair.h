// A dispatch between two ranks of one device, for timing: the halves of both, one after the other
// on a stream. Each rank has so many tokens, of which each goes to 8 of 64 experts.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "exercise.h"
#include "filled.h"

namespace moriep::gpu {

class Pair {
 public:
  // Rows of `hidden_size` in bfloat16, or as many bytes that are moved as they are.
  Pair(Group& group, const Oracle& routing, const Case& test, gpuStream_t stream)
      : group_(group), test_(test), stream_(stream), wrong_(1) {
    for (int32_t r = 0; r < 2; ++r) sides_.push_back(std::make_unique<Side>(routing, test, r));
  }

  static Case case_of(int64_t num_tokens, int64_t hidden_size, RowType type, Wire wire,
                      Delivery delivery = Delivery::kPull) {
    const int64_t block = std::clamp<int64_t>(num_tokens / 16, 8, 128);
    Case test{shape_of(2, num_tokens, 8, hidden_size, 64, block, 0.5), type};
    test.shape.num_words = 0;
    test.wire = wire;
    test.delivery = delivery;
    return test;
  }

  void dispatch() {
    for (const Phase phase : {Phase::kFirst, Phase::kSecond}) {
      for (int32_t r = 0; r < 2; ++r) {
        Side& at = *sides_[static_cast<size_t>(r)];
        const Call call{.shape = test_.shape,
                        .type = test_.type,
                        .wire = test_.wire,
                        .delivery = test_.delivery,
                        .config = "speed",
                        .rank = at.rank.data(),
                        .order = at.order.data(),
                        .order_out = at.order_out.data(),
                        .phase = phase,
                        .stream = stream_};
        CHECK_OK(gpu::dispatch(
            *group_.local(r), call,
            {reinterpret_cast<const std::byte*>(at.x.data()), at.ids.data(), at.weights.data(),
             reinterpret_cast<std::byte*>(at.rows.data()), at.row_weights.data(),
             at.group_sizes.data(), at.routes.data(), at.places.data(), nullptr, nullptr}));
      }
    }
  }

  void poison_rows() {
    for (const auto& side : sides_) side->rows.poison();
  }
  bool rows_are_right() {
    check_gpu(gpuMemset(wrong_.data(), 0, sizeof(uint32_t)), "count");
    for (const auto& side : sides_) {
      check_rows_kernel<<<static_cast<int>(test_.shape.capacity), kCheckThreads>>>(
          side->rows.data(), side->owners.data(), side->width, 0, wrong_.data());
    }
    check_gpu(gpuGetLastError(), "check");
    check_gpu(gpuDeviceSynchronize(), "check");
    return wrong_.host()[0] == 0;
  }

 private:
  struct Side {
    Side(const Oracle& routing, const Case& test, int32_t r)
        : width(test.shape.hidden_size * element_bytes(test.type) / 2),
          rank(std::vector<int32_t>{r}),
          order(std::vector<int32_t>{0}),
          order_out(1),
          owners(owners_of(routing, test.shape, r)),
          x(test.shape.num_tokens * width),
          ids(routing.ids(r)),
          weights(std::vector<float>(static_cast<size_t>(test.shape.num_routes()), 1.0f)),
          rows(test.shape.capacity * width),
          row_weights(test.shape.capacity),
          group_sizes(test.shape.num_local_experts),
          routes(2 * test.shape.num_routes()),
          places(2 * test.shape.num_tokens) {
      fill_kernel<<<static_cast<int>(test.shape.num_tokens), kCheckThreads>>>(
          x.data(), nullptr, width, r * test.shape.num_tokens, 0);
      check_gpu(gpuGetLastError(), "fill");
      check_gpu(gpuDeviceSynchronize(), "fill");
    }

    static std::vector<int32_t> owners_of(const Oracle& routing, const Shape& shape, int32_t r) {
      std::vector<int32_t> owners;
      for (const Oracle::Row& row : routing.rows(r)) {
        owners.push_back(
            row.source < 0 ? -1 : static_cast<int32_t>(row.source * shape.num_tokens + row.token));
      }
      return owners;
    }

    int64_t width;  // in words of two bytes
    Array<int32_t> rank, order, order_out, owners;
    Array<uint16_t> x;
    Array<int32_t> ids;
    Array<float> weights;
    Array<uint16_t> rows;
    Array<float> row_weights;
    Array<int32_t> group_sizes, routes, places;
  };

  Group& group_;
  const Case test_;
  gpuStream_t stream_;
  Array<uint32_t> wrong_;
  std::vector<std::unique_ptr<Side>> sides_;
};

}  // namespace moriep::gpu
