// One piece of work: what streams execute, and what the nodes of graphs hold.
#pragma once

#include <hip/hip_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "code_object.h"
#include "service.h"

namespace gfx942::runtime {

class Graph;

struct KernelOperation {
  std::shared_ptr<const CodeObject> code;  // alive until the kernel has ended
  const KernelInfo* info = nullptr;
  Dim3 num_workgroups;
  Dim3 workgroup_size;
  uint32_t dynamic_lds_bytes = 0;
  std::vector<std::byte> kernarg;  // with the hidden arguments
};

struct CopyOperation {
  void* to = nullptr;
  const void* from = nullptr;
  uint64_t bytes = 0;
  bool to_host = false;  // the destination may be memory that HIP does not know
  bool from_host = false;
};

struct FillOperation {
  void* to = nullptr;
  uint32_t value = 0;
  uint32_t element_bytes = 1;
  uint64_t width = 0;  // in elements
  uint64_t height = 1;
  uint64_t pitch = 0;  // in bytes
};

struct HostOperation {
  hipHostFn_t function = nullptr;
  void* user_data = nullptr;
};

// A piece of another library of the simulator (service.h).
struct ServiceOperation {
  hipSimService service = {};
  std::shared_ptr<void> data;  // the service's, released at the end
};

struct EmptyOperation {};

struct ChildOperation {
  std::shared_ptr<const Graph> graph;
};

using Operation = std::variant<EmptyOperation, KernelOperation, CopyOperation, FillOperation,
                               HostOperation, ServiceOperation, ChildOperation>;

// What a copy or fill would be refused for, before it is queued.
hipError_t check(const CopyOperation& copy);
hipError_t check(const FillOperation& fill);

// A service's turn, which it leaves at the end of this.
class Turn {
 public:
  explicit Turn(ServiceOperation of)
      : of_(std::move(of)), number_(of_.service.take_turn(of_.data.get())) {}
  ~Turn() {
    if (of_.data != nullptr) of_.service.leave(of_.data.get(), number_);
  }
  Turn(Turn&&) = default;
  Turn& operator=(Turn&&) = delete;

  uint64_t number() const { return number_; }

 private:
  ServiceOperation of_;
  uint64_t number_;
};

// The turns of all services in an operation, in the order in which it runs them.
using Turns = std::deque<Turn>;
void take_turns(const Operation& operation, Turns* turns);

// Executes on the calling thread, with the operation's turns. `kernarg` is memory that kernels may
// read, of the stream's own.
hipError_t execute(const Operation& operation, int device, std::span<std::byte> kernarg,
                   Turns* turns);

// Operations that somebody waits for run even on a device that has failed.
bool runs_after_failure(const Operation& operation);

}  // namespace gfx942::runtime
