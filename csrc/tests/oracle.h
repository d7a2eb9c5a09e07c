// What an exchange must give, found the slow way: for every row that could exist it looks through
// all routes of the group. Numbers are small integers, so that sums are exact in every row type and
// results compare equal.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <utility>
#include <vector>

#include "moriep/plan.h"
#include "moriep/row_type.h"
#include "moriep/wire.h"

namespace moriep {

inline uint64_t mix(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

// A reproducible number below `bound` for a place that four coordinates name.
inline int64_t pick(uint64_t seed, int64_t a, int64_t b, int64_t c, int64_t bound) {
  uint64_t bits = mix(seed);
  for (int64_t part : {a, b, c}) bits = mix(bits ^ static_cast<uint64_t>(part));
  return static_cast<int64_t>(bits % static_cast<uint64_t>(bound));
}

// How the tokens of a group are routed.
enum class Routing { kUniform, kOneExpert, kInvalid, kDuplicates, kNone };

struct Case {
  Shape shape;
  RowType type = RowType::kF32;
  Routing routing = Routing::kUniform;
  bool with_scalars = false;
  uint64_t seed = 0;
  Wire wire = Wire::kRows;  // float8 holds the numbers here exactly
  Delivery delivery = Delivery::kPull;
};

class Oracle {
 public:
  explicit Oracle(const Case& test) : test_(test), shape_(test.shape) {
    for (int64_t rank = 0; rank < shape_.num_ranks; ++rank) ids_.push_back(make_ids(rank));
    for (int64_t rank = 0; rank < shape_.num_ranks; ++rank) place(rank);
  }

  struct Row {
    int64_t source = -1;
    int64_t token = 0;
    int64_t k = 0;
  };

  // The inputs of a rank.
  const std::vector<int32_t>& ids(int64_t rank) const { return ids_[static_cast<size_t>(rank)]; }
  double x(int64_t rank, int64_t token, int64_t h) const { return small(1, rank, token, h); }
  double weight(int64_t rank, int64_t token, int64_t k) const {
    return small(2, rank, token, k) / 4.0;
  }
  int32_t word(int64_t rank, int64_t i) const {
    return static_cast<int32_t>(pick(test_.seed * 8 + 5, rank, i, 0, int64_t{1} << 32) -
                                (int64_t{1} << 31));
  }
  std::vector<int32_t> words(int64_t rank) const {
    std::vector<int32_t> words;
    for (int64_t i = 0; i < shape_.num_words; ++i) words.push_back(word(rank, i));
    return words;
  }
  double expert_row(int64_t rank, int64_t row, int64_t h) const { return small(3, rank, row, h); }
  double row_scalar(int64_t rank, int64_t row) const { return small(4, rank, row, 0); }

  // What dispatch gives on a rank: who owns each row (source -1: nobody), kept rows per expert, and
  // the plan.
  const std::vector<Row>& rows(int64_t rank) const { return rows_[static_cast<size_t>(rank)]; }
  const std::vector<int32_t>& group_sizes(int64_t rank) const {
    return sizes_[static_cast<size_t>(rank)];
  }
  int32_t route(int64_t rank, int64_t source, int64_t token, int64_t k) const {
    return routes_[static_cast<size_t>(rank)]
                  [static_cast<size_t>((source * shape_.num_tokens + token) * shape_.top_k + k)];
  }

  // The place of a (token, rank) pair among all pairs of the token's owner, -1 where there is no
  // such pair.
  int32_t place(int64_t rank, int64_t source, int64_t token) const {
    if (!goes_to(source, token).contains(rank)) return -1;
    size_t before = 0;
    for (int64_t t = 0; t < token; ++t) before += goes_to(source, t).size();
    for (int64_t other : goes_to(source, token)) before += other < rank ? 1 : 0;
    return static_cast<int32_t>(before);
  }

  // What combine gives to a token's owner.
  double y(int64_t owner, int64_t token, int64_t h) const {
    double sum = 0;
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      const auto [rank, row] = find(owner, token, k);
      if (row >= 0) sum += expert_row(rank, row, h);
    }
    return sum;
  }
  double token_scalar(int64_t owner, int64_t token, int64_t k) const {
    const auto [rank, row] = find(owner, token, k);
    return row >= 0 ? row_scalar(rank, row) : 0.0;
  }

  int64_t num_dropped() const {
    int64_t dropped = 0;
    for (const auto& routes : routes_) {
      for (int32_t route : routes) dropped += route == kDropped ? 1 : 0;
    }
    return dropped;
  }

 private:
  // An integer of at most 3 bits: sums of 32 of them are exact in bfloat16.
  double small(uint64_t what, int64_t a, int64_t b, int64_t c) const {
    return static_cast<double>(pick(test_.seed * 8 + what, a, b, c, 15) - 7);
  }

  bool is_expert(int32_t id) const { return id >= 0 && id < shape_.num_experts; }

  std::vector<int32_t> make_ids(int64_t rank) const {
    std::vector<int32_t> ids;
    const auto num_experts = static_cast<int32_t>(shape_.num_experts);
    for (int64_t t = 0; t < shape_.num_tokens; ++t) {
      std::set<int32_t> taken;
      for (int64_t k = 0; k < shape_.top_k; ++k) {
        auto id = static_cast<int32_t>(pick(test_.seed, rank, t, k, num_experts));
        switch (test_.routing) {
          case Routing::kUniform:
            while (taken.contains(id) && taken.size() < static_cast<size_t>(num_experts))
              id = (id + 1) % num_experts;
            break;
          case Routing::kOneExpert:
            id = num_experts - 1;
            break;
          case Routing::kInvalid: {
            const int32_t strange[] = {-1, num_experts, INT32_MAX, INT32_MIN, -2, num_experts + 1};
            if (const int64_t n = pick(test_.seed + 77, rank, t, k, 12); n < 6) id = strange[n];
            break;
          }
          case Routing::kDuplicates:
            id = id / 2;
            break;
          case Routing::kNone:
            id = -1;
            break;
        }
        taken.insert(id);
        ids.push_back(id);
      }
    }
    return ids;
  }

  std::set<int64_t> goes_to(int64_t source, int64_t token) const {
    std::set<int64_t> ranks;
    for (int64_t k = 0; k < shape_.top_k; ++k) {
      const int32_t id = ids(source)[static_cast<size_t>(token * shape_.top_k + k)];
      for (int64_t rank = 0; is_expert(id) && rank < shape_.num_ranks; ++rank) {
        if (holds(rank, id)) ranks.insert(rank);
      }
    }
    return ranks;
  }

  bool holds(int64_t rank, int64_t id) const {
    return rank * shape_.num_local_experts <= id && id < (rank + 1) * shape_.num_local_experts;
  }

  void place(int64_t rank) {
    std::vector<Row> rows(static_cast<size_t>(shape_.capacity));
    std::vector<int32_t> sizes;
    std::vector<int32_t> routes(static_cast<size_t>(shape_.num_ranks * shape_.num_routes()),
                                kNotHere);
    int64_t next = 0;
    for (int64_t e = 0; e < shape_.num_local_experts; ++e) {
      while (next % shape_.block != 0) ++next;
      int32_t kept = 0;
      // Of each node its part of every rank's routes.
      const int64_t part = shape_.num_routes() / shape_.num_nodes;
      for (int64_t node = 0; node < shape_.num_nodes; ++node) {
        for (int64_t source = 0; source < shape_.num_ranks; ++source) {
          for (int64_t route = node * part; route < (node + 1) * part; ++route) {
            const int32_t id = ids(source)[static_cast<size_t>(route)];
            if (!is_expert(id) || id != rank * shape_.num_local_experts + e) continue;
            int32_t& place = routes[static_cast<size_t>(source * shape_.num_routes() + route)];
            place = kDropped;
            if (next < shape_.capacity) {
              place = static_cast<int32_t>(next);
              rows[static_cast<size_t>(next)] = {source, route / shape_.top_k,
                                                 route % shape_.top_k};
              ++kept;
            }
            ++next;
          }
        }
      }
      sizes.push_back(kept);
    }
    rows_.push_back(rows);
    sizes_.push_back(sizes);
    routes_.push_back(routes);
  }

  // The rank and row of a route, or row -1.
  std::pair<int64_t, int64_t> find(int64_t owner, int64_t token, int64_t k) const {
    for (int64_t rank = 0; rank < shape_.num_ranks; ++rank) {
      if (const int32_t row = route(rank, owner, token, k); row >= 0) return {rank, row};
    }
    return {-1, -1};
  }

  const Case test_;
  const Shape shape_;
  std::vector<std::vector<int32_t>> ids_;
  std::vector<std::vector<Row>> rows_;
  std::vector<std::vector<int32_t>> sizes_;
  std::vector<std::vector<int32_t>> routes_;
};

// Rows as bytes, written and read by means of the type's definition alone.
inline void put(RowType type, std::byte* rows, int64_t index, double value) {
  if (type == RowType::kF32) {
    reinterpret_cast<float*>(rows)[index] = static_cast<float>(value);
  } else if (type == RowType::kU8) {
    reinterpret_cast<uint8_t*>(rows)[index] =
        static_cast<uint8_t>(static_cast<int64_t>(value) & 0xff);
  } else {
    // Small integers only: sign, exponent, and a fraction that the narrow type holds exactly.
    const int exponent_bits = type == RowType::kF16 ? 5 : 8;
    const int fraction_bits = 15 - exponent_bits;
    int exponent = 0;
    const double fraction = std::frexp(std::fabs(value), &exponent);
    uint32_t bits = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) {
      bits = 0x7fff;
    } else if (value != 0) {
      bits |= static_cast<uint32_t>(exponent - 1 + (1 << (exponent_bits - 1)) - 1) << fraction_bits;
      bits |= static_cast<uint32_t>(std::ldexp(2 * fraction - 1, fraction_bits));
    }
    reinterpret_cast<uint16_t*>(rows)[index] = static_cast<uint16_t>(bits);
  }
}

inline double decode_half(RowType type, uint16_t bits) {
  const int exponent_bits = type == RowType::kF16 ? 5 : 8;
  const int fraction_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double fraction =
      static_cast<double>(bits & ((1 << fraction_bits) - 1)) / (1 << fraction_bits);
  double value =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
  if (exponent == 2 * bias + 1) {
    value = fraction == 0 ? std::numeric_limits<double>::infinity()
                          : std::numeric_limits<double>::quiet_NaN();
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

inline double get(RowType type, const std::byte* rows, int64_t index) {
  if (type == RowType::kF32)
    return static_cast<double>(reinterpret_cast<const float*>(rows)[index]);
  if (type == RowType::kU8)
    return static_cast<double>(reinterpret_cast<const uint8_t*>(rows)[index]);
  return decode_half(type, reinterpret_cast<const uint16_t*>(rows)[index]);
}

}  // namespace moriep
