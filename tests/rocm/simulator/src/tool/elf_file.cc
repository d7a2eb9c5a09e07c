#include "elf_file.h"

#include <elf.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace gfx942 {
namespace {

constexpr size_t kPage = 4096;
// Relocation types of the AMDGPU ABI.
constexpr uint32_t kAbsolute64 = 3;
constexpr uint32_t kRelative64 = 13;

}  // namespace

template <class T>
const T* ElfFile::at(uint64_t offset, uint64_t count) const {
  if (offset > file_.size() || count > (file_.size() - offset) / sizeof(T)) {
    throw std::runtime_error("the code object is cut short");
  }
  return reinterpret_cast<const T*>(file_.data() + offset);
}

ElfFile::ElfFile(std::vector<std::byte> file) : file_(std::move(file)) {
  const auto* header = at<Elf64_Ehdr>(0);
  if (std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) {
    throw std::runtime_error("the code object is no ELF file");
  }
  place_segments();
  relocate();
}

void ElfFile::place_segments() {
  const auto* header = at<Elf64_Ehdr>(0);
  const auto* segments = at<Elf64_Phdr>(header->e_phoff, header->e_phnum);
  for (int k = 0; k < header->e_phnum; ++k) {
    if (segments[k].p_type != PT_LOAD) continue;
    bytes_ = std::max<size_t>(bytes_, segments[k].p_vaddr + segments[k].p_memsz);
  }
  image_.resize(bytes_ + kPage);
  const auto start = reinterpret_cast<uint64_t>(image_.data());
  base_ = image_.data() + (kPage - start % kPage) % kPage;
  for (int k = 0; k < header->e_phnum; ++k) {
    const Elf64_Phdr& segment = segments[k];
    if (segment.p_type != PT_LOAD) continue;
    std::memcpy(base_ + segment.p_vaddr, at<std::byte>(segment.p_offset, segment.p_filesz),
                segment.p_filesz);
    if ((segment.p_flags & PF_X) != 0) {
      text_ = reinterpret_cast<uint64_t>(base_) + segment.p_vaddr;
      text_bytes_ = segment.p_memsz;
    }
  }
}

void ElfFile::relocate() {
  const auto* header = at<Elf64_Ehdr>(0);
  const auto* sections = at<Elf64_Shdr>(header->e_shoff, header->e_shnum);
  for (int k = 0; k < header->e_shnum; ++k) {
    if (sections[k].sh_type != SHT_RELA) continue;
    const uint64_t count = sections[k].sh_size / sizeof(Elf64_Rela);
    const auto* entries = at<Elf64_Rela>(sections[k].sh_offset, count);
    const Elf64_Shdr& symbol_section = sections[sections[k].sh_link];
    for (uint64_t n = 0; n < count; ++n) {
      uint64_t value =
          reinterpret_cast<uint64_t>(base_) + static_cast<uint64_t>(entries[n].r_addend);
      const uint32_t type = ELF64_R_TYPE(entries[n].r_info);
      if (type == kAbsolute64) {
        const uint64_t symbol = ELF64_R_SYM(entries[n].r_info);
        value += at<Elf64_Sym>(symbol_section.sh_offset + symbol * sizeof(Elf64_Sym))->st_value;
      } else if (type != kRelative64) {
        throw std::runtime_error("the code object has a relocation of type " +
                                 std::to_string(type));
      }
      std::memcpy(base_ + entries[n].r_offset, &value, sizeof(value));
    }
  }
}

ElfFile::KernelSymbol ElfFile::kernel(const std::string& name) const {
  const auto* header = at<Elf64_Ehdr>(0);
  const auto* sections = at<Elf64_Shdr>(header->e_shoff, header->e_shnum);
  for (int k = 0; k < header->e_shnum; ++k) {
    if (sections[k].sh_type != SHT_DYNSYM && sections[k].sh_type != SHT_SYMTAB) continue;
    const uint64_t count = sections[k].sh_size / sizeof(Elf64_Sym);
    const auto* symbols = at<Elf64_Sym>(sections[k].sh_offset, count);
    const Elf64_Shdr& names = sections[sections[k].sh_link];
    for (uint64_t n = 0; n < count; ++n) {
      if (name + ".kd" != at<char>(names.sh_offset + symbols[n].st_name)) continue;
      const std::byte* descriptor = base_ + symbols[n].st_value;
      KernelSymbol found{reinterpret_cast<uint64_t>(descriptor), 0, 0, 0};
      std::memcpy(&found.static_lds, descriptor, 4);
      std::memcpy(&found.scratch, descriptor + 4, 4);
      std::memcpy(&found.kernarg_bytes, descriptor + 8, 4);
      return found;
    }
  }
  throw std::runtime_error("the code object has no kernel " + name);
}

}  // namespace gfx942
