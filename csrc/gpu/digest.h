// A digest of everything that must be alike on all ranks of a step; only its equality means
// anything. Its lowest bit is left to what ranks compare by itself, to say what they differ in.
#pragma once

#include <cstdint>
#include <string_view>

namespace moriep::gpu {

class Digest {
 public:
  void take(uint64_t value) {
    value_ = (value_ ^ value) * 0x100000001b3;
    value_ ^= value_ >> 29;
  }
  void take(std::string_view text) {
    for (const char letter : text) take(uint64_t{static_cast<unsigned char>(letter)});
  }
  uint64_t value() const { return value_ & ~uint64_t{1}; }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

}  // namespace moriep::gpu
