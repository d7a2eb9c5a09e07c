// Program control: branches, barriers, waits, hardware registers and the end of a wave.
#include "memory.h"
#include "scheduler.h"
#include "semantics.h"

namespace gfx942 {
namespace {

void nothing(Wave&, const Instruction&) {}

void jump(Wave& wave, const Instruction& i) {
  wave.pc += static_cast<uint64_t>(int64_t{i.simm16()} * 4);
}

template <auto Condition>
void jump_if(Wave& wave, const Instruction& i) {
  if (Condition(wave)) jump(wave, i);
}

void call(Wave& wave, const Instruction& i) {
  wave.write_scalar_pair(i.operand[0], wave.pc);
  jump(wave, i);
}
void get_pc(Wave& wave, const Instruction& i) { wave.write_scalar_pair(i.operand[0], wave.pc); }
void set_pc(Wave& wave, const Instruction& i) { wave.pc = wave.read_scalar_pair(i.operand[0]); }
void swap_pc(Wave& wave, const Instruction& i) {
  const uint64_t target = wave.read_scalar_pair(i.operand[1]);
  wave.write_scalar_pair(i.operand[0], wave.pc);
  wave.pc = target;
}

void end(Wave& wave, const Instruction&) { wave.state = WaveState::kEnded; }
void yield(Wave& wave, const Instruction&) { wave.state = WaveState::kYielding; }
void barrier(Wave& wave, const Instruction& i) { arrive_at_barrier(wave, i); }

void trap(Wave&, const Instruction&) {
  throw FaultError(FaultCode::kIllegalInstruction, "executes a trap, as a failed assertion does");
}

// Numbers of hardware registers.
enum Register : uint32_t {
  kMode = 1,
  kStatus = 2,
  kTrapStatus = 3,
  kHardwareId = 4,
  kRegisterAllocation = 5,
  kLdsAllocation = 6,
  kWaitStatus = 7,
  kMemoryBases = 15,
  kXccId = 20,
};

struct BitField {
  uint32_t id;
  uint32_t shift;
  uint32_t mask;
  explicit BitField(uint16_t control)
      : id(control & 0x3f),
        shift(control >> 6 & 0x1f),
        mask(static_cast<uint32_t>((uint64_t{2} << (control >> 11 & 0x1f)) - 1)) {}
};

// Four SIMDs of a compute unit, ten compute units of a shader engine, four engines of a die.
uint32_t hardware_id(const Wave& wave) {
  const uint32_t unit = wave.group->slot / 8;
  return wave.index / 4 | (wave.index % 4) << 4 | (unit % 10) << 8 | (unit / 10 % 4) << 13 |
         (wave.group->slot & 0xf) << 16;
}

uint32_t read_hardware(const Wave& wave, uint32_t id) {
  switch (id) {
    case kMode:
      return wave.mode;
    case kStatus:
      return (wave.scc ? 1u : 0u) | (wave.exec() == 0 ? 1u << 9 : 0) |
             (wave.vcc() == 0 ? 1u << 10 : 0) | 1u << 16;
    case kTrapStatus:
    case kWaitStatus:
      return 0;
    case kHardwareId:
      return hardware_id(wave);
    case kLdsAllocation:
      return static_cast<uint32_t>((wave.group->lds.size() + 511) / 512) << 12;
    case kMemoryBases:
      return static_cast<uint32_t>(kPrivateAperture >> 48) |
             static_cast<uint32_t>(kSharedAperture >> 48) << 16;
    case kXccId:
      return wave.group->xcd;
  }
  throw FaultError(FaultCode::kIllegalInstruction,
                   "reads hardware register " + std::to_string(id) + ", which is not simulated");
}

void get_register(Wave& wave, const Instruction& i) {
  const BitField field(static_cast<uint16_t>(i.simm16()));
  const uint32_t value = read_hardware(wave, field.id);
  wave.write_scalar(i.operand[0], value >> field.shift & field.mask);
}

void set_register(Wave& wave, const Instruction& i, uint32_t value) {
  const BitField field(static_cast<uint16_t>(i.simm16()));
  if (field.id == kTrapStatus) return;
  if (field.id != kMode) {
    throw FaultError(FaultCode::kIllegalInstruction,
                     "writes hardware register " + std::to_string(field.id));
  }
  const uint32_t mask = field.mask << field.shift;
  wave.mode = (wave.mode & ~mask) | (value << field.shift & mask);
  wave.dx10_clamp = (wave.mode >> 8 & 1) != 0;
}

void set_register_scalar(Wave& wave, const Instruction& i) {
  set_register(wave, i, wave.read_scalar(i.operand[0]));
}
void set_register_literal(Wave& wave, const Instruction& i) { set_register(wave, i, i.raw[1]); }

void set_skip(Wave& wave, const Instruction& i) {
  const uint32_t bit = wave.read_scalar(i.operand[1]) & 31;
  wave.skip_vector = (wave.read_scalar(i.operand[0]) >> bit & 1) != 0;
}

// M0 holds the index in its lowest byte, and which operands are counted from it in bits 12 to 15.
constexpr uint32_t kIndexBits = 0xff;
constexpr unsigned kIndexedOperands = 12;

void set_index(Wave& wave, uint32_t mask, uint32_t value) {
  wave.s[kM0] = (wave.s[kM0] & ~mask) | (value & mask);
}
void start_indexing(Wave& wave, const Instruction& i) {
  const uint32_t operands = i.raw[0] >> 8 & 0xf;
  set_index(wave, kIndexBits | 0xf << kIndexedOperands,
            (wave.read_scalar(i.operand[0]) & kIndexBits) | operands << kIndexedOperands);
  wave.index_vectors = true;
}
void stop_indexing(Wave& wave, const Instruction&) { wave.index_vectors = false; }
void change_index(Wave& wave, const Instruction& i) {
  set_index(wave, kIndexBits, wave.read_scalar(i.operand[0]));
}
void change_indexed_operands(Wave& wave, const Instruction& i) {
  set_index(wave, 0xf << kIndexedOperands, (i.raw[0] & 0xf) << kIndexedOperands);
}

constexpr Semantics kTable[] = {
    {"s_setvskip", set_skip},
    {"s_set_gpr_idx_on", start_indexing},
    {"s_set_gpr_idx_off", stop_indexing},
    {"s_set_gpr_idx_idx", change_index},
    {"s_set_gpr_idx_mode", change_indexed_operands},
    {"s_endpgm", end},
    {"s_endpgm_saved", end},
    {"s_barrier", barrier},
    {"s_sleep", yield},
    {"s_trap", trap},
    {"s_branch", jump},
    {"s_cbranch_scc0", jump_if<[](const Wave& wave) { return !wave.scc; }>},
    {"s_cbranch_scc1", jump_if<[](const Wave& wave) { return wave.scc; }>},
    {"s_cbranch_vccz", jump_if<[](const Wave& wave) { return wave.vcc() == 0; }>},
    {"s_cbranch_vccnz", jump_if<[](const Wave& wave) { return wave.vcc() != 0; }>},
    {"s_cbranch_execz", jump_if<[](const Wave& wave) { return wave.exec() == 0; }>},
    {"s_cbranch_execnz", jump_if<[](const Wave& wave) { return wave.exec() != 0; }>},
    {"s_call_b64", call},
    {"s_getpc_b64", get_pc},
    {"s_setpc_b64", set_pc},
    {"s_swappc_b64", swap_pc},
    {"s_getreg_b32", get_register},
    {"s_setreg_b32", set_register_scalar},
    {"s_setreg_imm32_b32", set_register_literal},
    // Every instruction ends before the next one starts, so that there is nothing to wait for.
    {"s_waitcnt", nothing},
    {"s_waitcnt_vmcnt", nothing},
    {"s_waitcnt_lgkmcnt", nothing},
    {"s_waitcnt_expcnt", nothing},
    {"s_nop", nothing},
    {"s_setprio", nothing},
    {"s_sendmsg", nothing},
    {"s_sethalt", nothing},
    {"s_incperflevel", nothing},
    {"s_decperflevel", nothing},
    {"s_ttracedata", nothing},
    {"s_setkill", nothing},
    {"s_wakeup", nothing},
};

}  // namespace

void execute_in_vector_mode(Wave& wave, const Instruction& i) {
  if (wave.skip_vector) return;
  if (!i.mnemonic.starts_with("v_")) return i.handler(wave, i);
  Instruction moved = i;
  const uint32_t index = wave.s[kM0] & kIndexBits;
  const uint32_t operands = wave.s[kM0] >> kIndexedOperands & 0xf;
  // Bits 0 to 2 stand for the sources, bit 3 for the destination.
  for (uint32_t k = 0; k < 4; ++k) {
    Operand& operand = moved.operand[k];
    const uint32_t bit = k == 0 ? 3 : k - 1;
    if (operand.is_vector() && (operands >> bit & 1) != 0) {
      operand.index = static_cast<uint16_t>(operand.index + index);
    }
  }
  moved.handler(wave, moved);
}

Table control_table() { return kTable; }

}  // namespace gfx942
