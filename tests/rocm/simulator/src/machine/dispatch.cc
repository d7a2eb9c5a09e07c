#include "dispatch.h"

#include <algorithm>

namespace gfx942 {
namespace {

template <class T>
T field(uint64_t descriptor, size_t offset) {
  T value;
  std::memcpy(&value, reinterpret_cast<const std::byte*>(descriptor) + offset, sizeof(value));
  return value;
}

bool bit(uint32_t word, unsigned position) { return (word >> position & 1) != 0; }

// Real registers and LDS start with what the last kernel left; a pattern makes that visible.
constexpr uint32_t kUnwrittenRegister = 0xcdcdcdcd;
constexpr std::byte kUnwrittenLds{0xa5};

}  // namespace

Descriptor::Descriptor(uint64_t address) {
  const auto entry_offset = field<int64_t>(address, 16);
  const auto resource3 = field<uint32_t>(address, 44);
  const auto resource1 = field<uint32_t>(address, 48);
  const auto resource2 = field<uint32_t>(address, 52);
  const auto properties = field<uint16_t>(address, 56);
  const auto preload = field<uint16_t>(address, 58);

  const uint32_t total = ((resource1 & 0x3f) + 1) * 8;
  const uint32_t first_accumulator = ((resource3 & 0x3f) + 1) * 4;
  num_vectors = std::min(first_accumulator, total);
  num_accumulators = total - num_vectors;
  dx10_clamp = bit(resource1, 21);
  mode = (resource1 >> 12 & 0xff) | (dx10_clamp ? 1u << 8 : 0) |
         (bit(resource1, 23) ? 1u << 9 : 0) | (bit(resource1, 26) ? kModeFp16Overflow : 0);

  private_segment_buffer = bit(properties, 0);
  dispatch_pointer = bit(properties, 1);
  queue_pointer = bit(properties, 2);
  kernarg_pointer = bit(properties, 3);
  dispatch_id = bit(properties, 4);
  private_segment_size = bit(properties, 6);
  preload_dwords = preload & 0x7f;
  preload_offset = preload >> 7;
  for (unsigned k = 0; k < 3; ++k) workgroup_id[k] = bit(resource2, 7 + k);
  workgroup_info = bit(resource2, 10);
  entry = address + static_cast<uint64_t>(entry_offset);
  // The first 256 bytes load the arguments where firmware does not.
  if (preload_dwords != 0) entry += 256;
}

Dispatch::Dispatch(const Launch& what, const AddressSpace& space, const Options& how,
                   Counts* counted)
    : launch(what),
      options(how),
      counts(counted),
      descriptor(what.kernel.descriptor),
      memory(space, how.adversarial_memory) {
  code = code_of(launch.kernel.text, launch.kernel.text_bytes);
  const Dim3& size = launch.workgroup_size;
  const Dim3& count = launch.num_workgroups;
  packet[0] = 0x1502 | 3u << 16;  // a kernel dispatch with three dimensions
  packet[1] = size.x | size.y << 16;
  packet[2] = size.z;
  packet[3] = count.x * size.x;
  packet[4] = count.y * size.y;
  packet[5] = count.z * size.z;
  packet[6] = launch.scratch_bytes;
  packet[7] = launch.lds_bytes;
  std::memcpy(&packet[8], &launch.kernel.descriptor, 8);
  std::memcpy(&packet[10], &launch.kernarg, 8);
  memory.add({reinterpret_cast<uint64_t>(packet.data()), sizeof(packet), MemoryKind::kUncached,
              false, "the dispatch packet", kHostMemory});
  memory.count(launch, counts);
}

std::unique_ptr<Workgroup> Dispatch::start_workgroup(uint64_t number, uint32_t slot) {
  auto group = std::make_unique<Workgroup>();
  const Dim3& count = launch.num_workgroups;
  group->dispatch = this;
  group->id = {static_cast<uint32_t>(number % count.x),
               static_cast<uint32_t>(number / count.x % count.y),
               static_cast<uint32_t>(number / count.x / count.y)};
  group->linear_id = static_cast<uint32_t>(number);
  // Hardware deals workgroups to the dies in turn.
  group->xcd = static_cast<uint32_t>(number % kNumXcds);
  group->slot = slot;
  group->lds.assign(launch.lds_bytes, kUnwrittenLds);
  if (options.check_uninitialised) group->lds_written.assign(launch.lds_bytes, false);
  if (options.check_races) group->lds_used.assign(launch.lds_bytes, {});
  group->waves = group->live_waves = waves_per_workgroup();
  return group;
}

std::unique_ptr<Wave> Dispatch::start_wave(Workgroup& group, uint32_t index) {
  auto wave = std::make_unique<Wave>();
  wave->group = &group;
  wave->dispatch = this;
  wave->memory = &memory;
  wave->index = index;
  wave->pc = descriptor.entry;
  wave->mode = descriptor.mode;
  wave->dx10_clamp = descriptor.dx10_clamp;
  wave->num_vectors = descriptor.num_vectors;
  wave->num_accumulators = descriptor.num_accumulators;
  const size_t registers = descriptor.num_vectors + descriptor.num_accumulators;
  wave->vectors = std::make_unique_for_overwrite<Lanes[]>(registers);
  std::fill_n(*wave->vectors.get(), registers * kLanes, kUnwrittenRegister);
  wave->accumulators = wave->vectors.get() + descriptor.num_vectors;
  wave->scratch_bytes = launch.scratch_bytes;
  wave->scratch =
      std::make_unique_for_overwrite<std::byte[]>(size_t{launch.scratch_bytes} * kLanes);

  // Scalar registers, in the order that the ABI fixes.
  size_t next = 0;
  const auto push_pair = [&](uint64_t value) {
    std::memcpy(&wave->s[next], &value, 8);
    next += 2;
  };
  wave->s.fill(kUnwrittenRegister);
  if (descriptor.private_segment_buffer) next += 4;
  if (descriptor.dispatch_pointer) push_pair(reinterpret_cast<uint64_t>(packet.data()));
  if (descriptor.queue_pointer) push_pair(0);
  if (descriptor.kernarg_pointer) push_pair(launch.kernarg);
  if (descriptor.dispatch_id) push_pair(0);
  if (descriptor.private_segment_size) wave->s[next++] = launch.scratch_bytes;
  for (uint32_t k = 0; k < descriptor.preload_dwords && next < 16; ++k) {
    const uint64_t from = launch.kernarg + 4 * (descriptor.preload_offset + k);
    std::memcpy(&wave->s[next++], memory.at(from, 4, Use::kLoad, 0).at, 4);
  }
  const uint32_t ids[] = {group.id.x, group.id.y, group.id.z};
  for (unsigned k = 0; k < 3; ++k) {
    if (descriptor.workgroup_id[k]) wave->s[next++] = ids[k];
  }
  if (descriptor.workgroup_info) wave->s[next++] = index == 0 ? 1u << 31 : 0;
  wave->set_pair(kFlatScratch, kPrivateAperture);
  wave->s[kM0] = 0;
  wave->set_pair(kVcc, 0);

  // Work-items of a wave have consecutive numbers; v0 packs their three coordinates.
  const Dim3& size = launch.workgroup_size;
  const uint32_t threads = workgroup_threads();
  uint64_t exec = 0;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    const uint32_t item = index * kLanes + lane;
    if (item < threads) exec |= uint64_t{1} << lane;
    const uint32_t x = item % size.x;
    const uint32_t y = item / size.x % size.y;
    const uint32_t z = item / size.x / size.y;
    wave->vectors[0][lane] = x | y << 10 | z << 20;
  }
  wave->set_exec(exec);
  return wave;
}

}  // namespace gfx942
