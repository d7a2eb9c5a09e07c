#include "count.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <sstream>

#include "memory.h"
#include "settings.h"

namespace gfx942::runtime {
namespace {

constexpr std::array<const char*, kNumInstructionKinds> kKinds = {
    "salu", "branch", "smem", "valu", "mfma", "lds", "load", "store", "atomic", "cache"};
constexpr std::array<const char*, kNumHomes> kHomes = {"own", "peer", "host", "arguments"};

// A line is one write to a file that only grows, so that several processes can share it.
void append(const std::string& line) {
  static const int kFile =
      open(settings().count_file.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (write(kFile, line.data(), line.size()) == static_cast<ssize_t>(line.size())) return;
  std::fprintf(stderr, "rocm-sim: ROCM_SIM_COUNT=%s must be a file that can be written\n",
               settings().count_file.c_str());
}

std::ostringstream begin(const char* what, int device) {
  std::ostringstream line;
  line << "{\"what\": \"" << what << "\", \"process\": " << getpid() << ", \"device\": " << device;
  return line;
}

std::string list(const Dim3& size) {
  std::ostringstream text;
  text << "[" << size.x << ", " << size.y << ", " << size.z << "]";
  return text.str();
}

// Kernels' names are identifiers, or demangled ones of compilers: no more than this needs escaping.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

// Whose memory an address is, for work of a device. What HIP does not know is the host's.
const char* home_of(const void* address, int device) {
  const auto block = memory().block(address);
  const int owner = block ? block->allocation.device : kHostMemory;
  return owner == kHostMemory ? "host" : owner == device ? "own" : "peer";
}

}  // namespace

bool counting() { return !settings().count_file.empty(); }

void write_counts(const Launch& launch, const Counts& counts) {
  std::ostringstream line = begin("kernel", launch.device);
  line << ", \"name\": " << quoted(launch.kernel.name)
       << ", \"grid\": " << list(launch.num_workgroups)
       << ", \"block\": " << list(launch.workgroup_size) << ", \"instructions\": {";
  for (size_t kind = 0; kind < kKinds.size(); ++kind) {
    line << (kind == 0 ? "" : ", ") << quoted(kKinds[kind]) << ": " << counts.instructions[kind];
  }
  line << "}";
  for (size_t home = 0; home < kHomes.size(); ++home) {
    const Traffic& traffic = counts.traffic[home];
    line << ", " << quoted(kHomes[home]) << ": {\"read\": " << traffic.read
         << ", \"written\": " << traffic.written << ", \"atomic\": " << traffic.atomic
         << ", \"lines_read\": " << traffic.lines_read.size()
         << ", \"lines_written\": " << traffic.lines_written.size() << "}";
  }
  line << "}\n";
  append(line.str());
}

void write_counts(const CopyOperation& copy, int device) {
  std::ostringstream line = begin("copy", device);
  line << ", \"bytes\": " << copy.bytes << ", \"from\": \"" << home_of(copy.from, device)
       << "\", \"to\": \"" << home_of(copy.to, device) << "\"}\n";
  append(line.str());
}

void write_counts(const FillOperation& fill, int device) {
  std::ostringstream line = begin("fill", device);
  line << ", \"bytes\": " << fill.height * fill.width * fill.element_bytes << ", \"to\": \""
       << home_of(fill.to, device) << "\"}\n";
  append(line.str());
}

}  // namespace gfx942::runtime
