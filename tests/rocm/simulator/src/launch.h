// What passes between the HIP runtime (runtime/) and the machine that executes kernels (machine/).
//
// A device pointer is an address of this process: device memory, code objects, kernel arguments and
// registered host memory are mapped where kernels name them, and the runtime's table says what is
// alive.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "counts.h"

namespace gfx942 {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

// A kernel of a loaded code object.
struct Kernel {
  std::string name;
  // The 64-byte AMDHSA kernel descriptor in place: its entry offset is relative to its own address.
  uint64_t descriptor = 0;
  // The executable segment that holds the kernel's code.
  uint64_t text = 0;
  uint64_t text_bytes = 0;
};

struct Launch {
  Kernel kernel;
  Dim3 num_workgroups;
  Dim3 workgroup_size;
  uint32_t lds_bytes = 0;      // static and dynamic
  uint32_t scratch_bytes = 0;  // of one work-item
  uint64_t kernarg = 0;        // explicit and hidden arguments, filled by the runtime
  uint32_t kernarg_bytes = 0;
  int device = 0;
};

// How caches see an allocation; the adversarial memory mode depends on it.
enum class MemoryKind { kOrdinary, kFineGrained, kUncached };

struct Allocation {
  uint64_t first = 0;
  uint64_t bytes = 0;
  MemoryKind kind = MemoryKind::kOrdinary;
  bool writable = true;
  std::string what;  // for error texts, such as "hipMalloc 4096 bytes on device 0"
  // Whose it is: a device of this process, or kHostMemory, or kPeerMemory of another process.
  int device = 0;
};
constexpr int kHostMemory = -1;
constexpr int kPeerMemory = -2;

// What kernels may touch. Called from the machine's threads; `generation` changes with every change
// of the table, so that looked-up allocations can be kept until then.
class AddressSpace {
 public:
  virtual ~AddressSpace() = default;
  virtual std::optional<Allocation> find(uint64_t address) const = 0;
  virtual uint64_t generation() const = 0;
};

struct Options {
  double deadline_seconds = 60;  // of one launch without any wave that ends
  bool adversarial_memory = false;
  bool check_uninitialised = false;  // of LDS
  // That all waves of a workgroup meet, and at the same barrier instruction. The architecture waits
  // for the surviving waves at whatever barriers they are, and hand-written kernels make use of it.
  bool check_barriers = false;
  // That no barrier is missing between waves that use the same bytes of LDS. Waves that wait for
  // each other in LDS without a barrier have none.
  bool check_races = false;
  uint64_t seed = 0;  // of the order in which waves are interleaved
  // Most instructions that a wave executes before the next one has its turn, and 1/16 of it the
  // fewest. 1 keeps waves in step, as those of a workgroup about are on hardware as long as they
  // take the same way.
  uint32_t longest_turn = 1024;
};

enum class FaultCode {
  kIllegalAddress,
  kIllegalInstruction,
  kMisaligned,
  kBarrier,
  kDeadline,
  kInvalidLaunch
};

struct Fault {
  FaultCode code;
  std::string text;  // kernel, pc, instruction, lane, address, allocation: what applies
};

// Runs a kernel to its end; blocks. Several launches may run at the same time on different threads
// and in different processes that share memory, and may wait for each other.
// `counts`, unless it is null, has added to it what the launch did.
std::optional<Fault> run(const Launch& launch, const AddressSpace& memory, const Options& options,
                         Counts* counts = nullptr);

}  // namespace gfx942
