// FLAT, GLOBAL and SCRATCH: addresses of lanes; the moves of all vector memory instructions.
#include "memory.h"
#include "semantics.h"
#include "vector.h"

namespace gfx942 {
namespace {

uint64_t address_of(Wave& wave, const Operand& operand, int lane) {
  const Lanes* words = wave.vector(operand.index, 2);
  return words[0][lane] | uint64_t{words[1][lane]} << 32;
}

template <class Check>
Places places_of(Wave& wave, const Instruction& i, Check check) {
  Places places;
  places.mask = wave.exec();
  places.scope = scope_of_bits(i.sc0, i.sc1);
  wave.memory->refresh();
  for_lanes(places.mask, [&](int lane) { places.of[static_cast<size_t>(lane)] = check(lane); });
  return places;
}

enum class Space : uint8_t { kFlat, kGlobal, kScratch };

// The operands of loads are: destination, address, base; of stores: address, data, base.
Places places_in(Space space, Wave& wave, const Instruction& i, int address, int base,
                 uint32_t bytes, Use use) {
  switch (space) {
    case Space::kFlat:
      return flat_places(wave, i, address, bytes, use);
    case Space::kGlobal:
      return global_places(wave, i, address, base, bytes, use);
    case Space::kScratch:
      break;
  }
  return scratch_places(wave, i, address, base, bytes, use);
}

template <Space space, Shape shape>
void load_from(Wave& wave, const Instruction& i) {
  load(wave, i.operand[0], places_in(space, wave, i, 1, 2, shape.bytes, Use::kLoad), shape);
}

template <Space space, Shape shape>
void store_to(Wave& wave, const Instruction& i) {
  store(wave, i.operand[1], places_in(space, wave, i, 0, 2, shape.bytes, Use::kStore), shape);
}

template <Shape shape>
void load_buffer(Wave& wave, const Instruction& i) {
  if (i.lds) {
    // Without a destination register, the address comes first.
    store_in_lds(wave, i, buffer_places(wave, i, 0, shape.bytes, Use::kLoad), shape);
  } else {
    load(wave, i.operand[0], buffer_places(wave, i, 1, shape.bytes, Use::kLoad), shape);
  }
}

template <Shape shape>
void store_buffer(Wave& wave, const Instruction& i) {
  store(wave, i.operand[0], buffer_places(wave, i, 1, shape.bytes, Use::kStore), shape);
}

template <Shape shape>
void load_global_to_lds(Wave& wave, const Instruction& i) {
  store_in_lds(wave, i, global_places(wave, i, 0, 1, shape.bytes, Use::kLoad), shape);
}

template <size_t bytes>
void copy_words(Wave& wave, const Operand& operand, const Places& places, bool to_memory) {
  Lanes* words = wave.vector(operand.index, bytes / 4);
  // Inlined with the number of bytes: the common case is a plain copy.
  for_lanes(places.mask, [&](int lane) {
    const Place& place = places.of[static_cast<size_t>(lane)];
    std::array<uint32_t, bytes / 4> moved;
    if (to_memory) {
      for (size_t k = 0; k < moved.size(); ++k) moved[k] = words[k][lane];
      if (place.at != nullptr && !place.cached) {
        std::memcpy(place.at, moved.data(), bytes);
      } else {
        write_place(wave, place, places.scope, moved.data(), bytes);
      }
    } else {
      if (place.at != nullptr && !place.cached) {
        std::memcpy(moved.data(), place.at, bytes);
      } else {
        read_place(wave, place, places.scope, moved.data(), bytes);
      }
      for (size_t k = 0; k < moved.size(); ++k) words[k][lane] = moved[k];
    }
  });
}

void move_words(Wave& wave, const Operand& operand, const Places& places, uint8_t bytes,
                bool to_memory) {
  switch (bytes) {
    case 4:
      return copy_words<4>(wave, operand, places, to_memory);
    case 8:
      return copy_words<8>(wave, operand, places, to_memory);
    case 12:
      return copy_words<12>(wave, operand, places, to_memory);
    default:
      return copy_words<16>(wave, operand, places, to_memory);
  }
}

uint32_t load_narrow(Wave& wave, const Place& place, Scope scope, Shape shape) {
  uint32_t value = 0;
  read_place(wave, place, scope, &value, shape.bytes);
  if (!shape.is_signed) return value;
  return shape.bytes == 1 ? static_cast<uint32_t>(static_cast<int8_t>(value))
                          : static_cast<uint32_t>(static_cast<int16_t>(value));
}

}  // namespace

Places global_places(Wave& wave, const Instruction& i, int address_operand, int base_operand,
                     uint32_t bytes, Use use) {
  const Operand& address = i.operand[static_cast<size_t>(address_operand)];
  const Operand& base = i.operand[static_cast<size_t>(base_operand)];
  const auto offset = static_cast<uint64_t>(int64_t{i.offset});
  if (base.bank == Bank::kScalar) {
    const uint64_t start = wave.read_scalar_pair(base) + offset;
    const uint32_t* words = *wave.vector(address.index);
    return places_of(
        wave, i, [&](int lane) { return wave.memory->at(start + words[lane], bytes, use, lane); });
  }
  return places_of(wave, i, [&](int lane) {
    return wave.memory->at(address_of(wave, address, lane) + offset, bytes, use, lane);
  });
}

Places flat_places(Wave& wave, const Instruction& i, int address_operand, uint32_t bytes, Use use) {
  const Operand& address = i.operand[static_cast<size_t>(address_operand)];
  const auto offset = static_cast<uint64_t>(int64_t{i.offset});
  return places_of(wave, i, [&](int lane) {
    return flat_at(wave, address_of(wave, address, lane) + offset, bytes, use, lane);
  });
}

Places scratch_places(Wave& wave, const Instruction& i, int address_operand, int base_operand,
                      uint32_t bytes, Use use) {
  const Operand& address = i.operand[static_cast<size_t>(address_operand)];
  const Operand& base = i.operand[static_cast<size_t>(base_operand)];
  uint32_t start = static_cast<uint32_t>(i.offset);
  if (base.bank == Bank::kScalar) start += wave.read_scalar(base);
  const uint32_t* words = address.is_vector() ? *wave.vector(address.index) : nullptr;
  return places_of(wave, i, [&](int lane) {
    const uint32_t offset = start + (words != nullptr ? words[lane] : 0);
    return scratch_at(wave, offset, bytes, use, lane);
  });
}

void load(Wave& wave, const Operand& to, const Places& places, Shape shape) {
  if (shape.bytes >= 4) return move_words(wave, to, places, shape.bytes, false);
  uint32_t* words = *wave.vector(to.index);
  for_lanes(places.mask, [&](int lane) {
    const uint32_t value =
        load_narrow(wave, places.of[static_cast<size_t>(lane)], places.scope, shape);
    switch (shape.into) {
      case Into::kWords:
        words[lane] = value;
        break;
      case Into::kLowHalf:
        words[lane] = (words[lane] & 0xffff0000) | (value & 0xffff);
        break;
      case Into::kHighHalf:
        words[lane] = (words[lane] & 0xffff) | value << 16;
        break;
    }
  });
}

void store(Wave& wave, const Operand& from, const Places& places, Shape shape) {
  if (shape.bytes >= 4) return move_words(wave, from, places, shape.bytes, true);
  const uint32_t* words = *wave.vector(from.index);
  for_lanes(places.mask, [&](int lane) {
    const uint32_t value = shape.into == Into::kHighHalf ? words[lane] >> 16 : words[lane];
    write_place(wave, places.of[static_cast<size_t>(lane)], places.scope, &value, shape.bytes);
  });
}

void store_in_lds(Wave& wave, const Instruction& i, const Places& places, Shape shape) {
  // The lanes write one after the other from M0 on, a dword each whatever is loaded.
  const uint32_t start = wave.s[kM0] + static_cast<uint32_t>(i.offset);
  for_lanes(places.mask, [&](int lane) {
    const Place& place = places.of[static_cast<size_t>(lane)];
    uint32_t value = 0;
    if (shape.bytes < 4) {
      value = load_narrow(wave, place, places.scope, shape);
    } else {
      read_place(wave, place, places.scope, &value, sizeof(value));
    }
    const uint64_t offset = start + 4u * static_cast<uint32_t>(lane);
    std::memcpy(lds_at(wave, offset, 4, Use::kStore, lane).at, &value, sizeof(value));
  });
}

namespace {

constexpr Shape kU8 = {1}, kI8 = {1, true}, kU16 = {2}, kI16 = {2, true};
constexpr Shape kLowU8 = {1, false, Into::kLowHalf}, kLowI8 = {1, true, Into::kLowHalf};
constexpr Shape kHighU8 = {1, false, Into::kHighHalf}, kHighI8 = {1, true, Into::kHighHalf};
constexpr Shape kLow16 = {2, false, Into::kLowHalf}, kHigh16 = {2, false, Into::kHighHalf};
constexpr Shape kX1 = {4}, kX2 = {8}, kX3 = {12}, kX4 = {16};

#define GFX942_SPACE(prefix, load_with, store_with)                                                \
  {prefix "load_ubyte", load_with(kU8)}, {prefix "load_sbyte", load_with(kI8)},                    \
      {prefix "load_ushort", load_with(kU16)}, {prefix "load_sshort", load_with(kI16)},            \
      {prefix "load_ubyte_d16", load_with(kLowU8)}, {prefix "load_sbyte_d16", load_with(kLowI8)},  \
      {prefix "load_ubyte_d16_hi", load_with(kHighU8)},                                            \
      {prefix "load_sbyte_d16_hi", load_with(kHighI8)},                                            \
      {prefix "load_short_d16", load_with(kLow16)},                                                \
      {prefix "load_short_d16_hi", load_with(kHigh16)}, {prefix "load_dword", load_with(kX1)},     \
      {prefix "load_dwordx2", load_with(kX2)}, {prefix "load_dwordx3", load_with(kX3)},            \
      {prefix "load_dwordx4", load_with(kX4)}, {prefix "store_byte", store_with(kU8)},             \
      {prefix "store_byte_d16_hi", store_with(kHighU8)}, {prefix "store_short", store_with(kU16)}, \
      {prefix "store_short_d16_hi", store_with(kHigh16)}, {prefix "store_dword", store_with(kX1)}, \
      {prefix "store_dwordx2", store_with(kX2)}, {prefix "store_dwordx3", store_with(kX3)}, {      \
    prefix "store_dwordx4", store_with(kX4)                                                        \
  }

#define GFX942_FLAT_LOAD(shape) load_from<Space::kFlat, shape>
#define GFX942_FLAT_STORE(shape) store_to<Space::kFlat, shape>
#define GFX942_GLOBAL_LOAD(shape) load_from<Space::kGlobal, shape>
#define GFX942_GLOBAL_STORE(shape) store_to<Space::kGlobal, shape>
#define GFX942_SCRATCH_LOAD(shape) load_from<Space::kScratch, shape>
#define GFX942_SCRATCH_STORE(shape) store_to<Space::kScratch, shape>
#define GFX942_BUFFER_LOAD(shape) load_buffer<shape>
#define GFX942_BUFFER_STORE(shape) store_buffer<shape>

constexpr Semantics kTable[] = {
    GFX942_SPACE("flat_", GFX942_FLAT_LOAD, GFX942_FLAT_STORE),
    GFX942_SPACE("global_", GFX942_GLOBAL_LOAD, GFX942_GLOBAL_STORE),
    GFX942_SPACE("scratch_", GFX942_SCRATCH_LOAD, GFX942_SCRATCH_STORE),
    GFX942_SPACE("buffer_", GFX942_BUFFER_LOAD, GFX942_BUFFER_STORE),
    {"global_load_lds_ubyte", load_global_to_lds<kU8>},
    {"global_load_lds_sbyte", load_global_to_lds<kI8>},
    {"global_load_lds_ushort", load_global_to_lds<kU16>},
    {"global_load_lds_sshort", load_global_to_lds<kI16>},
    {"global_load_lds_dword", load_global_to_lds<kX1>},
};

}  // namespace

Table memory_table() { return kTable; }

}  // namespace gfx942
