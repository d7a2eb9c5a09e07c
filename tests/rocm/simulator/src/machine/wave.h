// The state of a wave, its workgroup and its launch.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../launch.h"
#include "instruction.h"

namespace gfx942 {

constexpr int kLanes = 64;
using Lanes = uint32_t[kLanes];

// Ends a launch. Handlers state what they know; the scheduler adds kernel, pc and instruction.
struct FaultError : std::runtime_error {
  FaultError(FaultCode fault_code, const std::string& what)
      : std::runtime_error(what), code(fault_code) {}
  FaultCode code;
};

class Memory;
struct Dispatch;

// Which waves have used a byte of LDS since the workgroup's last barrier, one bit for each.
struct LdsUse {
  uint64_t barriers = 0;  // of the workgroup at the last use
  uint16_t loaded = 0;
  uint16_t stored = 0;
  uint16_t updated = 0;  // by atomics, which may meet
};

struct Workgroup {
  Dispatch* dispatch = nullptr;
  Dim3 id;
  uint32_t linear_id = 0;
  uint32_t xcd = 0;   // the die that runs it
  uint32_t slot = 0;  // among the resident workgroups; stands for the compute unit
  std::vector<std::byte> lds;
  std::vector<bool> lds_written;  // only kept if uninitialised reads are checked
  std::vector<LdsUse> lds_used;   // only kept if races are checked
  uint32_t waves = 0;
  uint32_t live_waves = 0;
  uint32_t waiting_waves = 0;
  uint64_t barrier_pc = 0;
  uint64_t barriers = 0;  // that all waves have reached
};

enum class WaveState : uint8_t { kRunning, kYielding, kAtBarrier, kEnded };

// Bits of the mode register.
constexpr uint32_t kModeDefault = 0xf0;
constexpr uint32_t kModeFp16Overflow = 1u << 23;

struct Wave {
  Workgroup* group = nullptr;
  Dispatch* dispatch = nullptr;
  Memory* memory = nullptr;
  uint64_t pc = 0;
  WaveState state = WaveState::kRunning;
  bool scc = false;
  uint32_t index = 0;            // within the workgroup
  uint64_t barriers_before = 0;  // of the workgroup when this wave arrived at the one it waits at
  uint32_t mode = kModeDefault;
  bool dx10_clamp = true;
  bool skip_vector = false;    // s_setvskip
  bool index_vectors = false;  // s_set_gpr_idx_on
  alignas(8) std::array<uint32_t, kFirstComputed> s{};
  uint32_t num_vectors = 0;
  uint32_t num_accumulators = 0;
  std::unique_ptr<Lanes[]> vectors;  // the accumulators follow the ordinary registers
  Lanes* accumulators = nullptr;
  std::unique_ptr<std::byte[]> scratch;  // of all lanes, one after the other
  uint32_t scratch_bytes = 0;            // of one lane

  bool has_vector_mode() const { return skip_vector || index_vectors; }

  uint64_t pair(uint16_t index) const {
    uint64_t value;
    std::memcpy(&value, &s[index], sizeof(value));
    return value;
  }
  void set_pair(uint16_t index, uint64_t value) { std::memcpy(&s[index], &value, sizeof(value)); }
  uint64_t exec() const { return pair(kExec); }
  void set_exec(uint64_t value) { set_pair(kExec, value); }
  uint64_t vcc() const { return pair(kVcc); }

  // A vector register; `dwords` of them must exist.
  Lanes* vector(uint16_t index, uint32_t dwords = 1) {
    if (index >= kFirstAccumulator) {
      const uint32_t accumulator = index - kFirstAccumulator;
      if (accumulator + dwords > num_accumulators) throw_no_register('a', accumulator);
      return accumulators + accumulator;
    }
    if (index + dwords > num_vectors) throw_no_register('v', index);
    return vectors.get() + index;
  }
  [[noreturn]] static void throw_no_register(char bank, uint32_t index);

  uint32_t read_scalar(const Operand& operand) const;
  uint64_t read_scalar_pair(const Operand& operand) const;
  void write_scalar(const Operand& operand, uint32_t value) { s[operand.index] = value; }
  void write_scalar_pair(const Operand& operand, uint64_t value) { set_pair(operand.index, value); }
};

// Where flat addresses mean LDS and scratch. No process has memory there.
constexpr uint64_t kSharedAperture = uint64_t{1} << 48;
constexpr uint64_t kPrivateAperture = uint64_t{2} << 48;
constexpr uint64_t kApertureBytes = uint64_t{1} << 32;

std::string hex(uint64_t value);

}  // namespace gfx942
