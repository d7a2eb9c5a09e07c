#include "code_object.h"

#include <elf.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "msgpack.h"

namespace gfx942::runtime {
namespace {

constexpr uint16_t kMachineAmdGpu = 224;
constexpr uint32_t kMachMask = 0xff;
constexpr uint32_t kMachGfx942 = 0x4c;
constexpr uint32_t kMachGfx9_4Generic = 0x5f;
constexpr uint32_t kNoteMetadata = 32;
constexpr uint64_t kPage = 4096;
constexpr uint64_t kDescriptorBytes = 64;

enum Relocation : uint32_t { kAbs32Lo = 1, kAbs32Hi = 2, kAbs64 = 3, kAbs32 = 6, kRelative64 = 13 };

uint64_t page_down(uint64_t address) { return address & ~(kPage - 1); }
uint64_t page_up(uint64_t address) { return page_down(address + kPage - 1); }

}  // namespace

class CodeObject::Loader {
 public:
  Loader(std::span<const std::byte> elf, CodeObject* out, std::string* why)
      : elf_(elf), out_(*out), why_(*why) {}

  bool load() {
    return read_header() && map_segments() && read_symbols() && relocate() && read_kernels() &&
           protect();
  }

 private:
  bool fail(const std::string& why) {
    why_ = why;
    return false;
  }

  // A table of T at an offset of the file, or nothing when the file is too short for it.
  template <typename T>
  std::span<const T> table(uint64_t offset, uint64_t count) const {
    if (offset > elf_.size() || count > (elf_.size() - offset) / sizeof(T)) return {};
    return {reinterpret_cast<const T*>(elf_.data() + offset), count};
  }

  bool read_header() {
    const auto header = table<Elf64_Ehdr>(0, 1);
    if (header.empty() || std::memcmp(header[0].e_ident, ELFMAG, SELFMAG) != 0) {
      return fail("it is not an ELF file");
    }
    header_ = header[0];
    const uint32_t mach = header_.e_flags & kMachMask;
    if (header_.e_machine != kMachineAmdGpu ||
        (mach != kMachGfx942 && mach != kMachGfx9_4Generic)) {
      return fail("it is not for gfx942: machine " + std::to_string(header_.e_machine) +
                  ", flags " + std::to_string(header_.e_flags));
    }
    programs_ = table<Elf64_Phdr>(header_.e_phoff, header_.e_phnum);
    sections_ = table<Elf64_Shdr>(header_.e_shoff, header_.e_shnum);
    if (programs_.empty() || sections_.empty()) return fail("its headers are cut off");
    return true;
  }

  bool map_segments() {
    uint64_t end = 0;
    for (const auto& program : programs_) {
      if (program.p_type != PT_LOAD) continue;
      if (table<std::byte>(program.p_offset, program.p_filesz).size() != program.p_filesz ||
          program.p_filesz > program.p_memsz) {
        return fail("a segment is cut off");
      }
      end = std::max(end, program.p_vaddr + program.p_memsz);
    }
    if (end == 0 || end > uint64_t{1} << 32) return fail("its segments have no sensible size");
    void* memory = mmap(nullptr, page_up(end), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return fail("there is no memory for it");
    out_.memory_ = memory;
    out_.memory_bytes_ = page_up(end);
    base_ = reinterpret_cast<uint64_t>(memory);
    for (const auto& program : programs_) {
      if (program.p_type != PT_LOAD) continue;
      std::memcpy(at(program.p_vaddr), elf_.data() + program.p_offset, program.p_filesz);
      out_.segments_.push_back({base_ + program.p_vaddr, program.p_memsz,
                                (program.p_flags & PF_W) != 0, (program.p_flags & PF_X) != 0});
    }
    return true;
  }

  void* at(uint64_t address) const { return reinterpret_cast<void*>(base_ + address); }
  bool inside(uint64_t address, uint64_t bytes) const {
    return address <= out_.memory_bytes_ && bytes <= out_.memory_bytes_ - address;
  }

  bool read_symbols() {
    for (const auto& section : sections_) {
      if (section.sh_type != SHT_DYNSYM || section.sh_link >= sections_.size()) continue;
      const auto& strings = sections_[section.sh_link];
      strings_ = table<char>(strings.sh_offset, strings.sh_size);
      symbols_ = table<Elf64_Sym>(section.sh_offset, section.sh_size / sizeof(Elf64_Sym));
    }
    if (symbols_.empty() || strings_.empty() || strings_.back() != '\0') {
      return fail("it has no dynamic symbols");
    }
    for (const auto& symbol : symbols_) {
      if (symbol.st_name >= strings_.size()) return fail("a symbol's name is cut off");
      if (symbol.st_shndx == SHN_UNDEF || ELF64_ST_TYPE(symbol.st_info) != STT_OBJECT) continue;
      if (!inside(symbol.st_value, symbol.st_size)) return fail("a symbol is out of bounds");
      out_.variables_[name(symbol)] = {base_ + symbol.st_value, symbol.st_size};
    }
    return true;
  }

  std::string name(const Elf64_Sym& symbol) const { return &strings_[symbol.st_name]; }

  bool relocate() {
    for (const auto& section : sections_) {
      if (section.sh_type != SHT_RELA || (section.sh_flags & SHF_ALLOC) == 0) continue;
      for (const auto& entry :
           table<Elf64_Rela>(section.sh_offset, section.sh_size / sizeof(Elf64_Rela))) {
        if (!relocate(entry)) return false;
      }
    }
    return true;
  }

  bool relocate(const Elf64_Rela& entry) {
    const auto type = static_cast<uint32_t>(ELF64_R_TYPE(entry.r_info));
    const bool wide = type == kAbs64 || type == kRelative64;
    if (!inside(entry.r_offset, wide ? 8 : 4)) return fail("a relocation is out of bounds");
    uint64_t value = base_ + static_cast<uint64_t>(entry.r_addend);
    if (type != kRelative64) {
      const auto index = ELF64_R_SYM(entry.r_info);
      if (index >= symbols_.size()) return fail("a relocation names no symbol");
      if (symbols_[index].st_shndx == SHN_UNDEF) {
        return fail("it needs the symbol " + name(symbols_[index]) + ", which nobody defines");
      }
      value += symbols_[index].st_value;
    }
    if (type == kAbs32Hi) value >>= 32;
    if (wide) {
      std::memcpy(at(entry.r_offset), &value, 8);
    } else if (type == kAbs32Lo || type == kAbs32Hi || type == kAbs32) {
      std::memcpy(at(entry.r_offset), &value, 4);
    } else {
      return fail("it has a relocation of the unknown type " + std::to_string(type));
    }
    return true;
  }

  MsgValue metadata() const {
    for (const auto& program : programs_) {
      if (program.p_type != PT_NOTE) continue;
      auto notes = table<std::byte>(program.p_offset, program.p_filesz);
      while (notes.size() >= sizeof(Elf64_Nhdr)) {
        Elf64_Nhdr note;
        std::memcpy(&note, notes.data(), sizeof(note));
        const uint64_t start = sizeof(note) + ((uint64_t{note.n_namesz} + 3) & ~uint64_t{3});
        const uint64_t next = start + ((uint64_t{note.n_descsz} + 3) & ~uint64_t{3});
        if (next > notes.size()) break;
        if (note.n_type == kNoteMetadata) {
          return parse_msgpack(notes.subspan(start, note.n_descsz));
        }
        notes = notes.subspan(next);
      }
    }
    return MsgValue();
  }

  bool read_kernels() {
    const MsgValue notes = metadata();
    for (const auto& entry : notes["amdhsa.kernels"].array()) {
      KernelInfo info;
      info.kernel.name = entry[".name"].text();
      info.lds_bytes = static_cast<uint32_t>(entry[".group_segment_fixed_size"].integer());
      info.scratch_bytes = static_cast<uint32_t>(entry[".private_segment_fixed_size"].integer());
      info.kernarg_bytes = static_cast<uint32_t>(entry[".kernarg_segment_size"].integer());
      info.max_workgroup = static_cast<uint32_t>(entry[".max_flat_workgroup_size"].integer(1024));
      info.vector_registers = static_cast<uint32_t>(entry[".vgpr_count"].integer());
      for (const auto& argument : entry[".args"].array()) {
        info.arguments.push_back({argument[".value_kind"].text(),
                                  static_cast<uint32_t>(argument[".offset"].integer()),
                                  static_cast<uint32_t>(argument[".size"].integer())});
        if (argument[".offset"].integer() + argument[".size"].integer() > info.kernarg_bytes) {
          return fail("an argument of " + info.kernel.name + " is out of bounds");
        }
      }
      const auto descriptor = out_.variables_.find(entry[".symbol"].text());
      if (descriptor == out_.variables_.end() || descriptor->second.bytes < kDescriptorBytes) {
        return fail("the kernel " + info.kernel.name + " has no descriptor");
      }
      info.kernel.descriptor = descriptor->second.address;
      if (!find_text(&info.kernel)) return fail("the code of " + info.kernel.name + " is missing");
      out_.variables_.erase(descriptor);
      out_.kernels_[info.kernel.name] = std::move(info);
    }
    return true;
  }

  bool find_text(Kernel* kernel) const {
    int64_t offset = 0;
    std::memcpy(&offset, reinterpret_cast<const void*>(kernel->descriptor + 16), sizeof(offset));
    const uint64_t entry = kernel->descriptor + static_cast<uint64_t>(offset);
    for (const auto& segment : out_.segments_) {
      if (segment.executable && entry - segment.first < segment.bytes) {
        kernel->text = segment.first;
        kernel->text_bytes = segment.bytes;
        return true;
      }
    }
    return false;
  }

  // What nobody may write, the host may not write by accident either.
  bool protect() {
    std::vector<bool> writable(out_.memory_bytes_ / kPage, false);
    for (const auto& segment : out_.segments_) {
      if (segment.executable) continue;
      const uint64_t last = page_up(segment.first + segment.bytes - base_) / kPage;
      for (uint64_t page = page_down(segment.first - base_) / kPage; page < last; ++page) {
        writable[page] = true;
      }
    }
    for (uint64_t page = 0; page < writable.size(); ++page) {
      if (!writable[page] && mprotect(at(page * kPage), kPage, PROT_READ) != 0) {
        return fail("its memory cannot be protected");
      }
    }
    return true;
  }

  std::span<const std::byte> elf_;
  CodeObject& out_;
  std::string& why_;
  Elf64_Ehdr header_{};
  uint64_t base_ = 0;
  std::span<const Elf64_Phdr> programs_;
  std::span<const Elf64_Shdr> sections_;
  std::span<const Elf64_Sym> symbols_;
  std::span<const char> strings_;
};

std::unique_ptr<CodeObject> CodeObject::load(std::span<const std::byte> elf, std::string* why) {
  std::unique_ptr<CodeObject> object(new CodeObject());
  // The tables are read in place, which their types' alignment allows only in an aligned file.
  std::vector<uint64_t> aligned((elf.size() + 7) / 8);
  std::memcpy(aligned.data(), elf.data(), elf.size());
  const std::span file(reinterpret_cast<const std::byte*>(aligned.data()), elf.size());
  return Loader(file, object.get(), why).load() ? std::move(object) : nullptr;
}

CodeObject::~CodeObject() {
  if (memory_ != nullptr) munmap(memory_, memory_bytes_);
}

size_t elf_bytes(std::span<const std::byte> elf) {
  Elf64_Ehdr header;
  if (elf.size() < sizeof(header)) return 0;
  std::memcpy(&header, elf.data(), sizeof(header));
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return 0;
  return header.e_shoff + size_t{header.e_shentsize} * header.e_shnum;
}

}  // namespace gfx942::runtime
