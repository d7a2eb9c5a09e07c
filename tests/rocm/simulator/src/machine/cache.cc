#include "cache.h"

#include <algorithm>
#include <cstring>

namespace gfx942 {
namespace {

// Other processes read and write the same memory: words must not be torn.
template <class T>
void copy_word(uint64_t to, uint64_t from) {
  const T value = __atomic_load_n(reinterpret_cast<const T*>(from), __ATOMIC_RELAXED);
  __atomic_store_n(reinterpret_cast<T*>(to), value, __ATOMIC_RELAXED);
}

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// Calls f(address, bytes) for each part of a range that lies in one line.
template <class F>
void for_lines(uint64_t address, size_t bytes, F f) {
  while (bytes != 0) {
    const size_t rest = CacheLevel::kLineBytes - address % CacheLevel::kLineBytes;
    const size_t part = std::min(bytes, rest);
    f(address, part);
    address += part;
    bytes -= part;
  }
}

}  // namespace

void CacheLevel::fill(uint64_t first, Line* line) {
  std::array<std::byte, kLineBytes> fresh;
  if (next_ != nullptr) {
    next_->read(first, fresh.data(), kLineBytes, false);
  } else {
    for (size_t k = 0; k < kLineBytes; k += 8)
      copy_word<uint64_t>(address_of(&fresh[k]), first + k);
  }
  for (size_t k = 0; k < kLineBytes; ++k) {
    if (!line->dirty[k]) line->data[k] = fresh[k];
  }
}

CacheLevel::Line& CacheLevel::line_of(uint64_t address, bool renew) {
  const uint64_t first = address / kLineBytes * kLineBytes;
  const auto [entry, is_new] = lines_.try_emplace(first);
  if (is_new || renew) fill(first, &entry->second);
  return entry->second;
}

void CacheLevel::read(uint64_t address, void* to, size_t bytes, bool renew) {
  const Line& line = line_of(address, renew);
  std::memcpy(to, &line.data[address % kLineBytes], bytes);
}

void CacheLevel::write(uint64_t address, const void* from, size_t bytes, bool through) {
  Line& line = line_of(address, false);
  const size_t offset = address % kLineBytes;
  std::memcpy(&line.data[offset], from, bytes);
  for (size_t k = 0; k < bytes; ++k) line.dirty[offset + k] = true;
  if (through) clean(address - offset, &line);
}

// Writes dirty bytes to the level below; aligned words that are dirty as a whole go there as a
// whole.
void CacheLevel::clean(uint64_t first, Line* line) {
  for (size_t k = 0; k < kLineBytes && line->dirty.any();) {
    size_t bytes = 0;
    for (size_t width : {8u, 4u, 2u, 1u}) {
      bool whole = k % width == 0;
      for (size_t n = 0; n < width && whole; ++n) whole = line->dirty[k + n];
      if (!whole) continue;
      bytes = width;
      break;
    }
    if (bytes == 0) {
      ++k;
      continue;
    }
    if (next_ != nullptr) {
      next_->write(first + k, &line->data[k], bytes, false);
    } else if (bytes == 8) {
      copy_word<uint64_t>(first + k, address_of(&line->data[k]));
    } else if (bytes == 4) {
      copy_word<uint32_t>(first + k, address_of(&line->data[k]));
    } else if (bytes == 2) {
      copy_word<uint16_t>(first + k, address_of(&line->data[k]));
    } else {
      copy_word<uint8_t>(first + k, address_of(&line->data[k]));
    }
    for (size_t n = 0; n < bytes; ++n) line->dirty[k + n] = false;
    k += bytes;
  }
}

void CacheLevel::write_back() {
  for (auto& [first, line] : lines_) clean(first, &line);
}

void CacheLevel::write_back_line(uint64_t address) {
  const auto found = lines_.find(address / kLineBytes * kLineBytes);
  if (found == lines_.end()) return;
  clean(found->first, &found->second);
  lines_.erase(found);
}

void CacheLevel::invalidate() {
  std::erase_if(lines_, [](const auto& entry) { return entry.second.dirty.none(); });
  // Clean bytes beside dirty ones are renewed now, as if they were read right after.
  for (auto& [first, line] : lines_) fill(first, &line);
}

void Caches::read(uint32_t xcd, uint64_t address, void* to, size_t bytes, Scope scope) {
  auto* out = static_cast<std::byte*>(to);
  for_lines(address, bytes, [&](uint64_t part, size_t count) {
    if (scope == Scope::kSystem) {
      std::byte unused[1];
      device_.read(part, unused, 1, true);
    }
    dies_[xcd].read(part, out + (part - address), count, scope != Scope::kDie);
  });
}

void Caches::write(uint32_t xcd, uint64_t address, const void* from, size_t bytes, Scope scope) {
  const auto* in = static_cast<const std::byte*>(from);
  for_lines(address, bytes, [&](uint64_t part, size_t count) {
    dies_[xcd].write(part, in + (part - address), count, scope != Scope::kDie);
    if (scope == Scope::kSystem) device_.write(part, in + (part - address), count, true);
  });
}

void Caches::prepare_atomic(uint32_t xcd, uint64_t address) {
  dies_[xcd].write_back_line(address);
  device_.write_back_line(address);
}

void Caches::write_back(uint32_t xcd, Scope scope) {
  if (scope == Scope::kDie) return;
  dies_[xcd].write_back();
  if (scope == Scope::kSystem) device_.write_back();
}

void Caches::invalidate(uint32_t xcd, Scope scope) {
  if (scope == Scope::kDie) return;
  if (scope == Scope::kSystem) device_.invalidate();
  dies_[xcd].invalidate();
}

void Caches::write_back_all() {
  for (CacheLevel& die : dies_) die.write_back();
  device_.write_back();
}

}  // namespace gfx942
