// A gfx942 code object in memory: its segments, kernels and variables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "../launch.h"

namespace gfx942::runtime {

struct KernelArgument {
  std::string kind;  // the metadata's .value_kind, such as by_value or hidden_block_count_x
  uint32_t offset = 0;
  uint32_t bytes = 0;

  bool hidden() const { return kind.starts_with("hidden_"); }
};

struct KernelInfo {
  Kernel kernel;
  uint32_t lds_bytes = 0;      // static
  uint32_t scratch_bytes = 0;  // of one work-item
  uint32_t kernarg_bytes = 0;
  uint32_t max_workgroup = 0;
  uint32_t vector_registers = 0;
  std::vector<KernelArgument> arguments;
};

struct Variable {
  uint64_t address = 0;
  uint64_t bytes = 0;
};

struct Segment {
  uint64_t first = 0;
  uint64_t bytes = 0;
  bool writable = false;
  bool executable = false;
};

class CodeObject {
 public:
  // Maps a code object and applies its relocations. Gives null and says why when it cannot.
  static std::unique_ptr<CodeObject> load(std::span<const std::byte> elf, std::string* why);
  ~CodeObject();
  CodeObject(const CodeObject&) = delete;
  CodeObject& operator=(const CodeObject&) = delete;

  const std::vector<Segment>& segments() const { return segments_; }
  const std::map<std::string, KernelInfo>& kernels() const { return kernels_; }
  const std::map<std::string, Variable>& variables() const { return variables_; }

 private:
  class Loader;
  CodeObject() = default;

  void* memory_ = nullptr;
  size_t memory_bytes_ = 0;
  std::vector<Segment> segments_;
  std::map<std::string, KernelInfo> kernels_;
  std::map<std::string, Variable> variables_;
};

// How many bytes an ELF file takes that is followed by something else, or 0 if this is none.
size_t elf_bytes(std::span<const std::byte> elf);

}  // namespace gfx942::runtime
