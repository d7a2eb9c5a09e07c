// Where the lanes of a memory instruction read or write, after the checks that hardware does not
// make.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache.h"
#include "wave.h"

namespace gfx942 {

enum class Use : uint8_t { kLoad, kStore, kAtomic };

// A host pointer, and whether the simulated caches stand before it.
struct Place {
  std::byte* at = nullptr;
  bool cached = false;
};

// Places of the lanes in `mask`. Null: out of a buffer's range, which reads as zero and drops
// stores.
struct Places {
  std::array<Place, kLanes> of{};
  uint64_t mask = 0;
  Scope scope = Scope::kDie;
};

// Device memory as a launch sees it. Looked-up allocations are kept until the table changes.
class Memory {
 public:
  Memory(const AddressSpace& space, bool adversarial) : space_(space) {
    if (adversarial) caches_ = std::make_unique<Caches>();
  }

  // Null unless the memory mode is adversarial.
  Caches* caches() { return caches_.get(); }

  // The checked place of `bytes` bytes. Call refresh() once before the lanes of an instruction.
  Place at(uint64_t address, uint32_t bytes, Use use, int lane);
  void refresh();
  // Counts what is asked for from now on, of a launch with these arguments on this device.
  void count(const Launch& launch, Counts* counts) {
    launch_ = &launch;
    counts_ = counts;
  }
  // Memory of the machine itself, such as the dispatch packet.
  void add(Allocation allocation) { own_.push_back(std::move(allocation)); }

 private:
  std::string neighbour(uint64_t address) const;
  const Allocation& find(uint64_t address, uint32_t bytes, Use use, int lane);
  void add_to_counts(const Allocation& allocation, uint64_t address, uint32_t bytes, Use use);

  const AddressSpace& space_;
  std::unique_ptr<Caches> caches_;
  const Launch* launch_ = nullptr;
  Counts* counts_ = nullptr;
  uint64_t generation_ = 0;
  std::vector<Allocation> own_;
  std::vector<Allocation> recent_;
};

// Faults if an atomic is misaligned. Loads and stores may be: compilers make use of it.
void check_alignment(uint64_t address, uint32_t bytes, Use use, int lane);

Place lds_at(Wave& wave, uint64_t offset, uint32_t bytes, Use use, int lane);
Place scratch_at(Wave& wave, uint64_t offset, uint32_t bytes, Use use, int lane);
// A flat address: of LDS, scratch or device memory, by its aperture.
Place flat_at(Wave& wave, uint64_t address, uint32_t bytes, Use use, int lane);

// Of instructions whose address operand has the given number.
Places global_places(Wave& wave, const Instruction& i, int address_operand, int base_operand,
                     uint32_t bytes, Use use);
Places flat_places(Wave& wave, const Instruction& i, int address_operand, uint32_t bytes, Use use);
Places scratch_places(Wave& wave, const Instruction& i, int address_operand, int base_operand,
                      uint32_t bytes, Use use);
Places buffer_places(Wave& wave, const Instruction& i, int address_operand, uint32_t bytes,
                     Use use);
Places lds_places(Wave& wave, const Instruction& i, int address_operand, uint32_t offset,
                  uint32_t bytes, Use use);

// Reads zeros and writes nothing where there is no place.
void read_place(Wave& wave, const Place& place, Scope scope, void* to, uint32_t bytes);
void write_place(Wave& wave, const Place& place, Scope scope, const void* from, uint32_t bytes);

// What is moved between memory and registers.
enum class Into : uint8_t { kWords, kLowHalf, kHighHalf };
struct Shape {
  uint8_t bytes;
  bool is_signed = false;
  Into into = Into::kWords;
};

void load(Wave& wave, const Operand& to, const Places& places, Shape shape);
void store(Wave& wave, const Operand& from, const Places& places, Shape shape);
// Loads that write to LDS instead of registers.
void store_in_lds(Wave& wave, const Instruction& i, const Places& places, Shape shape);

}  // namespace gfx942
