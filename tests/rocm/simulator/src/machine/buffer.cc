// MUBUF: addresses by a buffer resource descriptor, and its bounds.
#include "memory.h"
#include "vector.h"

namespace gfx942 {
namespace {

struct Resource {
  uint64_t base;
  uint32_t stride;
  uint32_t num_records;
  bool swizzle;
  uint32_t element_bytes;
  uint32_t index_stride;
  bool add_thread_id;

  Resource(Wave& wave, const Operand& operand) {
    const uint32_t* words = &wave.s[operand.index];
    base = words[0] | uint64_t{words[1] & 0xffff} << 32;
    stride = words[1] >> 16 & 0x3fff;
    swizzle = (words[1] >> 31) != 0;
    num_records = words[2];
    element_bytes = 2u << (words[3] >> 19 & 3);
    index_stride = 8u << (words[3] >> 21 & 3);
    add_thread_id = (words[3] >> 23 & 1) != 0;
    // With the lane added to the index, the data format's bits extend the stride.
    if (add_thread_id) stride |= (words[3] >> 15 & 0xf) << 14;
  }

  // From the base, without the scalar offset.
  uint64_t position(uint32_t index, uint32_t offset) const {
    if (!swizzle) return uint64_t{index} * stride + offset;
    const uint32_t in_group = index % index_stride;
    const uint32_t in_element = offset % element_bytes;
    return uint64_t{index / index_stride} * stride * index_stride +
           uint64_t{offset / element_bytes} * element_bytes * index_stride +
           uint64_t{in_group} * element_bytes + in_element;
  }

  // Records are bytes unless lanes have an index into a structured buffer.
  bool holds(uint32_t index, uint32_t offset, uint32_t scalar_offset, uint32_t bytes) const {
    if (stride == 0 || !(swizzle || add_thread_id || index_checked)) {
      return uint64_t{offset} + scalar_offset + bytes <= num_records;
    }
    return index < num_records && (!swizzle || offset + bytes <= stride);
  }

  bool index_checked = false;
};

}  // namespace

Places buffer_places(Wave& wave, const Instruction& i, int address_operand, uint32_t bytes,
                     Use use) {
  const auto first = static_cast<size_t>(address_operand);
  const Operand& address = i.operand[first];
  Resource resource(wave, i.operand[first + 1]);
  resource.index_checked = i.idxen;
  const uint32_t scalar_offset = wave.read_scalar(i.operand[first + 2]);
  const unsigned vectors = (i.offen ? 1 : 0) + (i.idxen ? 1 : 0);
  const Lanes* words = vectors != 0 ? wave.vector(address.index, vectors) : nullptr;
  Places places;
  places.mask = wave.exec();
  places.scope = scope_of_bits(i.sc0, i.sc1);
  wave.memory->refresh();
  for_lanes(places.mask, [&](int lane) {
    uint32_t index = i.idxen ? words[0][lane] : 0;
    if (resource.add_thread_id) index += static_cast<uint32_t>(lane);
    uint32_t offset = static_cast<uint32_t>(i.offset);
    if (i.offen) offset += words[i.idxen ? 1 : 0][lane];
    if (!resource.holds(index, offset, scalar_offset, bytes)) return;
    const uint64_t at = resource.base + scalar_offset + resource.position(index, offset);
    places.of[static_cast<size_t>(lane)] = flat_at(wave, at, bytes, use, lane);
  });
  return places;
}

}  // namespace gfx942
