#include "vector.h"

#include <bit>

namespace gfx942 {
namespace {

struct Field {
  unsigned shift;
  unsigned bits;
};

Field field_of(Select select) {
  switch (select) {
    case Select::kByte0:
    case Select::kByte1:
    case Select::kByte2:
    case Select::kByte3:
      return {8 * (static_cast<unsigned>(select) - static_cast<unsigned>(Select::kByte0)), 8};
    case Select::kWord0:
      return {0, 16};
    case Select::kWord1:
      return {16, 16};
    case Select::kDword:
      break;
  }
  return {0, 32};
}

uint32_t extract(uint32_t word, Field field, bool sign_extend) {
  const uint32_t at_top = word << (32 - field.bits - field.shift);
  return sign_extend ? static_cast<uint32_t>(static_cast<int32_t>(at_top) >> (32 - field.bits))
                     : at_top >> (32 - field.bits);
}

}  // namespace

const uint32_t* read_words(Wave& wave, const Instruction& i, const Operand& operand, unsigned dword,
                           Lanes& buffer) {
  const uint32_t* words = nullptr;
  if (operand.is_vector()) {
    words = *wave.vector(static_cast<uint16_t>(operand.index + dword));
    if (operand.moved) {
      const LaneMove& move = *i.lane_move;
      const uint64_t exec = wave.exec();
      for (int lane = 0; lane < kLanes; ++lane) {
        const uint8_t from = move.from[lane];
        buffer[lane] = from != kNoLane && (exec >> from & 1) != 0 ? words[from] : 0;
      }
      words = buffer;
    }
  } else {
    Operand part = operand;
    part.index = static_cast<uint16_t>(part.index + dword);
    std::fill_n(buffer, kLanes, wave.read_scalar(part));
    words = buffer;
  }
  if (operand.select != Select::kDword || operand.sign_extend) {
    const Field field = field_of(operand.select);
    for (int lane = 0; lane < kLanes; ++lane) {
      buffer[lane] = extract(words[lane], field, operand.sign_extend);
    }
    words = buffer;
  }
  return words;
}

uint64_t write_mask(const Wave& wave, const Instruction& i) {
  const uint64_t exec = wave.exec();
  if (i.lane_move == nullptr) return exec;
  const LaneMove& move = *i.lane_move;
  uint64_t mask = exec & move.enabled;
  if (!move.zero_fill) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint8_t from = move.from[lane];
      if (from == kNoLane || (exec >> from & 1) == 0) mask &= ~(uint64_t{1} << lane);
    }
  }
  return mask;
}

void write_words(Wave& wave, const Operand& operand, unsigned dword, const uint32_t* values,
                 uint64_t mask) {
  uint32_t* to = *wave.vector(static_cast<uint16_t>(operand.index + dword));
  if (mask == ~uint64_t{0}) {
    std::memcpy(to, values, sizeof(Lanes));
    return;
  }
  // In two halves: a 64-bit mask does not vectorise with 32-bit lanes.
  for (int half = 0; half < 2; ++half) {
    const auto bits = static_cast<uint32_t>(mask >> 32 * half);
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t keep = (bits >> lane & 1) - 1;
      to[32 * half + lane] = (to[32 * half + lane] & keep) | (values[32 * half + lane] & ~keep);
    }
  }
}

void write_selected(Wave& wave, const Instruction& i, const uint32_t* values, uint64_t mask) {
  const Field field = field_of(i.destination_select);
  if (field.bits == 32) return write_words(wave, i.operand[0], 0, values, mask);
  const uint32_t field_mask = ((1u << field.bits) - 1) << field.shift;
  uint32_t* to = *wave.vector(i.operand[0].index);
  for_lanes(mask, [&](int lane) {
    const uint32_t placed = values[lane] << field.shift & field_mask;
    uint32_t rest = 0;
    if (i.destination_unused == Unused::kPreserve) {
      rest = to[lane] & ~field_mask;
    } else if (i.destination_unused == Unused::kSext && (values[lane] >> (field.bits - 1) & 1)) {
      rest = field.shift + field.bits < 32 ? ~0u << (field.shift + field.bits) : 0;
    }
    to[lane] = placed | rest;
  });
}

void write_halves(Wave& wave, const Instruction& i, const uint16_t* values, uint64_t mask,
                  Half16 half) {
  Lanes words;
  for (int lane = 0; lane < kLanes; ++lane) words[lane] = values[lane];
  if (i.sdwa) return write_selected(wave, i, words, mask);
  if (half != Half16::kLow) {
    const bool high = half == Half16::kHigh;
    const uint32_t* old = *wave.vector(i.operand[0].index);
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane] =
          high ? words[lane] << 16 | (old[lane] & 0xffff) : words[lane] | (old[lane] & 0xffff0000);
    }
  }
  write_words(wave, i.operand[0], 0, words, mask);
}

}  // namespace gfx942
