// DS instructions that move data: LDS reads and writes, and the exchanges between lanes that use
// its crossbar.
#include "memory.h"
#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

template <Shape shape>
void read(Wave& wave, const Instruction& i) {
  const auto offset = static_cast<uint32_t>(i.offset);
  load(wave, i.operand[0], lds_places(wave, i, 1, offset, shape.bytes, Use::kLoad), shape);
}

template <Shape shape>
void write(Wave& wave, const Instruction& i) {
  const auto offset = static_cast<uint32_t>(i.offset);
  store(wave, i.operand[1], lds_places(wave, i, 0, offset, shape.bytes, Use::kStore), shape);
}

// Two values at offsets that count values, or 64 of them. Both addresses are read before the first
// result is written, which may be the address register.
template <Shape shape, uint32_t stride>
void read_two(Wave& wave, const Instruction& i) {
  const uint32_t unit = shape.bytes * stride;
  const Places first = lds_places(wave, i, 1, i.offset0 * unit, shape.bytes, Use::kLoad);
  const Places second = lds_places(wave, i, 1, i.offset1 * unit, shape.bytes, Use::kLoad);
  Operand upper = i.operand[0];
  upper.index = static_cast<uint16_t>(upper.index + shape.bytes / 4);
  load(wave, i.operand[0], first, shape);
  load(wave, upper, second, shape);
}

template <Shape shape, uint32_t stride>
void write_two(Wave& wave, const Instruction& i) {
  const uint32_t unit = shape.bytes * stride;
  store(wave, i.operand[1], lds_places(wave, i, 0, i.offset0 * unit, shape.bytes, Use::kStore),
        shape);
  store(wave, i.operand[2], lds_places(wave, i, 0, i.offset1 * unit, shape.bytes, Use::kStore),
        shape);
}

// The address is M0 and the lane's number.
Places own_places(Wave& wave, const Instruction& i, Use use) {
  Places places;
  places.mask = wave.exec();
  const uint64_t start = (wave.s[kM0] & 0xffff) + static_cast<uint32_t>(i.offset);
  for_lanes(places.mask, [&](int lane) {
    places.of[static_cast<size_t>(lane)] =
        lds_at(wave, start + 4u * static_cast<uint32_t>(lane), 4, use, lane);
  });
  return places;
}

void read_own(Wave& wave, const Instruction& i) {
  load(wave, i.operand[0], own_places(wave, i, Use::kLoad), {4});
}
void write_own(Wave& wave, const Instruction& i) {
  store(wave, i.operand[0], own_places(wave, i, Use::kStore), {4});
}

// Pulls: each lane reads from the lane that its address names.
void backward_permute(Wave& wave, const Instruction& i) {
  const uint32_t* address = *wave.vector(i.operand[1].index);
  const uint32_t* data = *wave.vector(i.operand[2].index);
  const uint64_t exec = wave.exec();
  Lanes result;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t from = (address[lane] + static_cast<uint32_t>(i.offset)) / 4 % kLanes;
    result[lane] = (exec >> from & 1) != 0 ? data[from] : 0;
  }
  write_words(wave, i.operand[0], 0, result, exec);
}

// Pushes: of lanes that name the same destination, the highest wins.
void permute(Wave& wave, const Instruction& i) {
  const uint32_t* address = *wave.vector(i.operand[1].index);
  const uint32_t* data = *wave.vector(i.operand[2].index);
  Lanes result = {};
  for_lanes(wave.exec(), [&](int lane) {
    result[(address[lane] + static_cast<uint32_t>(i.offset)) / 4 % kLanes] = data[lane];
  });
  write_words(wave, i.operand[0], 0, result, wave.exec());
}

uint32_t swizzled_lane(uint32_t lane, uint32_t control) {
  const uint32_t group = lane & ~31u;
  const uint32_t in_group = lane & 31;
  if (control >= 0xe000) {
    // The order of a fast Fourier transform: bits reversed within what the mask leaves.
    const uint32_t mask = control & 0x1f;
    uint32_t reversed = 0;
    for (uint32_t bit = 0; bit < 5; ++bit) reversed |= (in_group >> bit & 1) << (4 - bit);
    uint32_t shift = 0;
    while (shift < 5 && (mask >> shift & 1) != 0) ++shift;
    return group + ((in_group & mask) | (reversed >> shift & ~mask & 31));
  }
  if (control >= 0xc000) {
    const uint32_t mask = control & 0x1f;
    const uint32_t amount = control >> 5 & 0x1f;
    const uint32_t rotated = (control >> 10 & 1) != 0 ? in_group - amount : in_group + amount;
    return group + ((in_group & mask) | (rotated & ~mask & 31));
  }
  if (control >= 0x8000) return (lane & ~3u) + (control >> 2 * (lane & 3) & 3);
  return group + (((in_group & control) | (control >> 5 & 31)) ^ (control >> 10 & 31)) % 32;
}

void swizzle(Wave& wave, const Instruction& i) {
  const uint32_t* data = *wave.vector(i.operand[1].index);
  const uint64_t exec = wave.exec();
  Lanes result;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t from = swizzled_lane(lane, i.raw[0] & 0xffff);
    result[lane] = (exec >> from & 1) != 0 ? data[from] : 0;
  }
  write_words(wave, i.operand[0], 0, result, exec);
}

// A counter in LDS that moves by the number of active lanes; all get its old value.
void count_lanes(Wave& wave, const Instruction& i, bool up) {
  const uint64_t offset = (wave.s[kM0] & 0xffff) + static_cast<uint32_t>(i.offset);
  std::byte* at = lds_at(wave, offset, 4, Use::kAtomic, 0).at;
  uint32_t old;
  std::memcpy(&old, at, sizeof(old));
  const auto lanes = static_cast<uint32_t>(__builtin_popcountll(wave.exec()));
  const uint32_t updated = up ? old + lanes : old - lanes;
  std::memcpy(at, &updated, sizeof(updated));
  Lanes result;
  std::fill_n(result, kLanes, old);
  write_words(wave, i.operand[0], 0, result, wave.exec());
}

constexpr Shape kHigh8 = {1, false, Into::kHighHalf}, kHigh16 = {2, false, Into::kHighHalf};

constexpr Semantics kTable[] = {
    {"ds_read_u8", read<Shape{1}>},
    {"ds_read_i8", read<Shape{1, true}>},
    {"ds_read_u16", read<Shape{2}>},
    {"ds_read_i16", read<Shape{2, true}>},
    {"ds_read_u8_d16", read<Shape{1, false, Into::kLowHalf}>},
    {"ds_read_u8_d16_hi", read<kHigh8>},
    {"ds_read_i8_d16", read<Shape{1, true, Into::kLowHalf}>},
    {"ds_read_i8_d16_hi", read<Shape{1, true, Into::kHighHalf}>},
    {"ds_read_u16_d16", read<Shape{2, false, Into::kLowHalf}>},
    {"ds_read_u16_d16_hi", read<kHigh16>},
    {"ds_read_b32", read<Shape{4}>},
    {"ds_read_b64", read<Shape{8}>},
    {"ds_read_b96", read<Shape{12}>},
    {"ds_read_b128", read<Shape{16}>},
    {"ds_read2_b32", read_two<Shape{4}, 1>},
    {"ds_read2st64_b32", read_two<Shape{4}, 64>},
    {"ds_read2_b64", read_two<Shape{8}, 1>},
    {"ds_read2st64_b64", read_two<Shape{8}, 64>},
    {"ds_read_addtid_b32", read_own},
    {"ds_write_b8", write<Shape{1}>},
    {"ds_write_b8_d16_hi", write<kHigh8>},
    {"ds_write_b16", write<Shape{2}>},
    {"ds_write_b16_d16_hi", write<kHigh16>},
    {"ds_write_b32", write<Shape{4}>},
    {"ds_write_b64", write<Shape{8}>},
    {"ds_write_b96", write<Shape{12}>},
    {"ds_write_b128", write<Shape{16}>},
    {"ds_write2_b32", write_two<Shape{4}, 1>},
    {"ds_write2st64_b32", write_two<Shape{4}, 64>},
    {"ds_write2_b64", write_two<Shape{8}, 1>},
    {"ds_write2st64_b64", write_two<Shape{8}, 64>},
    {"ds_write_addtid_b32", write_own},
    {"ds_bpermute_b32", backward_permute},
    {"ds_permute_b32", permute},
    {"ds_swizzle_b32", swizzle},
    {"ds_append", [](Wave& wave, const Instruction& i) { count_lanes(wave, i, true); }},
    {"ds_consume", [](Wave& wave, const Instruction& i) { count_lanes(wave, i, false); }},
};

}  // namespace

Places lds_places(Wave& wave, const Instruction& i, int address_operand, uint32_t offset,
                  uint32_t bytes, Use use) {
  const uint32_t* address = *wave.vector(i.operand[static_cast<size_t>(address_operand)].index);
  Places places;
  places.mask = wave.exec();
  for_lanes(places.mask, [&](int lane) {
    // The sum has 32 bits: compilers take a negative address and an offset that leads back.
    places.of[static_cast<size_t>(lane)] = lds_at(wave, address[lane] + offset, bytes, use, lane);
  });
  return places;
}

Table lds_table() { return kTable; }

}  // namespace gfx942
