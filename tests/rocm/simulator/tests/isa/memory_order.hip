// Kernels that pass messages between workgroups, right and with the faults that real programs had.
#include "random_lanes.h"

#define RELAXED_LOAD(p) __hip_atomic_load(p, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT)
#define RELAXED_STORE(p, v) __hip_atomic_store(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT)

constexpr u32 kWriters = 7;

struct Message {
  u32 arrived;
  u32 ready;
  u32 spare[62];
  u32 data[kWriters][64];
};

// Workgroups 0 to 6 write a row each and the last of them announces all rows; workgroup 7 reads them.
template <bool release_of_each, bool acquire>
static __attribute__((device)) void pass(Message* m, u32* out) {
  const u32 lane = __builtin_amdgcn_workitem_id_x();
  const u32 group = __builtin_amdgcn_workgroup_id_x();
  if (group < kWriters) {
    m->data[group][lane] = 100 * group + lane + 1;
    if (release_of_each) __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent");
    if (lane == 0) {
      const u32 before = __hip_atomic_fetch_add(&m->arrived, 1u, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
      if (before == kWriters - 1) {
        __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "agent");
        RELAXED_STORE(&m->ready, 1u);
      }
    }
    return;
  }
  // The reader has looked before: its die keeps what it saw.
  u32 early = 0;
  for (u32 row = 0; row < kWriters; ++row) early |= m->data[row][lane];
  out[kWriters * 64 + lane] = early;
  while (RELAXED_LOAD(&m->ready) == 0) __builtin_amdgcn_s_sleep(1);
  if (acquire) __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent");
  asm volatile("" ::: "memory");
  for (u32 row = 0; row < kWriters; ++row) out[row * 64 + lane] = m->data[row][lane];
}

#define KERNEL(name, release_of_each, acquire)                                            \
  extern "C" __attribute__((global)) __attribute__((amdgpu_flat_work_group_size(64, 64))) \
  void name(Message* m, u32* out) {                                                       \
    pass<release_of_each, acquire>(m, out);                                               \
  }

KERNEL(right, true, true)
KERNEL(without_each_release, false, true)
KERNEL(without_acquire, true, false)
