// Runs the waves of a launch: which are resident, in which order they proceed, and where they meet.
#pragma once

#include "wave.h"

namespace gfx942 {

// The last wave of the workgroup lets all go on. A wave that has ended while others wait is a
// fault, although hardware lets them pass; so are, if asked for, waves that wait at different
// barriers.
void arrive_at_barrier(Wave& wave, const Instruction& i);

// Vector instructions while they are skipped, or while their registers are counted from M0.
void execute_in_vector_mode(Wave& wave, const Instruction& i);

}  // namespace gfx942
