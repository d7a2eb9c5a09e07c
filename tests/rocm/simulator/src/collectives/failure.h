// What went wrong, in words and as the code that a call returns.
#pragma once

#include <string>

#include "nccl.h"

namespace gfx942::collectives {

struct Failure {
  ncclResult_t code = ncclSuccess;
  std::string text;
};

// Says it on stderr and keeps it for ncclGetLastError; returns the code.
ncclResult_t report(const Failure& failure);
const char* last_failure();

// Seconds that ranks wait for each other: ROCM_SIM_COLLECTIVE_DEADLINE.
double deadline_seconds();

}  // namespace gfx942::collectives
