// DPP: a source is read from another lane of the row or the wave.
#pragma once

#include <memory>
#include <string_view>

#include "instruction.h"

namespace gfx942 {

// Collects the modifiers of one instruction's text.
class LaneMoveText {
 public:
  // False if the name is no modifier of DPP.
  bool control(std::string_view name, std::string_view value);
  // Null if the instruction has no lane movement.
  std::shared_ptr<const LaneMove> finish() const;

 private:
  std::string_view name_;
  std::string_view value_;
  int row_mask_ = 0xf;
  int bank_mask_ = 0xf;
  bool zero_fill_ = false;
};

}  // namespace gfx942
