#include "semantics.h"

#include <unordered_map>

namespace gfx942 {

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
}

}  // namespace gfx942
