// Launches of MORI's kernels: which kernels an exchange takes, and with how much of a device.
#pragma once

#include <cstdint>
#include <string>

#include "handle.h"
#include "moriep/row_type.h"
#include "moriep/status.h"

namespace moriep::mori {

// The types of rows that MORI has kernels for.
enum class Rows { kF32, kBF16, kFp8 };

inline Rows rows_of(RowType type) { return type == RowType::kF32 ? Rows::kF32 : Rows::kBF16; }

struct Launch {
  const Handle& handle;
  Rows rows;
  int32_t num_blocks;
  int32_t num_waves;  // of a block
  hipStream_t stream;
  moe::EpDispatchCombineArgsRaw args;

  Status dispatch();
  Status replay();
  Status combine();

 private:
  // Blocks of a kernel that works on so many rows, and in which nobody waits for anybody.
  int32_t blocks_for(int64_t num_rows) const;
  Status run(const std::string& kernel, int32_t blocks, int32_t waves, int64_t lds_bytes);
};

}  // namespace moriep::mori
