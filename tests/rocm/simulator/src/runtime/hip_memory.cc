// Allocation, registration, pointers and what other processes may open.
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "api.h"
#include "graph.h"
#include "memory.h"
#include "settings.h"

using namespace gfx942::runtime;  // NOLINT: the entry points belong to no namespace.
using gfx942::Allocation;
using gfx942::MemoryKind;

namespace {

hipError_t allocate(void** out, size_t bytes, Owner owner, MemoryKind kind, const char* call) {
  if (out == nullptr) return remember(hipErrorInvalidValue);
  *out = nullptr;
  if (const hipError_t error = check_unsafe_call(); error != hipSuccess) return remember(error);
  if (bytes == 0) return hipSuccess;
  *out = memory().allocate(bytes, owner, current_ordinal(), kind, call);
  return remember(*out == nullptr ? hipErrorOutOfMemory : hipSuccess);
}

hipMemoryType type_of(const Block& block) {
  return block.owner == Owner::kHost || block.owner == Owner::kRegistered ? hipMemoryTypeHost
                                                                          : hipMemoryTypeDevice;
}

// Memory is freed only once the work that may use it has ended, as on the real device.
hipError_t free_memory(void* address, Owner first, Owner second) {
  if (address == nullptr) return hipSuccess;
  if (const hipError_t error = check_unsafe_call(); error != hipSuccess) return remember(error);
  const auto block = memory().block(address);
  if (!block || reinterpret_cast<uint64_t>(address) != block->allocation.first) {
    return remember(hipErrorInvalidValue);
  }
  if (Device* owner = device(block->device)) owner->wait();
  return remember(memory().release(address, first) || memory().release(address, second)
                      ? hipSuccess
                      : hipErrorInvalidValue);
}

}  // namespace

extern "C" {

hipError_t hipMalloc(void** address, size_t bytes) {
  return allocate(address, bytes, Owner::kDevice, MemoryKind::kOrdinary, "hipMalloc");
}

hipError_t hipExtMallocWithFlags(void** address, size_t bytes, unsigned int flags) {
  switch (flags) {
    case hipDeviceMallocDefault:
      return hipMalloc(address, bytes);
    case hipDeviceMallocFinegrained:
      return allocate(address, bytes, Owner::kDevice, MemoryKind::kFineGrained,
                      "hipExtMallocWithFlags (fine-grained)");
    case hipDeviceMallocUncached:
      return allocate(address, bytes, Owner::kDevice,
                      settings().cache_uncached ? MemoryKind::kOrdinary : MemoryKind::kUncached,
                      "hipExtMallocWithFlags (uncached)");
    default:
      return not_simulated(__func__, "signal or contiguous memory");
  }
}

hipError_t hipMallocManaged(void** address, size_t bytes, unsigned int) {
  return allocate(address, bytes, Owner::kHost, MemoryKind::kFineGrained, "hipMallocManaged");
}

hipError_t hipHostMalloc(void** address, size_t bytes, unsigned int) {
  return allocate(address, bytes, Owner::kHost, MemoryKind::kFineGrained, "hipHostMalloc");
}

hipError_t hipFree(void* address) { return free_memory(address, Owner::kDevice, Owner::kHost); }
hipError_t hipHostFree(void* address) { return free_memory(address, Owner::kHost, Owner::kHost); }

hipError_t hipHostRegister(void* address, size_t bytes, unsigned int) {
  if (address == nullptr || bytes == 0) return remember(hipErrorInvalidValue);
  const Allocation allocation{reinterpret_cast<uint64_t>(address), bytes, MemoryKind::kFineGrained,
                              true, "hipHostRegister " + std::to_string(bytes) + " bytes"};
  return remember(memory().enter(allocation, Owner::kRegistered, current_ordinal())
                      ? hipSuccess
                      : hipErrorHostMemoryAlreadyRegistered);
}

hipError_t hipHostUnregister(void* address) {
  return remember(memory().remove(address, Owner::kRegistered) ? hipSuccess
                                                               : hipErrorHostMemoryNotRegistered);
}

hipError_t hipHostGetDevicePointer(void** out, void* address, unsigned int) {
  const auto block = memory().block(address);
  if (!block || type_of(*block) != hipMemoryTypeHost) return remember(hipErrorInvalidValue);
  *out = address;
  return hipSuccess;
}

hipError_t hipMemGetAddressRange(hipDeviceptr_t* first, size_t* bytes, hipDeviceptr_t address) {
  const auto block = memory().block(address);
  if (!block) return remember(hipErrorNotFound);
  if (first != nullptr) *first = reinterpret_cast<void*>(block->allocation.first);
  if (bytes != nullptr) *bytes = block->allocation.bytes;
  return hipSuccess;
}

hipError_t hipPointerGetAttributes(hipPointerAttribute_t* out, const void* address) {
  std::memset(out, 0, sizeof(*out));
  const auto block = memory().block(address);
  if (!block) {
    out->type = hipMemoryTypeUnregistered;
    out->device = hipInvalidDeviceId;
    return hipSuccess;
  }
  out->type = type_of(*block);
  out->device = block->device;
  out->devicePointer = const_cast<void*>(address);
  if (out->type == hipMemoryTypeHost) out->hostPointer = const_cast<void*>(address);
  return hipSuccess;
}

hipError_t hipPointerGetAttribute(void* out, hipPointer_attribute which, hipDeviceptr_t address) {
  const auto block = memory().block(address);
  if (!block) return remember(hipErrorInvalidValue);
  switch (which) {
    case HIP_POINTER_ATTRIBUTE_MEMORY_TYPE: {
      const auto type = static_cast<uint32_t>(type_of(*block));
      std::memcpy(out, &type, sizeof(type));
      return hipSuccess;
    }
    case HIP_POINTER_ATTRIBUTE_DEVICE_POINTER:
      std::memcpy(out, &address, sizeof(address));
      return hipSuccess;
    case HIP_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      std::memcpy(out, &block->device, sizeof(block->device));
      return hipSuccess;
    case HIP_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      std::memcpy(out, &block->allocation.first, sizeof(uint64_t));
      return hipSuccess;
    case HIP_POINTER_ATTRIBUTE_RANGE_SIZE:
      std::memcpy(out, &block->allocation.bytes, sizeof(uint64_t));
      return hipSuccess;
    default:
      std::fprintf(stderr, "rocm-sim: hipPointerGetAttribute: the attribute %d is not simulated\n",
                   static_cast<int>(which));
      return remember(hipErrorInvalidValue);
  }
}

hipError_t hipIpcGetMemHandle(hipIpcMemHandle_t* out, void* address) {
  const auto handle = memory().share(address);
  if (!handle) return remember(hipErrorInvalidValue);
  static_assert(sizeof(*handle) <= sizeof(out->reserved));
  std::memset(out, 0, sizeof(*out));
  std::memcpy(out->reserved, &*handle, sizeof(*handle));
  return hipSuccess;
}

hipError_t hipIpcOpenMemHandle(void** address, hipIpcMemHandle_t handle, unsigned int) {
  IpcHandle ipc;
  std::memcpy(&ipc, handle.reserved, sizeof(ipc));
  // The real runtime refuses a process its own memory too.
  if (ipc.pid == getpid()) return remember(hipErrorInvalidContext);
  *address = memory().open(ipc);
  return remember(*address == nullptr ? hipErrorInvalidValue : hipSuccess);
}

hipError_t hipIpcCloseMemHandle(void* address) {
  return remember(memory().close(address) ? hipSuccess : hipErrorInvalidValue);
}

}  // extern "C"
