// Kernel arguments: the caller's, then those that the compiler added, by the code object's
// metadata.
#include <cstdio>
#include <cstring>

#include "module.h"

namespace gfx942::runtime {
namespace {

constexpr uint64_t kLdsBytes = 65536;
constexpr uint64_t kMaxWorkgroup = 1024;

hipError_t refuse(const KernelInfo& info, const std::string& why) {
  std::fprintf(stderr, "rocm-sim: the launch of %s is refused: %s\n", info.kernel.name.c_str(),
               why.c_str());
  return hipErrorInvalidValue;
}

hipError_t check(const KernelInfo& info, const Geometry& geometry) {
  const auto& grid = geometry.num_workgroups;
  const auto& size = geometry.workgroup_size;
  if (uint64_t{grid.x} * grid.y * grid.z == 0) return refuse(info, "its grid is empty");
  const uint64_t items = uint64_t{size.x} * size.y * size.z;
  if (items == 0 || items > kMaxWorkgroup || items > info.max_workgroup) {
    return refuse(info, "a workgroup of " + std::to_string(items) + " must be 1 to " +
                            std::to_string(std::min<uint64_t>(kMaxWorkgroup, info.max_workgroup)));
  }
  const uint64_t lds = uint64_t{info.lds_bytes} + geometry.dynamic_lds_bytes;
  if (lds > kLdsBytes) return refuse(info, std::to_string(lds) + " bytes of LDS are too many");
  return hipSuccess;
}

hipError_t pack_buffer(const KernelInfo& info, void** extra, std::vector<std::byte>* kernarg) {
  const void* buffer = nullptr;
  size_t bytes = 0;
  for (; *extra != HIP_LAUNCH_PARAM_END; extra += 2) {
    if (extra[0] == HIP_LAUNCH_PARAM_BUFFER_POINTER) {
      buffer = extra[1];
    } else if (extra[0] == HIP_LAUNCH_PARAM_BUFFER_SIZE) {
      bytes = *static_cast<const size_t*>(extra[1]);
    } else {
      return refuse(info, "its list of extra parameters has an unknown tag");
    }
  }
  if (buffer == nullptr || bytes > kernarg->size()) {
    return refuse(info, std::to_string(bytes) + " bytes of arguments do not fit its segment of " +
                            std::to_string(kernarg->size()));
  }
  std::memcpy(kernarg->data(), buffer, bytes);
  return hipSuccess;
}

// What the compiler may ask for beyond the caller's arguments. What is not listed is null: buffers
// of printf and hostcall, the device's heap and queues, none of which is simulated.
uint64_t hidden_value(const std::string& kind, const Geometry& geometry) {
  const auto& grid = geometry.num_workgroups;
  const auto& size = geometry.workgroup_size;
  if (kind == "hidden_block_count_x") return grid.x;
  if (kind == "hidden_block_count_y") return grid.y;
  if (kind == "hidden_block_count_z") return grid.z;
  if (kind == "hidden_group_size_x") return size.x;
  if (kind == "hidden_group_size_y") return size.y;
  if (kind == "hidden_group_size_z") return size.z;
  if (kind == "hidden_grid_dims") {
    if (grid.z * size.z > 1) return 3;
    return grid.y * size.y > 1 ? 2 : 1;
  }
  if (kind == "hidden_dynamic_lds_size") return geometry.dynamic_lds_bytes;
  return 0;
}

}  // namespace

hipError_t make_kernel(const Function& function, const Geometry& geometry, void** arguments,
                       void** extra, KernelOperation* out) {
  const KernelInfo& info = *function.info;
  if (const hipError_t error = check(info, geometry); error != hipSuccess) return error;
  out->code = function.code;
  out->info = function.info;
  out->num_workgroups = geometry.num_workgroups;
  out->workgroup_size = geometry.workgroup_size;
  out->dynamic_lds_bytes = geometry.dynamic_lds_bytes;
  out->kernarg.assign(info.kernarg_bytes, std::byte{0});
  if (extra != nullptr) {
    if (const hipError_t error = pack_buffer(info, extra, &out->kernarg); error != hipSuccess) {
      return error;
    }
  }
  size_t next = 0;
  for (const KernelArgument& argument : info.arguments) {
    std::byte* to = out->kernarg.data() + argument.offset;
    if (argument.hidden()) {
      const uint64_t value = hidden_value(argument.kind, geometry);
      std::memcpy(to, &value, std::min<size_t>(argument.bytes, sizeof(value)));
    } else if (extra == nullptr) {
      if (arguments == nullptr) return refuse(info, "it has no arguments");
      std::memcpy(to, arguments[next++], argument.bytes);
    }
  }
  return hipSuccess;
}

}  // namespace gfx942::runtime
