// SMEM: loads into scalar registers, clocks, and the scalar cache's maintenance.
#include <algorithm>
#include <chrono>

#include "memory.h"
#include "semantics.h"

namespace gfx942 {
namespace {

// The lane that faults name for accesses of the whole wave.
constexpr int kWholeWave = 0;

uint32_t offset_of(const Wave& wave, const Instruction& i) {
  return wave.read_scalar(i.operand[2]) + static_cast<uint32_t>(i.offset);
}

void copy(Wave& wave, const Operand& to, uint64_t from, uint32_t dwords) {
  const Place place = wave.memory->at(from & ~uint64_t{3}, 4 * dwords, Use::kLoad, kWholeWave);
  read_place(wave, place, Scope::kDie, &wave.s[to.index], 4 * dwords);
}

template <uint32_t dwords>
void load(Wave& wave, const Instruction& i) {
  // A 20- or 21-bit immediate is signed; one that is printed as a constant operand is already
  // extended.
  const auto offset = static_cast<uint64_t>(int64_t{static_cast<int32_t>(offset_of(wave, i))});
  wave.memory->refresh();
  copy(wave, i.operand[0], wave.read_scalar_pair(i.operand[1]) + offset, dwords);
}

template <uint32_t dwords>
void load_buffer(Wave& wave, const Instruction& i) {
  const uint32_t* resource = &wave.s[i.operand[1].index];
  const uint64_t base = resource[0] | uint64_t{resource[1] & 0xffff} << 32;
  const uint32_t stride = resource[1] >> 16 & 0x3fff;
  const uint64_t bytes = uint64_t{resource[2]} * std::max(stride, 1u);
  const uint32_t offset = offset_of(wave, i) & ~3u;
  wave.memory->refresh();
  std::fill_n(&wave.s[i.operand[0].index], dwords, 0);
  for (uint32_t k = 0; k < dwords && uint64_t{offset} + 4 * k + 4 <= bytes; ++k) {
    Operand to = i.operand[0];
    to.index = static_cast<uint16_t>(to.index + k);
    copy(wave, to, base + offset + 4 * k, 1);
  }
}

void nothing(Wave&, const Instruction&) {}

// Both clocks count the 100 MHz ticks of the real one: kernels only take differences.
void read_clock(Wave& wave, const Instruction& i) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
  wave.write_scalar_pair(i.operand[0], static_cast<uint64_t>(nanoseconds / 10));
}

constexpr Semantics kTable[] = {
    {"s_load_dword", load<1>},
    {"s_load_dwordx2", load<2>},
    {"s_load_dwordx4", load<4>},
    {"s_load_dwordx8", load<8>},
    {"s_load_dwordx16", load<16>},
    {"s_buffer_load_dword", load_buffer<1>},
    {"s_buffer_load_dwordx2", load_buffer<2>},
    {"s_buffer_load_dwordx4", load_buffer<4>},
    {"s_buffer_load_dwordx8", load_buffer<8>},
    {"s_buffer_load_dwordx16", load_buffer<16>},
    {"s_memtime", read_clock},
    {"s_memrealtime", read_clock},
    {"s_dcache_inv", nothing},
    {"s_dcache_inv_vol", nothing},
    {"s_dcache_wb", nothing},
    {"s_dcache_wb_vol", nothing},
    {"s_icache_inv", nothing},
};

}  // namespace

Table scalar_memory_table() { return kTable; }

}  // namespace gfx942
