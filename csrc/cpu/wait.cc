#include "wait.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace moriep {
namespace {

long futex(const std::atomic<uint32_t>& word, int op, uint32_t value, const timespec* timeout) {
  static_assert(sizeof(word) == sizeof(uint32_t));
  // Not FUTEX_PRIVATE_FLAG: the word lies in memory that several processes share.
  return syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), op, value, timeout, nullptr,
                 0);
}

}  // namespace

void futex_wait_slice(const std::atomic<uint32_t>& word, uint32_t seen) {
  const timespec slice{0, std::chrono::nanoseconds(kSlice).count()};
  futex(word, FUTEX_WAIT, seen, &slice);
}

void futex_wake_all(const std::atomic<uint32_t>& word) {
  futex(word, FUTEX_WAKE, INT_MAX, nullptr);
}

}  // namespace moriep
