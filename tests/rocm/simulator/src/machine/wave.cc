#include "wave.h"

#include <cstdio>

namespace gfx942 {
namespace {

uint64_t computed(const Wave& wave, uint16_t index) {
  switch (index) {
    case kSharedBase:
      return kSharedAperture;
    case kSharedLimit:
      return kSharedAperture + kApertureBytes - 1;
    case kPrivateBase:
      return kPrivateAperture;
    case kPrivateLimit:
      return kPrivateAperture + kApertureBytes - 1;
    case kVccIsZero:
      return wave.vcc() == 0;
    case kExecIsZero:
      return wave.exec() == 0;
    case kScc:
      return wave.scc;
  }
  throw FaultError(FaultCode::kIllegalInstruction, "reads an unknown scalar register");
}

}  // namespace

std::string hex(uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

void Wave::throw_no_register(char bank, uint32_t index) {
  throw FaultError(FaultCode::kIllegalInstruction, std::string("names register ") + bank +
                                                       std::to_string(index) +
                                                       ", which the kernel has not asked for");
}

uint32_t Wave::read_scalar(const Operand& operand) const {
  if (operand.bank == Bank::kConstant) return operand.word;
  if (operand.bank == Bank::kOff) return 0;
  if (operand.index < kFirstComputed) return s[operand.index];
  return static_cast<uint32_t>(computed(*this, operand.index));
}

uint64_t Wave::read_scalar_pair(const Operand& operand) const {
  if (operand.bank == Bank::kConstant) return operand.quad;
  if (operand.bank == Bank::kOff) return 0;
  if (operand.index < kFirstComputed) return pair(operand.index);
  return computed(*this, operand.index);
}

}  // namespace gfx942
