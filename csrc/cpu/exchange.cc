#include "exchange.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "moriep/layout.h"
#include "step.h"

namespace moriep {
namespace {

// Walks the ranks beginning with the one after `me`, so that not all read the same peer at the same
// time.
int64_t nth_peer(int64_t me, int64_t i, int64_t num_ranks) { return (me + 1 + i) % num_ranks; }

// Copies this rank's tokens that some other rank needs into its half; its own are read where they
// are.
void stage_rows(const Shape& shape, const Owners& owners, int64_t me, const std::byte* x,
                const int32_t* ids, int64_t row_bytes, int64_t row_stride, std::byte* staged) {
  const Store store = store_for(shape.num_tokens * row_bytes);
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    const int32_t* token_ids = ids + t * shape.top_k;
    const bool needed = std::any_of(token_ids, token_ids + shape.top_k, [&](int32_t id) {
      const int32_t rank = owners.rank_of(id);
      return rank >= 0 && rank != me;
    });
    if (needed) copy_row(x + t * row_bytes, staged + t * row_stride, row_bytes, store);
  }
  finish_stores();
}

// Where the rows of a source rank's tokens lie.
struct Source {
  const std::byte* rows;
  int64_t stride;
};

// Reads every token that has rows here once and writes all its rows; clears the rows that nobody
// owns.
void pull_rows(const Shape& shape, int64_t me, const std::vector<Source>& sources,
               const int32_t* routes, int64_t row_bytes, std::byte* rows) {
  std::vector<bool> written(static_cast<size_t>(shape.capacity));
  int64_t num_rows = 0;
  int64_t end = 0;
  for (int64_t route = 0; route < shape.num_ranks * shape.num_routes(); ++route) {
    if (routes[route] < 0) continue;
    ++num_rows;
    end = std::max<int64_t>(end, routes[route] + 1);
  }
  const Store store = store_for(num_rows * row_bytes);
  prefer_large_pages(rows, end * row_bytes);
  for (int64_t i = 0; i < shape.num_ranks; ++i) {
    const int64_t source = nth_peer(me, i, shape.num_ranks);
    const Source& from = sources[static_cast<size_t>(source)];
    const int32_t* source_routes = routes + source * shape.num_routes();
    for (int64_t route = 0; route < shape.num_routes(); ++route) {
      const int32_t row = source_routes[route];
      if (row < 0) continue;
      copy_row(from.rows + route / shape.top_k * from.stride, rows + row * row_bytes, row_bytes,
               store);
      written[static_cast<size_t>(row)] = true;
    }
  }
  finish_stores();
  for (int64_t row = 0; row < shape.capacity;) {
    int64_t gap_end = row;
    while (gap_end < shape.capacity && !written[static_cast<size_t>(gap_end)]) ++gap_end;
    if (gap_end > row) zero_fill(rows + row * row_bytes, (gap_end - row) * row_bytes);
    row = gap_end + 1;
  }
}

// Gives every route of the group that ends here its row, in the order local expert, node, source
// rank, source token; and every (source, token) pair that ends here its place in the source's
// arena.
void plan_routes(const Shape& shape, const Owners& owners, int64_t me,
                 const std::vector<int32_t>& all_ids, int32_t* group_sizes, int32_t* routes,
                 int32_t* places) {
  const int64_t first_expert = me * shape.num_local_experts;
  const auto local_expert = [&](int32_t id) {
    return owners.rank_of(id) == me ? id - first_expert : -1;
  };

  std::vector<int64_t> counts(static_cast<size_t>(shape.num_local_experts));
  for (int32_t id : all_ids) {
    if (const int64_t e = local_expert(id); e >= 0) ++counts[static_cast<size_t>(e)];
  }
  std::vector<int64_t> next = run_starts(counts, shape.block);
  for (size_t e = 0; e < counts.size(); ++e) {
    group_sizes[e] =
        static_cast<int32_t>(std::clamp<int64_t>(shape.capacity - next[e], 0, counts[e]));
  }

  std::vector<int32_t> ranks;
  std::vector<int32_t> next_places(static_cast<size_t>(shape.num_ranks));
  const int64_t per_node = shape.num_tokens / shape.num_nodes;
  for (int64_t i = 0; i < shape.num_nodes * shape.num_ranks * per_node; ++i) {
    const int64_t source = i / per_node % shape.num_ranks;
    const int64_t t = i / per_node / shape.num_ranks * per_node + i % per_node;
    const int64_t token = source * shape.num_tokens + t;
    const int32_t* ids = all_ids.data() + token * shape.top_k;
    owners.ranks_of(ids, ranks);
    int32_t& next_place = next_places[static_cast<size_t>(source)];
    const auto place = std::find(ranks.begin(), ranks.end(), me);
    places[token] =
        place == ranks.end() ? -1 : next_place + static_cast<int32_t>(place - ranks.begin());
    next_place += static_cast<int32_t>(ranks.size());
    for (int64_t k = 0; k < shape.top_k; ++k) {
      const int64_t e = local_expert(ids[k]);
      int32_t& route = routes[token * shape.top_k + k];
      if (e < 0) {
        route = kNotHere;
        continue;
      }
      const int64_t row = next[static_cast<size_t>(e)]++;
      route = row < shape.capacity ? static_cast<int32_t>(row) : kDropped;
    }
  }
}

constexpr const char* kUnchanged =
    "; pass combine the plan of the dispatch that brought its rows, unchanged";

// A plan is the user's array by the time it comes back: nothing in it is trusted as an index.
Status check_plan(const Shape& shape, const int32_t* routes, const int32_t* places) {
  const int64_t num_routes = shape.num_ranks * shape.num_routes();
  for (int64_t i = 0; i < num_routes; ++i) {
    if (routes[i] >= shape.capacity) {
      return Status(Code::kInvalidArgument, "plan.routes names row " + std::to_string(routes[i]) +
                                                " but the capacity is " +
                                                std::to_string(shape.capacity) + kUnchanged);
    }
  }
  for (int64_t i = 0; places != nullptr && i < shape.num_ranks * shape.num_tokens; ++i) {
    if (places[i] >= shape.max_fanout()) {
      return Status(Code::kInvalidArgument, "plan.places names place " + std::to_string(places[i]) +
                                                " but there are " +
                                                std::to_string(shape.max_fanout()) + kUnchanged);
    }
  }
  return Status();
}

}  // namespace

Status dispatch(LocalRank& me, const Call& call, const DispatchBuffers& at) {
  const Shape& shape = call.shape;
  const int64_t row_bytes = shape.hidden_size * element_bytes(call.type);
  const auto layout = HalfLayout::of(Kind::kDispatch, shape, row_bytes, false);
  Step step(me, Kind::kDispatch, shape, static_cast<int32_t>(call.type), false, call.order,
            call.config);
  std::vector<std::byte*> halves;
  if (Status status = step.halves(layout.bytes, &halves); !status.ok()) return status;

  const int64_t my_rank = me.rank();
  const Owners owners(shape);
  const auto ids_bytes = static_cast<size_t>(shape.num_routes()) * sizeof(int32_t);
  const auto words_bytes = static_cast<size_t>(shape.num_words) * sizeof(int32_t);
  std::byte* mine = halves[static_cast<size_t>(my_rank)];
  if (shape.num_ranks > 1) {
    if (words_bytes > 0) std::memcpy(mine + layout.words, at.words, words_bytes);
    std::memcpy(mine + layout.ids, at.ids, ids_bytes);
    std::memcpy(mine + layout.weights, at.weights, ids_bytes);
    stage_rows(shape, owners, my_rank, at.x, at.ids, row_bytes, layout.row_stride,
               mine + layout.rows);
  }
  if (Status status = step.publish_and_wait(); !status.ok()) return status;

  // Copied before use: a peer's memory may change under a check, a copy may not.
  std::vector<int32_t> all_ids(static_cast<size_t>(shape.num_ranks * shape.num_routes()));
  std::vector<Source> sources;
  std::vector<const float*> weights;
  for (int64_t source = 0; source < shape.num_ranks; ++source) {
    const bool own = source == my_rank;
    const std::byte* half = halves[static_cast<size_t>(source)];
    const void* ids = own ? static_cast<const void*>(at.ids) : half + layout.ids;
    if (ids_bytes > 0) std::memcpy(all_ids.data() + source * shape.num_routes(), ids, ids_bytes);
    const void* words = own ? static_cast<const void*>(at.words) : half + layout.words;
    if (words_bytes > 0) std::memcpy(at.all_words + source * shape.num_words, words, words_bytes);
    sources.push_back(own ? Source{at.x, row_bytes}
                          : Source{half + layout.rows, layout.row_stride});
    weights.push_back(own ? at.weights : reinterpret_cast<const float*>(half + layout.weights));
  }
  plan_routes(shape, owners, my_rank, all_ids, at.group_sizes, at.routes, at.places);

  std::fill_n(at.row_weights, shape.capacity, 0.0f);
  for (int64_t source = 0; source < shape.num_ranks; ++source) {
    for (int64_t route = 0; route < shape.num_routes(); ++route) {
      const int32_t row = at.routes[source * shape.num_routes() + route];
      if (row >= 0) at.row_weights[row] = weights[static_cast<size_t>(source)][route];
    }
  }
  pull_rows(shape, my_rank, sources, at.routes, row_bytes, at.rows);
  return Status();
}

Status replay(LocalRank& me, const Call& call, const ReplayBuffers& at) {
  const Shape& shape = call.shape;
  const int64_t row_bytes = shape.hidden_size * element_bytes(call.type);
  const auto layout = HalfLayout::of(Kind::kReplay, shape, row_bytes, false);
  Step step(me, Kind::kReplay, shape, static_cast<int32_t>(call.type), false, call.order,
            call.config);
  std::vector<std::byte*> halves;
  if (Status status = step.halves(layout.bytes, &halves); !status.ok()) return status;
  if (Status status = check_plan(shape, at.routes, nullptr); !status.ok()) return step.fail(status);

  const int64_t my_rank = me.rank();
  const Owners owners(shape);
  stage_rows(shape, owners, my_rank, at.x, at.ids, row_bytes, layout.row_stride,
             halves[static_cast<size_t>(my_rank)] + layout.rows);
  if (Status status = step.publish_and_wait(); !status.ok()) return status;

  std::vector<Source> sources;
  for (int64_t source = 0; source < shape.num_ranks; ++source) {
    sources.push_back(source == my_rank ? Source{at.x, row_bytes}
                                        : Source{halves[static_cast<size_t>(source)] + layout.rows,
                                                 layout.row_stride});
  }
  pull_rows(shape, my_rank, sources, at.routes, row_bytes, at.rows);
  return Status();
}

namespace {

// Combine on one rank: first it pushes what it adds for others, then it adds what came for its own.
class Combine {
 public:
  Combine(int64_t my_rank, const Call& call, const CombineBuffers& at, const HalfLayout& layout,
          const std::vector<std::byte*>& halves)
      : my_rank_(my_rank),
        call_(call),
        shape_(call.shape),
        at_(at),
        layout_(layout),
        halves_(halves),
        owners_(call.shape),
        row_bytes_(call.shape.hidden_size * element_bytes(call.type)),
        store_(store_for(call.shape.max_fanout() * row_bytes_)),
        terms_(static_cast<size_t>(call.shape.top_k)),
        own_(static_cast<size_t>(row_bytes_)),
        sums_(static_cast<size_t>(call.shape.num_ranks)) {}

  // One row per (token, rank) into the owner's arena. This rank's own tokens need no such trip.
  void push() {
    for (int64_t i = 0; i + 1 < shape_.num_ranks; ++i) {
      const int64_t owner = nth_peer(my_rank_, i, shape_.num_ranks);
      std::byte* half = halves_[static_cast<size_t>(owner)];
      auto* scalars = reinterpret_cast<float*>(half + layout_.scalars);
      for (int64_t t = 0; t < shape_.num_tokens; ++t) {
        const int64_t token = owner * shape_.num_tokens + t;
        if (at_.places[token] < 0) continue;
        sum_rows(call_.type, terms_.data(), collect_terms(owner, t),
                 half + layout_.rows + at_.places[token] * layout_.row_stride, shape_.hidden_size,
                 store_);
        for (int64_t k = 0; at_.scalars != nullptr && k < shape_.top_k; ++k) {
          const int32_t row = at_.routes[token * shape_.top_k + k];
          if (row != kNotHere) scalars[t * shape_.top_k + k] = row >= 0 ? at_.scalars[row] : 0.0f;
        }
      }
    }
  }

  // What the ranks pushed, in rank order; this rank's own part is made on the way.
  void reduce() {
    int64_t next_place = 0;
    for (int64_t t = 0; t < shape_.num_tokens; ++t) {
      const int64_t n = collect_sums(t, &next_place);
      sum_rows(call_.type, sums_.data(), n, at_.y + t * row_bytes_, shape_.hidden_size, store_);
      if (at_.scalars != nullptr) take_scalars(t);
    }
  }

 private:
  // Collects this rank's rows of a token in the order of k, and gives their number.
  int64_t collect_terms(int64_t source, int64_t t) {
    int64_t n = 0;
    const int32_t* routes = at_.routes + (source * shape_.num_tokens + t) * shape_.top_k;
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      if (routes[k] >= 0) terms_[static_cast<size_t>(n++)] = at_.rows + routes[k] * row_bytes_;
    }
    return n;
  }

  // Collects the sums of a token of this rank's, one of each rank, and gives their number.
  int64_t collect_sums(int64_t t, int64_t* next_place) {
    const std::byte* received = halves_[static_cast<size_t>(my_rank_)] + layout_.rows;
    int64_t n = 0;
    owners_.ranks_of(at_.ids + t * shape_.top_k, ranks_);
    for (const int32_t rank : ranks_) {
      const int64_t place = (*next_place)++;
      if (rank != my_rank_) {
        sums_[static_cast<size_t>(n++)] = received + place * layout_.row_stride;
        continue;
      }
      const int64_t num_rows = collect_terms(my_rank_, t);
      if (num_rows == 1) {
        sums_[static_cast<size_t>(n++)] = terms_[0];
      } else {
        sum_rows(call_.type, terms_.data(), num_rows, own_.data(), shape_.hidden_size,
                 Store::kCached);
        sums_[static_cast<size_t>(n++)] = own_.data();
      }
    }
    return n;
  }

  // The scalars of a token of this rank's, each from the rank of its expert.
  void take_scalars(int64_t t) {
    const std::byte* received = halves_[static_cast<size_t>(my_rank_)];
    const auto* scalars = reinterpret_cast<const float*>(received + layout_.scalars);
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      const int64_t route = t * shape_.top_k + k;
      const int32_t rank = owners_.rank_of(at_.ids[route]);
      const int32_t row = at_.routes[my_rank_ * shape_.num_routes() + route];
      float value = 0.0f;
      if (rank == my_rank_) {
        value = row >= 0 ? at_.scalars[row] : 0.0f;
      } else if (rank >= 0) {
        value = scalars[route];
      }
      at_.token_scalars[route] = value;
    }
  }

  const int64_t my_rank_;
  const Call& call_;
  const Shape& shape_;
  const CombineBuffers& at_;
  const HalfLayout& layout_;
  const std::vector<std::byte*>& halves_;
  const Owners owners_;
  const int64_t row_bytes_;
  const Store store_;
  std::vector<const std::byte*> terms_;  // rows of a token that lie here
  std::vector<std::byte> own_;           // their sum
  std::vector<const std::byte*> sums_;   // of a token, one of each rank
  std::vector<int32_t> ranks_;           // of the experts of a token
};

}  // namespace

Status combine(LocalRank& me, const Call& call, const CombineBuffers& at) {
  const Shape& shape = call.shape;
  const bool with_scalars = at.scalars != nullptr;
  const int64_t row_bytes = shape.hidden_size * element_bytes(call.type);
  const auto layout = HalfLayout::of(Kind::kCombine, shape, row_bytes, with_scalars);
  Step step(me, Kind::kCombine, shape, static_cast<int32_t>(call.type), with_scalars, call.order,
            call.config);
  std::vector<std::byte*> halves;
  if (Status status = step.halves(layout.bytes, &halves); !status.ok()) return status;
  if (Status status = check_plan(shape, at.routes, at.places); !status.ok()) {
    return step.fail(status);
  }

  Combine work(me.rank(), call, at, layout, halves);
  work.push();
  finish_stores();
  if (Status status = step.publish_and_wait(); !status.ok()) return status;
  work.reduce();
  finish_stores();
  return Status();
}

}  // namespace moriep
