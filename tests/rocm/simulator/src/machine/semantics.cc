#include "semantics.h"

#include <algorithm>
#include <unordered_map>

namespace gfx942 {
namespace {

InstructionKind kind_of(std::string_view mnemonic) {
  const auto begins = [&](std::initializer_list<std::string_view> parts) {
    return std::any_of(parts.begin(), parts.end(),
                       [&](std::string_view part) { return mnemonic.starts_with(part); });
  };
  const auto has = [&](std::string_view part) {
    return mnemonic.find(part) != std::string_view::npos;
  };
  if (begins({"v_mfma", "v_smfmac"})) return InstructionKind::kMatrix;
  if (begins({"v_"})) return InstructionKind::kVector;
  if (begins({"ds_"})) return InstructionKind::kLds;
  if (begins({"s_branch", "s_cbranch", "s_setpc", "s_swappc", "s_call"})) {
    return InstructionKind::kBranch;
  }
  if (begins({"s_load", "s_buffer", "s_store", "s_scratch", "s_atomic", "s_dcache", "s_mem"})) {
    return InstructionKind::kScalarLoad;
  }
  if (begins({"s_"})) return InstructionKind::kScalar;
  if (has("_atomic")) return InstructionKind::kAtomic;
  if (has("_load")) return InstructionKind::kVectorLoad;
  if (has("_store")) return InstructionKind::kVectorStore;
  return InstructionKind::kCache;
}

}  // namespace

void bind(Instruction* instruction) {
  static const auto* handlers = [] {
    auto* all = new std::unordered_map<std::string_view, Handler>();
    for (const Table table :
         {scalar_table(), scalar_memory_table(), control_table(), integer_table(), float_table(),
          half_table(), compare_table(), packed_table(), lane_table(), conversion_table(),
          matrix_table(), lds_table(), memory_table(), atomic_table()}) {
      for (const Semantics& entry : table) all->emplace(entry.mnemonic, entry.handler);
    }
    return all;
  }();
  const auto found = handlers->find(instruction->mnemonic);
  instruction->handler = found == handlers->end() ? nullptr : found->second;
  instruction->kind = kind_of(instruction->mnemonic);
}

}  // namespace gfx942
