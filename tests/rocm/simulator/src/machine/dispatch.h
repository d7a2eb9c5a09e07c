// A launch in progress: what the kernel descriptor asks for, and how waves start.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "decode.h"
#include "memory.h"
#include "wave.h"

namespace gfx942 {

// What the machine reads from an AMDHSA kernel descriptor (LLVM's AMDGPU usage document describes
// it).
struct Descriptor {
  uint32_t num_vectors = 0;
  uint32_t num_accumulators = 0;
  uint32_t mode = kModeDefault;
  bool dx10_clamp = true;
  bool private_segment_buffer = false;
  bool dispatch_pointer = false;
  bool queue_pointer = false;
  bool kernarg_pointer = false;
  bool dispatch_id = false;
  bool private_segment_size = false;
  uint32_t preload_dwords = 0;
  uint32_t preload_offset = 0;  // in dwords of the kernel arguments
  bool workgroup_id[3] = {};
  bool workgroup_info = false;
  uint64_t entry = 0;

  explicit Descriptor(uint64_t address);
};

struct Dispatch {
  Dispatch(const Launch& what, const AddressSpace& space, const Options& how, Counts* counted);

  const Launch& launch;
  const Options& options;
  Counts* const counts;  // null unless somebody counts
  Descriptor descriptor;
  Memory memory;
  std::shared_ptr<Code> code;
  alignas(64) std::array<uint32_t, 16> packet{};  // the AQL dispatch packet

  uint64_t num_workgroups() const {
    return uint64_t{launch.num_workgroups.x} * launch.num_workgroups.y * launch.num_workgroups.z;
  }
  uint32_t workgroup_threads() const {
    return launch.workgroup_size.x * launch.workgroup_size.y * launch.workgroup_size.z;
  }
  uint32_t waves_per_workgroup() const { return (workgroup_threads() + kLanes - 1) / kLanes; }

  std::unique_ptr<Workgroup> start_workgroup(uint64_t number, uint32_t slot);
  std::unique_ptr<Wave> start_wave(Workgroup& group, uint32_t index);
};

}  // namespace gfx942
