// The file of ROCM_SIM_COUNT: one line of JSON for each launch, copy and fill.
#pragma once

#include "../launch.h"
#include "operation.h"

namespace gfx942::runtime {

bool counting();
void write_counts(const Launch& launch, const Counts& counts);
void write_counts(const CopyOperation& copy, int device);
void write_counts(const FillOperation& fill, int device);

}  // namespace gfx942::runtime
