// Launches many kernels of one code object, one after the other, each whatever became of the one
// before:
//   gfx942_batch [--adversarial] [--check-barriers] [--check-races] [--check-uninitialised]
//   [--deadline SECONDS]
//   [--seed N] CODE_OBJECT BATCH gfx942_batch --list-instructions
// A line of BATCH is `KERNEL grid=X,Y,Z block=X,Y,Z lds=BYTES ARGUMENT...`; the grid counts
// workgroups, and an argument is `buf:FILE`, a buffer that holds the file and is written back to
// it, or `u32:N` or `u64:N`. Each line is answered by `KERNEL ok` or `KERNEL fault TEXT`.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"
#include "machine/semantics.h"
#include "tool/elf_file.h"

namespace {

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A buffer whose last byte is the last before a page that nothing may touch: an access that the
// machine fails to refuse ends this process instead of passing unseen.
class Buffer {
 public:
  explicit Buffer(std::string path) : path_(std::move(path)) {
    const std::vector<char> bytes = read_file(path_);
    bytes_ = bytes.size();
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t usable = (bytes_ + page - 1) / page * page;
    mapped_ = usable + 2 * page;
    void* base = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::runtime_error("cannot map " + path_);
    base_ = static_cast<char*>(base);
    if (usable != 0 && mprotect(base_ + page, usable, PROT_READ | PROT_WRITE) != 0) {
      throw std::runtime_error("cannot map " + path_);
    }
    data_ = base_ + page + usable - bytes_;
    std::memcpy(data_, bytes.data(), bytes_);
  }
  ~Buffer() { munmap(base_, mapped_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void write_back() const {
    std::ofstream file(path_, std::ios::binary);
    file.write(data_, static_cast<std::streamsize>(bytes_));
    if (!file) throw std::runtime_error("cannot write " + path_);
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  std::string path_;
  size_t bytes_ = 0, mapped_ = 0;
  char* base_ = nullptr;
  char* data_ = nullptr;
};

class Table : public gfx942::AddressSpace {
 public:
  void add(uint64_t first, size_t bytes, std::string what, bool writable) {
    allocations_.push_back(
        {first, bytes, gfx942::MemoryKind::kOrdinary, writable, std::move(what)});
  }
  std::optional<gfx942::Allocation> find(uint64_t address) const override {
    for (const gfx942::Allocation& a : allocations_) {
      if (address >= a.first && address - a.first < a.bytes) return a;
    }
    return std::nullopt;
  }
  // Tables follow each other at the same addresses; the machine must not mix them up.
  uint64_t generation() const override { return generation_; }

 private:
  static inline uint64_t tables_ = 0;
  uint64_t generation_ = ++tables_;
  std::vector<gfx942::Allocation> allocations_;
};

gfx942::Dim3 parse_dim3(const std::string& text) {
  gfx942::Dim3 dim;
  if (std::sscanf(text.c_str(), "%u,%u,%u", &dim.x, &dim.y, &dim.z) != 3) {
    throw std::runtime_error("'" + text + "' must be X,Y,Z");
  }
  return dim;
}

template <class T>
void append(std::vector<char>* packed, T value) {
  const size_t at = (packed->size() + sizeof(T) - 1) / sizeof(T) * sizeof(T);
  packed->resize(at + sizeof(T));
  std::memcpy(packed->data() + at, &value, sizeof(T));
}

void run_line(const std::string& line, const gfx942::ElfFile& elf, const gfx942::Options& options) {
  std::istringstream words(line);
  std::string name, word;
  words >> name;
  gfx942::Launch launch;
  const gfx942::ElfFile::KernelSymbol kernel = elf.kernel(name);
  launch.kernel = {name, kernel.descriptor, elf.text(), elf.text_bytes()};
  launch.lds_bytes = kernel.static_lds;
  launch.scratch_bytes = kernel.scratch;
  std::vector<char> packed;
  std::vector<std::unique_ptr<Buffer>> buffers;
  while (words >> word) {
    const size_t split = word.find_first_of("=:");
    const std::string key = word.substr(0, split);
    const std::string value = word.substr(split + 1);
    if (key == "grid") {
      launch.num_workgroups = parse_dim3(value);
    } else if (key == "block") {
      launch.workgroup_size = parse_dim3(value);
    } else if (key == "lds") {
      launch.lds_bytes += static_cast<uint32_t>(std::stoul(value));
    } else if (key == "buf") {
      buffers.push_back(std::make_unique<Buffer>(value));
      append(&packed, buffers.back()->address());
    } else if (key == "u32") {
      append(&packed, static_cast<uint32_t>(std::stoull(value)));
    } else if (key == "u64") {
      append(&packed, static_cast<uint64_t>(std::stoull(value)));
    } else {
      throw std::runtime_error("unknown word " + word);
    }
  }
  packed.resize(std::max<size_t>(packed.size(), kernel.kernarg_bytes));
  launch.kernarg = reinterpret_cast<uint64_t>(packed.data());
  launch.kernarg_bytes = static_cast<uint32_t>(packed.size());

  Table table;
  table.add(launch.kernarg, packed.size(), "the kernel arguments", false);
  table.add(reinterpret_cast<uint64_t>(elf.image()), elf.image_bytes(), "the code object", true);
  for (size_t k = 0; k < buffers.size(); ++k) {
    table.add(buffers[k]->address(), buffers[k]->bytes(), "buffer " + std::to_string(k), true);
  }
  const auto fault = gfx942::run(launch, table, options);
  for (const auto& buffer : buffers) buffer->write_back();
  if (!fault) {
    std::cout << name << " ok" << std::endl;
    return;
  }
  std::string text;
  for (const char c : fault->text) text += c == '\n' ? std::string("\\n") : std::string(1, c);
  std::cout << name << " fault " << text << std::endl;
}

void list_instructions() {
  std::set<std::string_view> names;
  for (const auto table :
       {gfx942::scalar_table, gfx942::scalar_memory_table, gfx942::control_table,
        gfx942::integer_table, gfx942::float_table, gfx942::half_table, gfx942::compare_table,
        gfx942::packed_table, gfx942::lane_table, gfx942::conversion_table, gfx942::matrix_table,
        gfx942::lds_table, gfx942::memory_table, gfx942::atomic_table}) {
    for (const gfx942::Semantics& entry : table()) names.insert(entry.mnemonic);
  }
  for (const std::string_view name : names) std::cout << name << '\n';
}

void run(int argc, char** argv) {
  gfx942::Options options;
  std::vector<std::string> files;
  for (int k = 1; k < argc; ++k) {
    const std::string name = argv[k];
    if (name == "--list-instructions") {
      list_instructions();
      return;
    }
    if (name == "--adversarial") {
      options.adversarial_memory = true;
    } else if (name == "--check-barriers") {
      options.check_barriers = true;
    } else if (name == "--check-races") {
      options.check_races = true;
    } else if (name == "--check-uninitialised") {
      options.check_uninitialised = true;
    } else if (name == "--deadline" && k + 1 < argc) {
      options.deadline_seconds = std::stod(argv[++k]);
    } else if (name == "--seed" && k + 1 < argc) {
      options.seed = std::stoull(argv[++k]);
    } else {
      files.push_back(name);
    }
  }
  if (files.size() != 2)
    throw std::runtime_error("usage: gfx942_batch [options] CODE_OBJECT BATCH");
  const std::vector<char> file = read_file(files[0]);
  std::vector<std::byte> bytes(file.size());
  std::memcpy(bytes.data(), file.data(), file.size());
  const gfx942::ElfFile elf(std::move(bytes));
  std::ifstream batch(files[1]);
  for (std::string line; std::getline(batch, line);) run_line(line, elf, options);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gfx942_batch: %s\n", error.what());
    return 2;
  }
}
