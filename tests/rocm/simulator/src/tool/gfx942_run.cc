// Runs one kernel of a code object on the simulated machine:
//   gfx942_run CODE_OBJECT KERNEL --grid X,Y,Z --block X,Y,Z [--lds BYTES] [--scratch BYTES]
//     [--arg buf:FILE[:OUTFILE] | --arg f32:V | f64:V | u8:V | u16:V | u32:V | u64:V ...]
//     [--adversarial] [--check-uninitialised] [--check-barriers] [--deadline SECONDS] [--seed N]
// The grid counts workgroups and --lds adds to the kernel's static LDS. Buffers are written to
// OUTFILE after the run. Exits with 1 and the fault's text if the kernel faults, with 2 if it
// cannot be started.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../launch.h"
#include "elf_file.h"

namespace {

using gfx942::Allocation;

struct Buffer {
  std::vector<std::byte> bytes;
  std::string out;
};

class Table : public gfx942::AddressSpace {
 public:
  void add(const void* data, size_t bytes, std::string what, bool writable = true) {
    allocations_.push_back({reinterpret_cast<uint64_t>(data), bytes, gfx942::MemoryKind::kOrdinary,
                            writable, std::move(what)});
  }
  std::optional<Allocation> find(uint64_t address) const override {
    for (const Allocation& a : allocations_) {
      if (address >= a.first && address - a.first < a.bytes) return a;
    }
    return std::nullopt;
  }
  uint64_t generation() const override { return 1; }

 private:
  std::vector<Allocation> allocations_;
};

std::vector<std::byte> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<std::byte> bytes;
  std::transform(std::istreambuf_iterator<char>(file), {}, std::back_inserter(bytes),
                 [](char c) { return static_cast<std::byte>(c); });
  return bytes;
}

gfx942::Dim3 parse_dim3(const std::string& text) {
  gfx942::Dim3 dim;
  if (std::sscanf(text.c_str(), "%u,%u,%u", &dim.x, &dim.y, &dim.z) < 1) {
    throw std::runtime_error("'" + text + "' must be X,Y,Z");
  }
  return dim;
}

class Arguments {
 public:
  void add(const std::string& text) {
    const size_t colon = text.find(':');
    if (colon == text.npos) throw std::runtime_error("--arg " + text + " must be KIND:VALUE");
    const std::string kind = text.substr(0, colon);
    const std::string value = text.substr(colon + 1);
    if (kind == "buf") {
      add_buffer(value);
    } else if (kind == "f32") {
      append(std::strtof(value.c_str(), nullptr));
    } else if (kind == "f64") {
      append(std::strtod(value.c_str(), nullptr));
    } else if (kind == "u8") {
      append(static_cast<uint8_t>(std::strtoull(value.c_str(), nullptr, 0)));
    } else if (kind == "u16") {
      append(static_cast<uint16_t>(std::strtoull(value.c_str(), nullptr, 0)));
    } else if (kind == "u32") {
      append(static_cast<uint32_t>(std::strtoull(value.c_str(), nullptr, 0)));
    } else if (kind == "u64") {
      append(static_cast<uint64_t>(std::strtoull(value.c_str(), nullptr, 0)));
    } else {
      throw std::runtime_error("--arg " + text + ": unknown kind");
    }
  }

  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<std::byte> packed;

 private:
  void add_buffer(const std::string& value) {
    auto buffer = std::make_unique<Buffer>();
    const size_t colon = value.find(':');
    buffer->bytes = read_file(value.substr(0, colon));
    if (colon != value.npos) buffer->out = value.substr(colon + 1);
    append(reinterpret_cast<uint64_t>(buffer->bytes.data()));
    buffers.push_back(std::move(buffer));
  }

  template <class T>
  void append(T value) {
    const size_t at = (packed.size() + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    packed.resize(at + sizeof(T));
    std::memcpy(packed.data() + at, &value, sizeof(T));
  }
};

int run(int argc, char** argv) {
  if (argc < 3) throw std::runtime_error("usage: gfx942_run CODE_OBJECT KERNEL [options]");
  gfx942::Launch launch;
  gfx942::Options options;
  Arguments arguments;
  uint32_t dynamic_lds = 0;
  uint32_t scratch = 0;
  for (int k = 3; k < argc; ++k) {
    const std::string name = argv[k];
    if (name == "--adversarial") {
      options.adversarial_memory = true;
      continue;
    }
    if (name == "--check-uninitialised") {
      options.check_uninitialised = true;
      continue;
    }
    if (name == "--check-barriers") {
      options.check_barriers = true;
      continue;
    }
    if (name == "--check-races") {
      options.check_races = true;
      continue;
    }
    if (k + 1 == argc) throw std::runtime_error(name + " needs a value");
    const std::string value = argv[++k];
    if (name == "--grid") {
      launch.num_workgroups = parse_dim3(value);
    } else if (name == "--block") {
      launch.workgroup_size = parse_dim3(value);
    } else if (name == "--lds") {
      dynamic_lds = static_cast<uint32_t>(std::stoul(value));
    } else if (name == "--scratch") {
      scratch = static_cast<uint32_t>(std::stoul(value));
    } else if (name == "--arg") {
      arguments.add(value);
    } else if (name == "--deadline") {
      options.deadline_seconds = std::stod(value);
    } else if (name == "--seed") {
      options.seed = std::stoull(value);
    } else {
      throw std::runtime_error("unknown option " + name);
    }
  }

  const gfx942::ElfFile elf(read_file(argv[1]));
  const gfx942::ElfFile::KernelSymbol kernel = elf.kernel(argv[2]);
  launch.kernel = {argv[2], kernel.descriptor, elf.text(), elf.text_bytes()};
  launch.lds_bytes = kernel.static_lds + dynamic_lds;
  launch.scratch_bytes = kernel.scratch + scratch;
  const size_t explicit_bytes = arguments.packed.size();
  arguments.packed.resize(std::max<size_t>(explicit_bytes, kernel.kernarg_bytes));
  launch.kernarg = reinterpret_cast<uint64_t>(arguments.packed.data());
  launch.kernarg_bytes = static_cast<uint32_t>(arguments.packed.size());

  Table table;
  table.add(arguments.packed.data(), arguments.packed.size(), "the kernel arguments", false);
  table.add(elf.image(), elf.image_bytes(), "the code object");
  for (size_t k = 0; k < arguments.buffers.size(); ++k) {
    const Buffer& buffer = *arguments.buffers[k];
    table.add(buffer.bytes.data(), buffer.bytes.size(), "buffer " + std::to_string(k));
  }
  if (const auto fault = gfx942::run(launch, table, options)) {
    std::fprintf(stderr, "%s\n", fault->text.c_str());
    return 1;
  }
  for (const auto& buffer : arguments.buffers) {
    if (buffer->out.empty()) continue;
    std::ofstream file(buffer->out, std::ios::binary);
    file.write(reinterpret_cast<const char*>(buffer->bytes.data()),
               static_cast<std::streamsize>(buffer->bytes.size()));
    if (!file) throw std::runtime_error("cannot write " + buffer->out);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gfx942_run: %s\n", error.what());
    return 2;
  }
}
