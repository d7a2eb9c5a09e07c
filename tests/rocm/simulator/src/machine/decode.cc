#include "decode.h"

#include <llvm-c/Disassembler.h>
#include <llvm-c/Target.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "semantics.h"

extern "C" {
void LLVMInitializeAMDGPUTargetInfo(void);
void LLVMInitializeAMDGPUTargetMC(void);
void LLVMInitializeAMDGPUDisassembler(void);
}

namespace gfx942 {
namespace {

void initialise_llvm() {
  static std::once_flag once;
  std::call_once(once, [] {
    LLVMInitializeAMDGPUTargetInfo();
    LLVMInitializeAMDGPUTargetMC();
    LLVMInitializeAMDGPUDisassembler();
  });
}

}  // namespace

Code::Code(uint64_t text, uint64_t bytes)
    : text_(text),
      bytes_(bytes),
      copy_(reinterpret_cast<const uint8_t*>(text), reinterpret_cast<const uint8_t*>(text) + bytes),
      decoded_(bytes / 4 + 1) {
  initialise_llvm();
  disassembler_ =
      LLVMCreateDisasmCPUFeatures("amdgcn-amd-amdhsa", "gfx942", "", nullptr, 0, nullptr, nullptr);
}

Code::~Code() {
  if (disassembler_ != nullptr) LLVMDisasmDispose(disassembler_);
}

bool Code::is_current() const {
  return std::memcmp(copy_.data(), reinterpret_cast<const void*>(text_), copy_.size()) == 0;
}

const Instruction* Code::decode(uint64_t pc) {
  const std::lock_guard lock(mutex_);
  std::atomic<const Instruction*>& slot = decoded_[(pc - text_) / 4];
  if (const Instruction* known = slot.load(std::memory_order_acquire)) return known;
  if (disassembler_ == nullptr) return nullptr;
  char text[512];
  uint8_t* bytes = copy_.data() + (pc - text_);
  const size_t length =
      LLVMDisasmInstruction(disassembler_, bytes, text_ + bytes_ - pc, pc, text, sizeof(text));
  if (length == 0) return nullptr;
  auto made = std::make_unique<Instruction>();
  made->pc = pc;
  made->bytes = static_cast<uint8_t>(length);
  std::memcpy(made->raw.data(), bytes, std::min(length, sizeof(made->raw)));
  parse_instruction(text, made.get());
  slot.store(made.get(), std::memory_order_release);
  owned_.push_back(std::move(made));
  return owned_.back().get();
}

std::shared_ptr<Code> code_of(uint64_t text, uint64_t bytes) {
  static std::mutex mutex;
  static std::map<uint64_t, std::shared_ptr<Code>> known;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Code>& code = known[text];
  if (code == nullptr || code->bytes() != bytes || !code->is_current()) {
    code = std::make_shared<Code>(text, bytes);
  }
  return code;
}

}  // namespace gfx942
