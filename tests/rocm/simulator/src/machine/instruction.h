// A decoded instruction: what LLVM's disassembler says about it, in a form that executes quickly.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "../counts.h"

namespace gfx942 {

struct Wave;
struct Instruction;

// Executes an instruction for all lanes of a wave. The program counter already stands behind it.
using Handler = void (*)(Wave&, const Instruction&);

enum class Bank : uint8_t { kNone, kScalar, kVector, kConstant, kOff };

// Numbers of scalar registers as instructions encode them. From kFirstComputed on they are computed
// when read.
enum ScalarIndex : uint16_t {
  kFlatScratch = 102,
  kXnackMask = 104,
  kVcc = 106,
  kTrapTemporary = 108,
  kM0 = 124,
  kExec = 126,
  kFirstComputed = 128,
  kSharedBase = 235,
  kSharedLimit = 236,
  kPrivateBase = 237,
  kPrivateLimit = 238,
  kVccIsZero = 251,
  kExecIsZero = 252,
  kScc = 253,
};

// Accumulation registers follow the ordinary vector registers in Operand::index.
constexpr uint16_t kFirstAccumulator = 256;

enum class Select : uint8_t { kByte0, kByte1, kByte2, kByte3, kWord0, kWord1, kDword };
enum class Unused : uint8_t { kPad, kSext, kPreserve };

struct Operand {
  Bank bank = Bank::kNone;
  bool negate = false;
  bool absolute = false;
  bool sign_extend = false;
  bool literal = false;
  bool moved = false;  // read through Instruction::lane_move
  Select select = Select::kDword;
  uint8_t dwords = 1;
  uint16_t index = 0;
  // A constant as an operand of 16, 32 and 64 bits: inline floats differ by more than their width.
  uint16_t half = 0;
  uint32_t word = 0;
  uint64_t quad = 0;

  bool is_vector() const { return bank == Bank::kVector; }
  bool is_plain() const {
    return !negate && !absolute && !sign_extend && !moved && select == Select::kDword;
  }
};

// Which lane each lane reads with DPP; kNoLane where the control leaves the row or the wave.
constexpr uint8_t kNoLane = 0xff;
struct LaneMove {
  std::array<uint8_t, 64> from;
  uint64_t enabled = ~uint64_t{0};  // by row_mask and bank_mask
  bool zero_fill = false;           // bound_ctrl
};

struct Instruction {
  Handler handler = nullptr;
  uint64_t pc = 0;
  uint8_t bytes = 4;
  uint8_t num_operands = 0;
  bool is_vector = false;  // not executed by the scalar unit
  InstructionKind kind = InstructionKind::kScalar;
  std::array<Operand, 7> operand;
  std::array<uint32_t, 4> raw{};  // the encoding, for what the text states in names

  int32_t offset = 0;
  uint8_t offset0 = 0, offset1 = 0;
  uint8_t op_sel = 0, op_sel_hi = 0xff, neg_lo = 0, neg_hi = 0;
  uint8_t cbsz = 0, abid = 0, blgp = 0;
  float multiplier = 1;  // output modifier
  bool clamp = false;
  bool sc0 = false, sc1 = false, nt = false;
  bool offen = false, idxen = false, lds = false;
  bool sdwa = false;
  Select destination_select = Select::kDword;
  Unused destination_unused = Unused::kPad;
  std::shared_ptr<const LaneMove> lane_move;

  std::string mnemonic;  // without the suffix that names an encoding
  std::string text;

  int16_t simm16() const { return static_cast<int16_t>(raw[0] & 0xffff); }
};

}  // namespace gfx942
