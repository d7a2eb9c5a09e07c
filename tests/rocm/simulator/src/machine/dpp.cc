#include "dpp.h"

#include <cstdlib>
#include <functional>
#include <map>
#include <string>

namespace gfx942 {
namespace {

// The lane that lane n reads, or a number outside the wave.
using Source = std::function<int(int n, int amount)>;

constexpr int kOutside = -1;

int in_row(int n, int position) {
  return position >= 0 && position < 16 ? (n & ~15) + position : kOutside;
}

const std::map<std::string_view, Source>& controls() {
  static const std::map<std::string_view, Source> table = {
      {"row_shl", [](int n, int by) { return in_row(n, (n & 15) + by); }},
      {"row_shr", [](int n, int by) { return in_row(n, (n & 15) - by); }},
      {"row_ror", [](int n, int by) { return in_row(n, ((n & 15) - by) & 15); }},
      {"row_mirror", [](int n, int) { return n ^ 15; }},
      {"row_half_mirror", [](int n, int) { return n ^ 7; }},
      {"row_newbcast", [](int n, int lane) { return in_row(n, lane); }},
      {"row_share", [](int n, int lane) { return in_row(n, lane); }},
      // The last lane of a row, or of the lower half, goes to all lanes of what follows.
      {"row_bcast", [](int n, int last) { return last == 15 ? (n & ~15) - 1 : (n & ~31) - 1; }},
      {"wave_shl", [](int n, int) { return n + 1; }},
      {"wave_shr", [](int n, int) { return n - 1; }},
      {"wave_rol", [](int n, int) { return (n + 1) & 63; }},
      {"wave_ror", [](int n, int) { return (n - 1) & 63; }},
  };
  return table;
}

int number(std::string_view text) {
  return static_cast<int>(std::strtol(std::string(text).c_str(), nullptr, 0));
}

}  // namespace

bool LaneMoveText::control(std::string_view name, std::string_view value) {
  if (name == "row_mask") {
    row_mask_ = number(value);
  } else if (name == "bank_mask") {
    bank_mask_ = number(value);
  } else if (name == "bound_ctrl") {
    zero_fill_ = true;
  } else if (name == "quad_perm" || controls().contains(name)) {
    name_ = name;
    value_ = value;
  } else {
    return false;
  }
  return true;
}

std::shared_ptr<const LaneMove> LaneMoveText::finish() const {
  if (name_.empty()) return nullptr;
  auto move = std::make_shared<LaneMove>();
  move->zero_fill = zero_fill_;
  for (int n = 0; n < 64; ++n) {
    // quad_perm:[3,2,1,0] has one digit for each lane of a quad.
    const int from = name_ == "quad_perm" ? (n & ~3) + (value_[1 + 2 * (n & 3)] - '0')
                                          : controls().at(name_)(n, number(value_));
    move->from[n] = from >= 0 && from < 64 ? static_cast<uint8_t>(from) : kNoLane;
    const bool enabled = (row_mask_ >> (n / 16) & 1) != 0 && (bank_mask_ >> (n / 4 % 4) & 1) != 0;
    if (!enabled) move->enabled &= ~(uint64_t{1} << n);
  }
  return move;
}

}  // namespace gfx942
