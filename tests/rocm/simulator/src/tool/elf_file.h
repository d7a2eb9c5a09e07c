// A gfx942 code object in memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace gfx942 {

class ElfFile {
 public:
  struct KernelSymbol {
    uint64_t descriptor;
    uint32_t static_lds;
    uint32_t scratch;
    uint32_t kernarg_bytes;
  };

  // Places the segments and relocates them; throws std::runtime_error with what is wrong.
  explicit ElfFile(std::vector<std::byte> file);

  KernelSymbol kernel(const std::string& name) const;
  const std::byte* image() const { return base_; }
  size_t image_bytes() const { return bytes_; }
  uint64_t text() const { return text_; }
  uint64_t text_bytes() const { return text_bytes_; }

 private:
  template <class T>
  const T* at(uint64_t offset, uint64_t count = 1) const;
  void place_segments();
  void relocate();

  std::vector<std::byte> file_;
  std::vector<std::byte> image_;
  std::byte* base_ = nullptr;
  size_t bytes_ = 0;
  uint64_t text_ = 0;
  uint64_t text_bytes_ = 0;
};

}  // namespace gfx942
