// What a launch did, in numbers that do not depend on time: ROCM_SIM_COUNT.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_set>

namespace gfx942 {

// Kinds of instructions, by the names that they begin with.
enum class InstructionKind : uint8_t {
  kScalar,       // s_*, waits and barriers among them
  kBranch,       // s_branch, s_cbranch_*, s_setpc, s_swappc, s_call
  kScalarLoad,   // s_load_*, s_buffer_load_* and other scalar memory
  kVector,       // v_*
  kMatrix,       // v_mfma_*, v_smfmac_*
  kLds,          // ds_*
  kVectorLoad,   // global_, flat_, buffer_ and scratch_load_*
  kVectorStore,  // and _store_*
  kAtomic,       // and _atomic_*
  kCache,        // buffer_inv and buffer_wbl2
};
constexpr int kNumInstructionKinds = 10;

// Whose memory an address is, for the device that uses it.
enum class Home : uint8_t { kOwn, kPeer, kHost, kArguments };
constexpr int kNumHomes = 4;

struct Traffic {
  // Bytes that lanes asked for, or the scalar unit for its wave.
  uint64_t read = 0;
  uint64_t written = 0;
  uint64_t atomic = 0;
  // Lines of 64 bytes, by their first address, that were touched at least once.
  std::unordered_set<uint64_t> lines_read;
  std::unordered_set<uint64_t> lines_written;  // atomics too
};

struct Counts {
  std::array<uint64_t, kNumInstructionKinds> instructions{};  // of waves
  std::array<Traffic, kNumHomes> traffic;
};

}  // namespace gfx942
