// Which function executes which mnemonic. Each file of semantics has one table; semantics.cc joins
// them.
#pragma once

#include <span>
#include <string_view>

#include "instruction.h"

namespace gfx942 {

struct Semantics {
  std::string_view mnemonic;
  Handler handler;
};

using Table = std::span<const Semantics>;

Table scalar_table();
Table scalar_memory_table();
Table control_table();
Table integer_table();
Table float_table();
Table half_table();
Table compare_table();
Table packed_table();
Table lane_table();
Table conversion_table();
Table matrix_table();
Table lds_table();
Table memory_table();
Table atomic_table();

// Sets the handler, if the machine has one for the mnemonic.
void bind(Instruction* instruction);

}  // namespace gfx942
