// Turns the machine code of a text segment into instructions, each when it is first executed.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "instruction.h"

namespace gfx942 {

// Parses one line of LLVM's disassembly. Exposed for Code; a text with a modifier that the machine
// does not know gets no handler, so that executing it is a fault.
void parse_instruction(const std::string& text, Instruction* out);

class Code {
 public:
  Code(uint64_t text, uint64_t bytes);
  ~Code();
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;

  uint64_t bytes() const { return bytes_; }
  // Whether the segment still holds what was decoded: another code object may have taken its place.
  bool is_current() const;

  bool contains(uint64_t pc) const {
    return pc >= text_ && pc + 4 <= text_ + bytes_ && pc % 4 == 0;
  }
  // Null if the bytes at pc are no instruction.
  const Instruction* at(uint64_t pc) {
    const Instruction* known = decoded_[(pc - text_) / 4].load(std::memory_order_acquire);
    return known != nullptr ? known : decode(pc);
  }

 private:
  const Instruction* decode(uint64_t pc);

  uint64_t text_;
  uint64_t bytes_;
  std::vector<uint8_t> copy_;
  void* disassembler_;
  std::mutex mutex_;
  std::vector<std::atomic<const Instruction*>> decoded_;
  std::vector<std::unique_ptr<Instruction>> owned_;
};

// Decoded segments are kept as long as their bytes are the same: programs launch few kernels many
// times.
std::shared_ptr<Code> code_of(uint64_t text, uint64_t bytes);

}  // namespace gfx942
