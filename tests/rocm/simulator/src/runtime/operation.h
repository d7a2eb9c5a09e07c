// One piece of work: what streams execute, and what the nodes of graphs hold.
#pragma once

#include <hip/hip_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <variant>
#include <vector>

#include "code_object.h"

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
  const char* name = nullptr;
  hipError_t (*run)(void* data) = nullptr;
  std::shared_ptr<void> data;
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

// Executes on the calling thread. `kernarg` is memory that kernels may read, of the stream's own.
hipError_t execute(const Operation& operation, int device, std::span<std::byte> kernarg);

// Operations that somebody waits for run even on a device that has failed.
bool runs_after_failure(const Operation& operation);

}  // namespace gfx942::runtime
