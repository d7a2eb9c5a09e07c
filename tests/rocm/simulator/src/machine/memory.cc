#include "memory.h"

#include <algorithm>
#include <bit>

namespace gfx942 {
namespace {

const char* verb(Use use) {
  return use == Use::kLoad ? "loads" : use == Use::kStore ? "stores" : "has an atomic on";
}

std::string range(Use use, uint32_t bytes, uint64_t address, int lane) {
  return "lane " + std::to_string(lane) + " " + verb(use) + " " + std::to_string(bytes) +
         (bytes == 1 ? " byte at " : " bytes at ") + hex(address);
}

std::string name_of(const Allocation& a) {
  return a.what + " [" + hex(a.first) + ", " + hex(a.first + a.bytes) + ")";
}

// Faults if another wave has used these bytes since the last barrier in a way that needs an order.
void check_races(Wave& wave, uint64_t offset, uint32_t bytes, Use use, int lane) {
  Workgroup& group = *wave.group;
  const auto own = static_cast<uint16_t>(1u << wave.index);
  for (uint64_t byte = offset; byte < offset + bytes; ++byte) {
    LdsUse& used = group.lds_used[byte];
    if (used.barriers != group.barriers) used = {group.barriers};
    const auto refuse = [&](uint16_t waves, const char* what) {
      waves &= static_cast<uint16_t>(~own);
      if (waves == 0) return;
      throw FaultError(FaultCode::kBarrier, range(use, bytes, offset, lane) +
                                                " of LDS, which wave " +
                                                std::to_string(std::countr_zero(waves)) + " has " +
                                                what + " and no barrier since");
    };
    refuse(used.stored, "stored");
    if (use != Use::kAtomic) refuse(used.updated, "updated");
    if (use != Use::kLoad) refuse(used.loaded, "loaded");
    (use == Use::kLoad ? used.loaded : use == Use::kStore ? used.stored : used.updated) |= own;
  }
}

constexpr size_t kRecent = 8;

}  // namespace

void Memory::refresh() {
  const uint64_t now = space_.generation();
  if (now == generation_) return;
  generation_ = now;
  recent_.clear();
}

// What an address that missed may have been meant to hit.
std::string Memory::neighbour(uint64_t address) const {
  for (uint64_t distance = 1; distance <= 4096; distance *= 4) {
    if (const auto below = space_.find(address - distance)) {
      return ", " + std::to_string(address - below->first - below->bytes) +
             " bytes beyond the end of " + name_of(*below);
    }
    if (const auto above = space_.find(address + distance)) {
      return ", " + std::to_string(above->first - address) + " bytes before " + name_of(*above);
    }
  }
  return "";
}

const Allocation& Memory::find(uint64_t address, uint32_t bytes, Use use, int lane) {
  const auto holds = [&](const Allocation& a) {
    return address >= a.first && address - a.first < a.bytes;
  };
  auto known = std::find_if(recent_.begin(), recent_.end(), holds);
  if (known == recent_.end()) {
    std::optional<Allocation> found = space_.find(address);
    const auto own = std::find_if(own_.begin(), own_.end(), holds);
    if (!found && own != own_.end()) found = *own;
    if (!found) {
      throw FaultError(
          FaultCode::kIllegalAddress,
          range(use, bytes, address, lane) + ", where no allocation is alive" + neighbour(address));
    }
    if (recent_.size() == kRecent) recent_.erase(recent_.begin());
    recent_.push_back(std::move(*found));
    known = recent_.end() - 1;
  }
  const Allocation& a = *known;
  if (address - a.first + bytes > a.bytes) {
    throw FaultError(FaultCode::kIllegalAddress,
                     range(use, bytes, address, lane) + ", beyond the end of " + name_of(a));
  }
  if (use != Use::kLoad && !a.writable) {
    throw FaultError(FaultCode::kIllegalAddress,
                     range(use, bytes, address, lane) + " in read-only " + a.what);
  }
  return a;
}

void Memory::add_to_counts(const Allocation& allocation, uint64_t address, uint32_t bytes,
                           Use use) {
  Home home = Home::kPeer;
  if (allocation.first == launch_->kernarg) {
    home = Home::kArguments;
  } else if (allocation.device == kHostMemory) {
    home = Home::kHost;
  } else if (allocation.device == launch_->device) {
    home = Home::kOwn;
  }
  constexpr uint64_t kLineBytes = 64;
  Traffic& traffic = counts_->traffic[static_cast<size_t>(home)];
  (use == Use::kLoad    ? traffic.read
   : use == Use::kStore ? traffic.written
                        : traffic.atomic) += bytes;
  auto& lines = use == Use::kLoad ? traffic.lines_read : traffic.lines_written;
  for (uint64_t line = address / kLineBytes; line <= (address + bytes - 1) / kLineBytes; ++line) {
    lines.insert(line);
  }
}

Place Memory::at(uint64_t address, uint32_t bytes, Use use, int lane) {
  check_alignment(address, bytes, use, lane);
  const Allocation& allocation = find(address, bytes, use, lane);
  if (counts_ != nullptr) add_to_counts(allocation, address, bytes, use);
  return {reinterpret_cast<std::byte*>(address),
          caches_ != nullptr && allocation.kind == MemoryKind::kOrdinary};
}

void check_alignment(uint64_t address, uint32_t bytes, Use use, int lane) {
  if (use != Use::kAtomic || (address & (bytes - 1)) == 0) return;
  throw FaultError(FaultCode::kMisaligned,
                   range(use, bytes, address, lane) + ", which is misaligned");
}

Place lds_at(Wave& wave, uint64_t offset, uint32_t bytes, Use use, int lane) {
  Workgroup& group = *wave.group;
  check_alignment(offset, bytes, use, lane);
  if (offset + bytes > group.lds.size()) {
    throw FaultError(FaultCode::kIllegalAddress, range(use, bytes, offset, lane) +
                                                     " of LDS, beyond its " +
                                                     std::to_string(group.lds.size()) + " bytes");
  }
  if (!group.lds_written.empty()) {
    const auto first = group.lds_written.begin() + static_cast<ptrdiff_t>(offset);
    if (use == Use::kStore) {
      std::fill_n(first, bytes, true);
    } else if (std::find(first, first + bytes, false) != first + bytes) {
      throw FaultError(FaultCode::kIllegalAddress,
                       range(use, bytes, offset, lane) + " of LDS that nothing has written");
    }
  }
  if (!group.lds_used.empty()) check_races(wave, offset, bytes, use, lane);
  return {group.lds.data() + offset};
}

Place scratch_at(Wave& wave, uint64_t offset, uint32_t bytes, Use use, int lane) {
  check_alignment(offset, bytes, use, lane);
  if (offset + bytes > wave.scratch_bytes) {
    throw FaultError(FaultCode::kIllegalAddress,
                     range(use, bytes, offset, lane) + " of scratch, beyond its " +
                         std::to_string(wave.scratch_bytes) + " bytes of a work-item");
  }
  return {wave.scratch.get() + uint64_t{wave.scratch_bytes} * static_cast<uint64_t>(lane) + offset};
}

Place flat_at(Wave& wave, uint64_t address, uint32_t bytes, Use use, int lane) {
  if (address - kSharedAperture < kApertureBytes) {
    return lds_at(wave, address - kSharedAperture, bytes, use, lane);
  }
  if (address - kPrivateAperture < kApertureBytes) {
    return scratch_at(wave, address - kPrivateAperture, bytes, use, lane);
  }
  return wave.memory->at(address, bytes, use, lane);
}

void read_place(Wave& wave, const Place& place, Scope scope, void* to, uint32_t bytes) {
  if (place.at == nullptr) {
    std::memset(to, 0, bytes);
  } else if (place.cached) {
    wave.memory->caches()->read(wave.group->xcd, reinterpret_cast<uint64_t>(place.at), to, bytes,
                                scope);
  } else {
    std::memcpy(to, place.at, bytes);
  }
}

void write_place(Wave& wave, const Place& place, Scope scope, const void* from, uint32_t bytes) {
  if (place.at == nullptr) return;
  if (place.cached) {
    wave.memory->caches()->write(wave.group->xcd, reinterpret_cast<uint64_t>(place.at), from, bytes,
                                 scope);
  } else {
    std::memcpy(place.at, from, bytes);
  }
}

}  // namespace gfx942
