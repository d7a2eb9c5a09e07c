// Moving and summing rows: the only code here that touches payload.
#pragma once

#include <cstddef>
#include <cstdint>

#include "moriep/row_type.h"

namespace moriep {

// How rows are written: past the caches when a step writes more than they hold, because then
// nothing of it is still there when it is read, and a store that does not first read the line saves
// a third of the traffic.
enum class Store { kCached, kStreamed };

inline constexpr int64_t kStreamBytes = int64_t{4} << 20;
inline Store store_for(int64_t bytes) {
  return bytes >= kStreamBytes ? Store::kStreamed : Store::kCached;
}

void copy_row(const std::byte* from, std::byte* to, int64_t bytes, Store store);

// out = ((rows[0] + rows[1]) + rows[2]) + ..., in f32, rounded once to the row type; zeros when n
// is 0. `out` may be none of the inputs.
void sum_rows(RowType type, const std::byte* const* rows, int64_t n, std::byte* out,
              int64_t hidden_size, Store store);

// Makes streamed stores visible before whatever this thread stores next; call it before publishing.
void finish_stores();

// Asks for large pages under a result that is about to be written: a fresh result buffer takes a
// page fault for each page, and with small pages the faults cost more than the copy.
void prefer_large_pages(std::byte* data, int64_t bytes);

// Sets memory of a result buffer to zero. Whole pages of large ranges are given back to the system
// instead of being written, so that the unused end of a large capacity costs neither time nor
// memory.
void zero_fill(std::byte* data, int64_t bytes);

}  // namespace moriep
