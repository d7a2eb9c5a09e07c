#include "operation.h"

#include <cstdio>
#include <cstring>

#include "count.h"
#include "graph.h"
#include "memory.h"
#include "settings.h"

namespace gfx942::runtime {
namespace {

hipError_t error_of(FaultCode code) {
  switch (code) {
    case FaultCode::kIllegalAddress:
      return hipErrorIllegalAddress;
    case FaultCode::kDeadline:
      return hipErrorLaunchTimeOut;
    case FaultCode::kInvalidLaunch:
      return hipErrorInvalidConfiguration;
    case FaultCode::kIllegalInstruction:
    case FaultCode::kMisaligned:
    case FaultCode::kBarrier:
      return hipErrorLaunchFailure;
  }
  return hipErrorUnknown;
}

Memory::Range target(const CopyOperation& copy) {
  return {copy.to, copy.bytes, copy.to_host, true};
}
Memory::Range source(const CopyOperation& copy) {
  return {copy.from, copy.bytes, copy.from_host, false};
}

uint64_t extent(const FillOperation& fill) {
  if (fill.width == 0 || fill.height == 0) return 0;
  return (fill.height - 1) * fill.pitch + fill.width * fill.element_bytes;
}

hipError_t run(const EmptyOperation&, int, std::span<std::byte>, Turns*) { return hipSuccess; }

hipError_t run(const KernelOperation& kernel, int device, std::span<std::byte> kernarg, Turns*) {
  if (kernel.kernarg.size() > kernarg.size()) return hipErrorInvalidValue;
  std::memcpy(kernarg.data(), kernel.kernarg.data(), kernel.kernarg.size());
  Launch launch;
  launch.kernel = kernel.info->kernel;
  launch.num_workgroups = kernel.num_workgroups;
  launch.workgroup_size = kernel.workgroup_size;
  launch.lds_bytes = kernel.info->lds_bytes + kernel.dynamic_lds_bytes;
  launch.scratch_bytes = kernel.info->scratch_bytes;
  launch.kernarg = reinterpret_cast<uint64_t>(kernarg.data());
  launch.kernarg_bytes = static_cast<uint32_t>(kernel.kernarg.size());
  launch.device = device;
  if (settings().trace) {
    std::fprintf(stderr, "rocm-sim: device %d runs %s, %ux%ux%u workgroups of %ux%ux%u\n", device,
                 launch.kernel.name.c_str(), launch.num_workgroups.x, launch.num_workgroups.y,
                 launch.num_workgroups.z, launch.workgroup_size.x, launch.workgroup_size.y,
                 launch.workgroup_size.z);
  }
  std::optional<Counts> counts;
  if (counting()) counts.emplace();
  const auto fault = gfx942::run(launch, memory(), settings().machine, counts ? &*counts : nullptr);
  if (counts) write_counts(launch, *counts);
  if (!fault) return hipSuccess;
  std::fprintf(stderr, "rocm-sim: %s\n", fault->text.c_str());
  return error_of(fault->code);
}

hipError_t run(const CopyOperation& copy, int device, std::span<std::byte>, Turns*) {
  if (counting()) write_counts(copy, device);
  const bool done = memory().access({target(copy), source(copy)},
                                    [&] { std::memmove(copy.to, copy.from, copy.bytes); });
  if (done) return hipSuccess;
  std::fprintf(stderr, "rocm-sim: a copy of %llu bytes from %p to %p touches freed memory\n",
               static_cast<unsigned long long>(copy.bytes), copy.from, copy.to);
  return hipErrorIllegalAddress;
}

hipError_t run(const FillOperation& fill, int device, std::span<std::byte>, Turns*) {
  if (counting()) write_counts(fill, device);
  const bool done = memory().access({{fill.to, extent(fill), false, true}}, [&] {
    for (uint64_t row = 0; row < fill.height; ++row) {
      auto* to = static_cast<std::byte*>(fill.to) + row * fill.pitch;
      if (fill.element_bytes == 1) {
        std::memset(to, static_cast<int>(fill.value), fill.width);
        continue;
      }
      for (uint64_t i = 0; i < fill.width; ++i) {
        std::memcpy(to + i * fill.element_bytes, &fill.value, fill.element_bytes);
      }
    }
  });
  if (done) return hipSuccess;
  std::fprintf(stderr, "rocm-sim: a fill of %llu bytes at %p touches freed memory\n",
               static_cast<unsigned long long>(extent(fill)), fill.to);
  return hipErrorIllegalAddress;
}

hipError_t run(const HostOperation& host, int, std::span<std::byte>, Turns*) {
  host.function(host.user_data);
  return hipSuccess;
}

hipError_t run(const ServiceOperation& operation, int device, std::span<std::byte>, Turns* turns) {
  const hipSimService& service = operation.service;
  if (settings().trace) std::fprintf(stderr, "rocm-sim: device %d runs %s\n", device, service.name);
  const Turn turn = std::move(turns->front());
  turns->pop_front();
  return service.run(operation.data.get(), turn.number());
}

hipError_t run(const ChildOperation& child, int device, std::span<std::byte> kernarg,
               Turns* turns) {
  return child.graph->execute(device, kernarg, turns);
}

}  // namespace

hipError_t check(const CopyOperation& copy) {
  return memory().access({target(copy), source(copy)}, [] {}) ? hipSuccess : hipErrorInvalidValue;
}

hipError_t check(const FillOperation& fill) {
  return memory().access({{fill.to, extent(fill), false, true}}, [] {}) ? hipSuccess
                                                                        : hipErrorInvalidValue;
}

void take_turns(const Operation& operation, Turns* turns) {
  if (const auto* service = std::get_if<ServiceOperation>(&operation)) {
    turns->emplace_back(*service);
  } else if (const auto* child = std::get_if<ChildOperation>(&operation)) {
    child->graph->take_turns(turns);
  }
}

hipError_t execute(const Operation& operation, int device, std::span<std::byte> kernarg,
                   Turns* turns) {
  return std::visit([&](const auto& one) { return run(one, device, kernarg, turns); }, operation);
}

bool runs_after_failure(const Operation& operation) {
  return std::holds_alternative<HostOperation>(operation);
}

}  // namespace gfx942::runtime
