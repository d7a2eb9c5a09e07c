// The adversarial memory mode: caches that keep what hardware may keep. Each die has a write-back
// L2, and the device a level above memory. Nothing leaves a level, and nothing stale is renewed,
// before an instruction asks for it; real caches do so too, only less reliably.
#pragma once

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace gfx942 {

// How far an access must be seen: sc1 names the device, sc0 and sc1 the system.
enum class Scope : uint8_t { kDie, kDevice, kSystem };
constexpr Scope scope_of_bits(bool sc0, bool sc1) {
  return !sc1 ? Scope::kDie : sc0 ? Scope::kSystem : Scope::kDevice;
}

class CacheLevel {
 public:
  // Reads and writes go to `next`, or to memory where there is none.
  explicit CacheLevel(CacheLevel* next) : next_(next) {}

  // Within one line. `renew` takes what is not dirty from below first.
  void read(uint64_t address, void* to, size_t bytes, bool renew);
  void write(uint64_t address, const void* from, size_t bytes, bool through);
  void write_back();
  void invalidate();  // what is dirty stays
  void write_back_line(uint64_t address);

  static constexpr size_t kLineBytes = 128;

 private:
  struct Line {
    std::array<std::byte, kLineBytes> data;
    std::bitset<kLineBytes> dirty;
  };

  Line& line_of(uint64_t address, bool renew);
  void fill(uint64_t first, Line* line);
  void clean(uint64_t first, Line* line);

  CacheLevel* next_;
  std::unordered_map<uint64_t, Line> lines_;
};

constexpr uint32_t kNumXcds = 8;

class Caches {
 public:
  void read(uint32_t xcd, uint64_t address, void* to, size_t bytes, Scope scope);
  void write(uint32_t xcd, uint64_t address, const void* from, size_t bytes, Scope scope);
  // Before an atomic, which works on memory: nothing of its line stays in the caches that it
  // passes.
  void prepare_atomic(uint32_t xcd, uint64_t address);
  void write_back(uint32_t xcd, Scope scope);
  void invalidate(uint32_t xcd, Scope scope);
  // The end of a kernel makes everything visible.
  void write_back_all();

 private:
  CacheLevel device_{nullptr};
  std::array<CacheLevel, kNumXcds> dies_{
      CacheLevel(&device_), CacheLevel(&device_), CacheLevel(&device_), CacheLevel(&device_),
      CacheLevel(&device_), CacheLevel(&device_), CacheLevel(&device_), CacheLevel(&device_)};
};

}  // namespace gfx942
