// What random kernels are written in, for the GPU and, lane by lane, for the host: the same source.
//
// A kernel is a sequence of steps. EACH(...) runs statements of one lane, whose variables are
// members of L; the other steps exchange values between lanes, where all lanes of the block take
// part. On the host a step is done for all lanes before the next one begins.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;
typedef float f32;
typedef double f64;
typedef _Float16 f16;
typedef f16 f16x2 __attribute__((ext_vector_type(2)));
typedef u16 u16x2 __attribute__((ext_vector_type(2)));
typedef f32 f32x2 __attribute__((ext_vector_type(2)));

#if defined(__AMDGCN__)
#define DEVICE static __attribute__((device))
#define CALLED static __attribute__((device)) __attribute__((noinline))
#define GLOBAL_KERNEL(name, threads)                                  \
  extern "C" __attribute__((global))                                  \
  __attribute__((amdgpu_flat_work_group_size(threads, threads))) void \
  name(const u32* in, u64* out, u64* counters)
#define BEGIN(Lane, threads)                           \
  Lane L;                                              \
  __builtin_memset(&L, 0, sizeof(L));                  \
  const u32 block = __builtin_amdgcn_workgroup_id_x(); \
  L.tid = __builtin_amdgcn_workitem_id_x();            \
  L.gid = block * threads + L.tid;
#define END
#define EACH(...) {__VA_ARGS__}
#define BARRIER                                          \
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup"); \
  __builtin_amdgcn_s_barrier();                          \
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#define SHARED(type, name, count) static __attribute__((shared)) type name[count]
#define SHUFFLE(to, from, lane) \
  L.to = (u32)__builtin_amdgcn_ds_bpermute((int)(((lane) & 63) << 2), (int)L.from);
#define SHUFFLE64(to, from, lane)                                                     \
  {                                                                                   \
    const int at = (int)(((lane) & 63) << 2);                                         \
    const u32 low = (u32)__builtin_amdgcn_ds_bpermute(at, (int)(u32)L.from);          \
    const u32 high = (u32)__builtin_amdgcn_ds_bpermute(at, (int)(u32)(L.from >> 32)); \
    L.to = (u64)high << 32 | low;                                                     \
  }
#define BALLOT(to, condition) L.to = __builtin_amdgcn_ballot_w64(condition);
#define FIRST(to, from) L.to = (u32)__builtin_amdgcn_readfirstlane((int)L.from);
#define ROTATE_ROW(to, from, by) \
  L.to = (u32)__builtin_amdgcn_update_dpp(0, (int)L.from, 0x120 + (by), 0xf, 0xf, false);
#define SHIFT_ROW(to, from, by) \
  L.to = (u32)__builtin_amdgcn_update_dpp((int)L.to, (int)L.from, 0x110 + (by), 0xf, 0xf, false);
#define REVERSE_ROW(to, from) \
  L.to = (u32)__builtin_amdgcn_update_dpp(0, (int)L.from, 0x140, 0xf, 0xf, false);
#define QUAD(to, from, a, b, c, d)                                                              \
  L.to = (u32)__builtin_amdgcn_update_dpp(0, (int)L.from, (a) | (b) << 2 | (c) << 4 | (d) << 6, \
                                          0xf, 0xf, false);
#define SWIZZLE(to, from, flip) \
  L.to = (u32)__builtin_amdgcn_ds_swizzle((int)L.from, 0x1f | (flip) << 10);
#define ATOMIC(op, pointer, value) \
  (void)__hip_atomic_##op(pointer, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT)
#else
#define DEVICE static inline
#define CALLED static __attribute__((noinline))
#define GLOBAL_KERNEL(name, threads) \
  extern "C" void name(u32 block, const u32* in, u64* out, u64* counters)
#define BEGIN(Lane, threads)                 \
  static Lane lanes[threads];                \
  static Lane before[threads];               \
  const u32 num_lanes = threads;             \
  __builtin_memset(lanes, 0, sizeof(lanes)); \
  for (u32 t = 0; t < num_lanes; ++t) {      \
    lanes[t].tid = t;                        \
    lanes[t].gid = block * threads + t;      \
  }
#define END
#define EACH(...)                       \
  for (u32 t = 0; t < num_lanes; ++t) { \
    auto& L = lanes[t];                 \
    __VA_ARGS__                         \
  }
#define BARRIER
#define SHARED(type, name, count) static type name[count]
// `before` holds all lanes as they were, for a step that reads other lanes.
#define EXCHANGE(to, value)                       \
  __builtin_memcpy(before, lanes, sizeof(lanes)); \
  for (u32 t = 0; t < num_lanes; ++t) {           \
    auto& L = lanes[t];                           \
    const u32 row = t & ~15u, wave = t & ~63u;    \
    (void)row, (void)wave;                        \
    L.to = value;                                 \
  }
#define SHUFFLE(to, from, lane) EXCHANGE(to, before[wave | ((lane) & 63)].from)
#define SHUFFLE64(to, from, lane) SHUFFLE(to, from, lane)
#define BALLOT(to, condition)                                  \
  for (u32 wave = 0; wave < num_lanes; wave += 64) {           \
    u64 mask = 0;                                              \
    for (u32 t = wave; t < wave + 64; ++t) {                   \
      auto& L = lanes[t];                                      \
      mask |= (u64)((condition) ? 1 : 0) << (t - wave);        \
    }                                                          \
    for (u32 t = wave; t < wave + 64; ++t) lanes[t].to = mask; \
  }
#define FIRST(to, from) EXCHANGE(to, before[wave].from)
#define ROTATE_ROW(to, from, by) EXCHANGE(to, before[row | ((t - (by)) & 15)].from)
#define SHIFT_ROW(to, from, by) EXCHANGE(to, (t & 15) >= (by) ? before[t - (by)].from : L.to)
#define REVERSE_ROW(to, from) EXCHANGE(to, before[row | (15 - (t & 15))].from)
#define QUAD(to, from, a, b, c, d)                        \
  EXCHANGE(to, before[(t & ~3u) | ((t & 3) == 0   ? (a)   \
                                   : (t & 3) == 1 ? (b)   \
                                   : (t & 3) == 2 ? (c)   \
                                                  : (d))] \
                   .from)
#define SWIZZLE(to, from, flip) EXCHANGE(to, before[t ^ (flip)].from)
#define fetch_add(p, v) (*(p) += (v))
#define fetch_or(p, v) (*(p) |= (v))
#define fetch_and(p, v) (*(p) &= (v))
#define fetch_xor(p, v) (*(p) ^= (v))
#define fetch_max(p, v) (*(p) = *(p) > (v) ? *(p) : (v))
#define fetch_min(p, v) (*(p) = *(p) < (v) ? *(p) : (v))
#define ATOMIC(op, pointer, value) (void)op(pointer, value)
#endif

// Every operation is defined for every operand: shifts and divisors are limited, conversions keep
// to the range.
DEVICE u32 rotl(u32 a, u32 b) { return __builtin_rotateleft32(a, b & 31); }
// The top bit is cleared because clang 19 for AMDGPU takes the operands of an unsigned division for
// small ones where they are sign-extended, and divides fewer bits than they have.
DEVICE u32 half(u32 a) { return a & 0x7fffffffu; }
DEVICE u64 half(u64 a) { return a & 0x7fffffffffffffffull; }
DEVICE u32 div_u32(u32 a, u32 b) { return half(a) / half(b | 1); }
DEVICE u32 rem_u32(u32 a, u32 b) { return half(a) % half(b | 1); }
DEVICE u64 div_u64(u64 a, u64 b) { return half(a) / half(b | 1); }
DEVICE u64 rem_u64(u64 a, u64 b) { return half(a) % half(b | 1); }
DEVICE u32 div_i32(u32 a, u32 b) { return (u32)((i32)a / (i32)((b & 0xffff) + 1)); }
DEVICE u64 div_i64(u64 a, u64 b) { return (u64)((i64)a / (i64)((b & 0xffffffff) + 1)); }
DEVICE u32 sra(u32 a, u32 b) { return (u32)((i32)a >> (b & 31)); }
DEVICE u64 sra64(u64 a, u64 b) { return (u64)((i64)a >> (b & 63)); }
DEVICE u32 clz(u32 a) { return (u32)__builtin_clz(a | 1); }
DEVICE u32 ctz(u32 a) { return (u32)__builtin_ctz(a | 0x80000000u); }
DEVICE u32 popcount(u32 a) { return (u32)__builtin_popcount(a); }
DEVICE u32 popcount64(u64 a) { return (u32)__builtin_popcountll(a); }
DEVICE u32 reverse(u32 a) { return __builtin_bitreverse32(a); }
DEVICE u64 mulhi(u64 a, u64 b) { return (u64)(((unsigned __int128)a * b) >> 64); }
DEVICE u32 to_u32(f32 a) { return a >= 0 && a < 4e9f ? (u32)a : 7u; }
DEVICE u32 to_i32(f32 a) { return a > -2e9f && a < 2e9f ? (u32)(i32)a : 9u; }
DEVICE u32 to_i32d(f64 a) { return a > -2e9 && a < 2e9 ? (u32)(i32)a : 11u; }
DEVICE u64 to_i64(f64 a) { return a > -9e18 && a < 9e18 ? (u64)(i64)a : 13u; }
DEVICE u64 to_u64f(f32 a) { return a >= 0 && a < 1.8e19f ? (u64)a : 15u; }
// A NaN's bits are the processor's choice; all become the same one.
DEVICE u32 bits(f32 a) { return a != a ? 0x7fc00000u : __builtin_bit_cast(u32, a); }
DEVICE u64 bits(f64 a) { return a != a ? 0x7ff8000000000000ull : __builtin_bit_cast(u64, a); }
DEVICE u32 bits(f16 a) { return a != a ? 0x7e00u : (u32) __builtin_bit_cast(u16, a); }
// Numbers of moderate size out of bits, so that arithmetic does not only meet infinities.
DEVICE f32 to_f32(u32 a) { return __builtin_bit_cast(f32, (a & 0x8fffffffu) | 0x38000000u); }
DEVICE f64 to_f64(u64 a) {
  return __builtin_bit_cast(f64, (a & 0x80ffffffffffffffull) | 0x3f00000000000000ull);
}
DEVICE f16 to_f16(u32 a) { return __builtin_bit_cast(f16, (u16)((a & 0x8fffu) | 0x3000u)); }
