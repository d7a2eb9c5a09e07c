"""Scalar instructions: one line each, with its meaning over integers."""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import numpy as np

from isa.frame import case

U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64


def each(function, dtype=np.uint64):
    """A function of Python integers, applied to arrays; its result wraps to `dtype`."""
    modulus = 1 << (np.dtype(dtype).itemsize * 8)

    def one(*values):
        return int(function(*(int(v) for v in values))) % modulus

    def call(*arrays):
        out = np.vectorize(one, otypes=[object])(*arrays)
        return out.astype(f"u{np.dtype(dtype).itemsize}")

    return call


def signed(x, bits=32):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def nonzero(function):
    """A result and SCC, which says whether the result is not zero."""

    def call(*arrays):
        value = function(*arrays)
        return value, value != 0

    return call


def add(signature_bits=32):
    return lambda a, b: (a + b, (a + b) < a)


def overflow(function):
    """A 32-bit signed result and SCC, which says whether it wrapped."""

    def call(a, b):
        exact = function(a.astype(I64), b.astype(I64))
        return exact.astype(I32), exact != exact.astype(I32)

    return call


def carry(function):
    """A 32-bit unsigned result and SCC, set when the exact result does not fit."""

    def call(*arrays):
        exact = function(*(np.asarray(a).astype(I64) for a in arrays))
        return (exact & 0xFFFFFFFF).astype(U32), (exact < 0) | (exact > 0xFFFFFFFF)

    return call


def bitreverse(bits):
    return each(lambda a: int(f"{a:0{bits}b}"[::-1], 2), f"u{bits // 8}")


def first(bits, digit, from_top):
    """The place of the first such bit, counted from its end, or -1."""

    def one(a):
        text = f"{a & ((1 << bits) - 1):0{bits}b}"
        return (text if from_top else text[::-1]).find(str(digit))

    return each(one, U32)


def leading_sign(bits):
    """How many bits from the top repeat the sign, or -1 when all do."""

    def one(a):
        text = f"{a & ((1 << bits) - 1):0{bits}b}"
        return text.find("1" if text[0] == "0" else "0")

    return each(one, U32)


def bfe(bits, is_signed):
    def one(a, field):
        shift_bits = 5 if bits == 32 else 6
        offset, width = field & ((1 << shift_bits) - 1), (field >> 16) & 0x7F
        a = signed(a, bits) if is_signed else a & ((1 << bits) - 1)
        if width == 0:
            return 0
        value = a >> offset
        if width < bits - offset or not is_signed:
            value &= (1 << width) - 1
            if is_signed and value >> (width - 1):
                value -= 1 << width
        return value

    return nonzero(each(one, f"u{bits // 8}"))


def quad(bits):
    def one(a):
        return sum((15 << i) for i in range(0, bits, 4) if (a >> i) & 15)

    return nonzero(each(one, f"u{bits // 8}"))


def wqm_mask(mask):
    return quad(64)(mask)[0]


def saveexec(function):
    """The old EXEC, the new one and SCC."""

    def call(a, mask):
        new = function(a, mask)
        return mask, new, new != 0

    return call


def bit_copied(bits, value):
    def one(old, a):
        place = 1 << (a % bits)
        return old | place if value else old & ~place

    return each(one, f"u{bits // 8}")


def scalar(text, signature, oracle, **options):
    return case(text, signature, oracle, scalar=True, **options)


def s_both(name, oracle, flags=" scc"):
    """An instruction of bits in its 32- and 64-bit forms."""
    return [
        scalar(f"{name}_b32", f"u32 u32 -> u32{flags}", oracle),
        scalar(f"{name}_b64", f"u64 u64 -> u64{flags}", oracle),
    ]


def s_saveexec(name, function):
    return scalar(f"s_{name}_saveexec_b64 SD2, SA2", "SA:u64 exec -> SD:u64 exec scc", saveexec(function))


def s_wrexec(name, function):
    def call(a, mask):
        new = function(a, mask)
        return new, new, new != 0

    return scalar(f"s_{name}_wrexec_b64 SD2, SA2", "SA:u64 exec -> SD:u64 exec scc", call)


def compare(name, kind, function):
    return scalar(f"s_cmp_{name}_{kind} SA, SB", f"{kind} {kind} -> scc", function)


def comparek(name, kind, function, constant):
    return scalar(f"s_cmpk_{name}_{kind} SA, {constant}", f"{kind} -> scc", lambda a: function(a, constant))


ORDER = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}


def branch(name, signature, taken):
    """The destination tells which way was taken."""
    label = f".Lt_{name}"
    text = f"{name} {label}; s_mov_b32 SD, 2; {label}:"
    return scalar(
        text, f"old:u32 {signature}".strip() + " -> SD:u32", lambda old, *f: np.where(taken(*f), old, 2)
    )


def pack(low, high):
    return lambda a, b: ((a >> U32(low)) & U32(0xFFFF)) | (((b >> U32(high)) & U32(0xFFFF)) << U32(16))


def sop2():
    lines = [
        scalar("s_add_u32", "u32 u32 -> u32 scc", carry(lambda a, b: a + b)),
        scalar("s_sub_u32", "u32 u32 -> u32 scc", carry(lambda a, b: a - b)),
        scalar("s_add_i32", "i32 i32 -> i32 scc", overflow(lambda a, b: a + b)),
        scalar("s_sub_i32", "i32 i32 -> i32 scc", overflow(lambda a, b: a - b)),
        scalar("s_addc_u32", "u32 u32 scc -> u32 scc", carry(lambda a, b, c: a + b + c)),
        scalar("s_subb_u32", "u32 u32 scc -> u32 scc", carry(lambda a, b, c: a - b - c)),
        scalar("s_min_i32", "i32 i32 -> i32 scc", lambda a, b: (np.minimum(a, b), a < b)),
        scalar("s_min_u32", "u32 u32 -> u32 scc", lambda a, b: (np.minimum(a, b), a < b)),
        scalar("s_max_i32", "i32 i32 -> i32 scc", lambda a, b: (np.maximum(a, b), a > b)),
        scalar("s_max_u32", "u32 u32 -> u32 scc", lambda a, b: (np.maximum(a, b), a > b)),
        scalar("s_cselect_b32", "u32 u32 scc -> u32", lambda a, b, c: np.where(c, a, b)),
        scalar("s_cselect_b64", "u64 u64 scc -> u64", lambda a, b, c: np.where(c, a, b)),
        *s_both("s_and", nonzero(np.bitwise_and)),
        *s_both("s_or", nonzero(np.bitwise_or)),
        *s_both("s_xor", nonzero(np.bitwise_xor)),
        *s_both("s_andn2", nonzero(lambda a, b: a & ~b)),
        *s_both("s_orn2", nonzero(lambda a, b: a | ~b)),
        *s_both("s_nand", nonzero(lambda a, b: ~(a & b))),
        *s_both("s_nor", nonzero(lambda a, b: ~(a | b))),
        *s_both("s_xnor", nonzero(lambda a, b: ~(a ^ b))),
        scalar("s_lshl_b32", "u32 u32 -> u32 scc", nonzero(each(lambda a, b: a << (b & 31), U32))),
        scalar("s_lshl_b64", "u64 u32 -> u64 scc", nonzero(each(lambda a, b: a << (b & 63)))),
        scalar("s_lshr_b32", "u32 u32 -> u32 scc", nonzero(each(lambda a, b: a >> (b & 31), U32))),
        scalar("s_lshr_b64", "u64 u32 -> u64 scc", nonzero(each(lambda a, b: a >> (b & 63)))),
        scalar("s_ashr_i32", "i32 u32 -> u32 scc", nonzero(each(lambda a, b: a >> (b & 31), U32))),
        scalar("s_ashr_i64", "i64 u32 -> u64 scc", nonzero(each(lambda a, b: a >> (b & 63)))),
        scalar("s_bfm_b32", "u32 u32 -> u32", each(lambda a, b: ((1 << (a & 31)) - 1) << (b & 31), U32)),
        scalar("s_bfm_b64", "u32 u32 -> u64", each(lambda a, b: ((1 << (a & 63)) - 1) << (b & 63))),
        scalar("s_mul_i32", "u32 u32 -> u32", each(lambda a, b: a * b, U32)),
        scalar("s_mul_hi_u32", "u32 u32 -> u32", each(lambda a, b: (a * b) >> 32, U32)),
        scalar("s_mul_hi_i32", "i32 i32 -> u32", each(lambda a, b: (a * b) >> 32, U32)),
        scalar("s_bfe_u32", "u32 u32 -> u32 scc", bfe(32, False), adjust=_fields(1)),
        scalar("s_bfe_i32", "u32 u32 -> u32 scc", bfe(32, True), adjust=_fields(1)),
        scalar("s_bfe_u64", "u64 u32 -> u64 scc", bfe(64, False), adjust=_fields(1)),
        scalar("s_bfe_i64", "u64 u32 -> u64 scc", bfe(64, True), adjust=_fields(1)),
        scalar("s_absdiff_i32", "i32 i32 -> u32 scc", nonzero(each(lambda a, b: abs(signed(a - b)), U32))),
        scalar("s_pack_ll_b32_b16", "u32 u32 -> u32", pack(0, 0)),
        scalar("s_pack_lh_b32_b16", "u32 u32 -> u32", pack(0, 16)),
        scalar("s_pack_hh_b32_b16", "u32 u32 -> u32", pack(16, 16)),
        scalar("s_add_u32 SD, SA, 0x12345678", "u32 -> u32 scc", carry(lambda a: a + 0x12345678)),
        scalar("s_and_b64 SD2, SA2, -16", "u64 -> u64 scc", nonzero(lambda a: a & U64(2**64 - 16))),
        scalar("s_sub_u32 SD, 64, SA", "u32 -> u32 scc", carry(lambda a: 64 - a)),
        scalar("s_or_b32 SD, SA, 0.5", "u32 -> u32 scc", nonzero(lambda a: a | U32(0x3F000000))),
    ]
    for n in range(1, 5):
        oracle = carry(lambda a, b, n=n: (a << n) + b)
        lines.append(scalar(f"s_lshl{n}_add_u32", "u32 u32 -> u32 scc", oracle))
    return lines


def _fields(operand):
    """Small offsets and widths in the field operand, where all-random words seldom have any."""

    def adjust(lanes, state):
        rng = np.random.default_rng(7)
        words = state[:, 4 * operand]
        words[:] = rng.integers(0, 70, len(words)) | (rng.integers(0, 128, len(words)) << 16)

    return adjust


def sop1():
    return [
        scalar("s_mov_b32", "u32 -> u32", lambda a: a),
        scalar("s_mov_b64", "u64 -> u64", lambda a: a),
        scalar("s_cmov_b32", "old:u32 u32 scc -> u32", lambda old, a, c: np.where(c, a, old)),
        scalar("s_cmov_b64", "old:u64 u64 scc -> u64", lambda old, a, c: np.where(c, a, old)),
        scalar("s_not_b32", "u32 -> u32 scc", nonzero(np.invert)),
        scalar("s_not_b64", "u64 -> u64 scc", nonzero(np.invert)),
        scalar("s_wqm_b32", "u32 -> u32 scc", quad(32)),
        scalar("s_wqm_b64", "u64 -> u64 scc", quad(64)),
        scalar("s_brev_b32", "u32 -> u32", bitreverse(32)),
        scalar("s_brev_b64", "u64 -> u64", bitreverse(64)),
        scalar("s_bcnt0_i32_b32", "u32 -> u32 scc", nonzero(each(lambda a: f"{a:032b}".count("0"), U32))),
        scalar("s_bcnt0_i32_b64", "u64 -> u32 scc", nonzero(each(lambda a: f"{a:064b}".count("0"), U32))),
        scalar("s_bcnt1_i32_b32", "u32 -> u32 scc", nonzero(each(lambda a: f"{a:b}".count("1"), U32))),
        scalar("s_bcnt1_i32_b64", "u64 -> u32 scc", nonzero(each(lambda a: f"{a:b}".count("1"), U32))),
        scalar("s_ff0_i32_b32", "u32 -> u32", first(32, 0, False)),
        scalar("s_ff0_i32_b64", "u64 -> u32", first(64, 0, False)),
        scalar("s_ff1_i32_b32", "u32 -> u32", first(32, 1, False)),
        scalar("s_ff1_i32_b64", "u64 -> u32", first(64, 1, False)),
        scalar("s_flbit_i32_b32", "u32 -> u32", first(32, 1, True)),
        scalar("s_flbit_i32_b64", "u64 -> u32", first(64, 1, True)),
        scalar("s_flbit_i32", "u32 -> u32", leading_sign(32)),
        scalar("s_flbit_i32_i64", "u64 -> u32", leading_sign(64)),
        scalar("s_sext_i32_i8", "u32 -> u32", each(lambda a: signed(a, 8), U32)),
        scalar("s_sext_i32_i16", "u32 -> u32", each(lambda a: signed(a, 16), U32)),
        scalar("s_bitset0_b32", "old:u32 u32 -> u32", bit_copied(32, 0)),
        scalar("s_bitset1_b32", "old:u32 u32 -> u32", bit_copied(32, 1)),
        scalar("s_bitset0_b64", "old:u64 u32 -> u64", bit_copied(64, 0)),
        scalar("s_bitset1_b64", "old:u64 u32 -> u64", bit_copied(64, 1)),
        scalar("s_abs_i32", "i32 -> u32 scc", nonzero(each(abs, U32))),
        scalar("s_quadmask_b32", "u32 -> u32 scc", nonzero(each(_quadmask, U32))),
        scalar("s_quadmask_b64", "u64 -> u64 scc", nonzero(each(_quadmask))),
        scalar(
            "s_bitreplicate_b64_b32", "u32 -> u64", each(lambda a: int("".join(d * 2 for d in f"{a:b}"), 2))
        ),
        s_saveexec("and", lambda a, e: a & e),
        s_saveexec("or", lambda a, e: a | e),
        s_saveexec("xor", lambda a, e: a ^ e),
        s_saveexec("andn2", lambda a, e: a & ~e),
        s_saveexec("orn2", lambda a, e: a | ~e),
        s_saveexec("nand", lambda a, e: ~(a & e)),
        s_saveexec("nor", lambda a, e: ~(a | e)),
        s_saveexec("xnor", lambda a, e: ~(a ^ e)),
        s_saveexec("andn1", lambda a, e: ~a & e),
        s_saveexec("orn1", lambda a, e: ~a | e),
        s_wrexec("andn1", lambda a, e: ~a & e),
        s_wrexec("andn2", lambda a, e: a & ~e),
        scalar("s_mov_b64 exec, SA2", "u64 -> exec", lambda a: a),
        scalar("s_mov_b32 m0, SA", "u32 -> m0", lambda a: a),
        scalar(
            "s_mov_b32 vcc_hi, SA",
            "u32 vcc -> vcc",
            lambda a, v: (v & U64(2**32 - 1)) | (a.astype(U64) << U64(32)),
        ),
        # The address of the next instruction, twice: the instructions between take 4 bytes each.
        scalar(
            "s_getpc_b64 SD2; s_getpc_b64 vcc; s_sub_u32 SD, vcc_lo, SD; s_mov_b32 s33, 0; s_mov_b64 vcc, 0",
            "-> SD:u64 vcc scc",
            lambda: (np.array([[4]]), np.array([[0]], U64), np.array([[False]])),
        ),
        # A call over an instruction that would spoil the destination, which is where to return to.
        scalar(
            "s_getpc_b64 vcc; s_add_u32 vcc_lo, vcc_lo, 16; s_addc_u32 vcc_hi, vcc_hi, 0; s_swappc_b64 SD2, vcc;"
            " s_mov_b32 vcc_lo, 0; s_sub_u32 SD, vcc_lo, SD; s_mov_b32 s33, 0; s_mov_b64 vcc, 0; s_cmp_eq_u32 0, 0",
            "-> SD:u64 vcc scc",
            lambda: (np.array([[4]], U64), np.array([[0]], U64), np.array([[True]])),
        ),
        scalar(
            "s_getpc_b64 vcc; s_add_u32 vcc_lo, vcc_lo, 16; s_addc_u32 vcc_hi, vcc_hi, 0; s_setpc_b64 vcc;"
            " s_mov_b32 SD, 1; s_mov_b64 vcc, 0; s_cmp_eq_u32 0, 0",
            "old:u32 -> SD:u32 vcc scc",
            lambda old: (old, np.array([[0]], U64), np.array([[True]])),
        ),
        scalar(
            "s_call_b64 vcc, .Lcall; s_mov_b32 SD, 1; .Lcall:; s_mov_b64 vcc, 0",
            "old:u32 -> SD:u32 vcc",
            lambda old: (old, np.array([[0]], U64)),
        ),
    ]


def _quadmask(a):
    return sum(1 << (i // 4) for i in range(0, 64, 4) if (a >> i) & 15)


def sopc_sopk_sopp():
    lines = []
    for name, function in ORDER.items():
        lines.append(compare(name, "i32", function))
        lines.append(compare(name, "u32", function))
        lines.append(comparek(name, "i32", function, -5))
        lines.append(comparek(name, "u32", function, 65530 if name == "lt" else 33))
    return [
        *lines,
        scalar("s_cmp_eq_u64 SA2, SB2", "u64 u64 -> scc", np.equal),
        scalar("s_cmp_lg_u64 SA2, SB2", "u64 u64 -> scc", np.not_equal),
        scalar("s_bitcmp0_b32 SA, SB", "u32 u32 -> scc", each(lambda a, b: 1 - (a >> (b & 31) & 1))),
        scalar("s_bitcmp1_b32 SA, SB", "u32 u32 -> scc", each(lambda a, b: a >> (b & 31) & 1)),
        scalar("s_bitcmp0_b64 SA2, SB", "u64 u32 -> scc", each(lambda a, b: 1 - (a >> (b & 63) & 1))),
        scalar("s_bitcmp1_b64 SA2, SB", "u64 u32 -> scc", each(lambda a, b: a >> (b & 63) & 1)),
        scalar("s_movk_i32 SD, -3", "-> SD:i32", lambda: np.array([[-3]])),
        scalar("s_cmovk_i32 SD, -3", "old:i32 scc -> SD:i32", lambda old, c: np.where(c, -3, old)),
        scalar("s_addk_i32 SD, -300", "old:i32 -> SD:i32 scc", lambda old: overflow(np.add)(old, I32(-300))),
        scalar("s_mulk_i32 SD, -300", "old:i32 -> SD:u32", each(lambda old: old * -300, U32)),
        # The size of an instruction does not matter to what is skipped.
        branch("s_branch", "", lambda: True),
        branch("s_cbranch_scc0", "scc", lambda c: ~c),
        branch("s_cbranch_scc1", "scc", lambda c: c),
        branch("s_cbranch_vccz", "vcc", lambda m: m == 0),
        branch("s_cbranch_vccnz", "vcc", lambda m: m != 0),
        branch("s_cbranch_execz", "exec", lambda m: m == 0),
        branch("s_cbranch_execnz", "exec", lambda m: m != 0),
        # Backwards: the sum 10 + 9 + ... + 1.
        scalar(
            "s_mov_b32 SD, 0; s_mov_b32 s33, 10; .Lloop:; s_add_u32 SD, SD, s33; s_sub_u32 s33, s33, 1;"
            " s_cmp_lg_u32 s33, 0; s_cbranch_scc1 .Lloop",
            "-> SD:u64 scc",
            lambda: (np.array([[55]], U64), np.array([[False]])),
        ),
        scalar("s_nop 3; s_waitcnt vmcnt(0); s_sleep 1; s_setprio 2", "old:u32 -> SD:u32", lambda old: old),
        # What tells others something, or sets what a program cannot see, changes no register.
        *(
            scalar(f"s_nop 0; {text}", "old:u32 -> SD:u32", lambda old: old)
            for text in (
                "s_icache_inv",
                "s_dcache_inv",
                "s_dcache_inv_vol",
                "s_dcache_wb",
                "s_dcache_wb_vol",
                "s_sethalt 0",
                "s_wakeup",
                "s_ttracedata",
                "s_incperflevel 1",
                "s_decperflevel 1",
                "s_setkill 0",
                "s_barrier",
                "s_sendmsg sendmsg(MSG_INTERRUPT)",
            )
        ),
        # A rise of the clocks between two readings.
        *(
            scalar(
                f"{name} SD2; s_waitcnt lgkmcnt(0); {name} vcc; s_waitcnt lgkmcnt(0); s_sub_u32 SD, vcc_lo, SD;"
                " s_subb_u32 s33, vcc_hi, s33; s_mov_b64 vcc, 0; s_cmp_ge_i32 s33, 0; s_mov_b64 SD2, 0",
                "-> SD:u64 vcc scc",
                lambda: (np.array([[0]], U64), np.array([[0]], U64), np.array([[True]])),
            )
            for name in ("s_memtime", "s_memrealtime")
        ),
        # The rounding mode, written and read: bits 0 to 3 of MODE.
        scalar(
            "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 6; s_getreg_b32 SD, hwreg(HW_REG_MODE, 0, 4);"
            " s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 0",
            "-> SD:u32",
            lambda: np.array([[6]]),
        ),
        scalar(
            "s_and_b32 vcc_lo, SA, 15; s_setreg_b32 hwreg(HW_REG_MODE, 0, 4), vcc_lo;"
            " s_getreg_b32 SD, hwreg(HW_REG_MODE, 0, 4); s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 0;"
            " s_mov_b64 vcc, 0; s_cmp_eq_u32 0, 0",
            "u32 -> SD:u32 vcc scc",
            lambda a: (a & U32(15), np.zeros_like(a, U64), True),
        ),
    ]


def relative():
    """Register numbers that M0 displaces."""

    def few(lanes, state):
        state[:, 21] %= 3

    def few_even(lanes, state):
        state[:, 21] = 2 * (state[:, 21] % 2)

    def moved(old, a, m0):
        words = old.copy()
        for wave in range(len(words)):
            words[wave, 0, m0[wave, 0]] = a[wave, 0]
        return words

    def moved_pair(old, a, m0):
        words = old.copy()
        for wave in range(len(words)):
            words[wave, 0, m0[wave, 0] // 2] = a[wave, 0]
        return words

    return [
        scalar(
            "s_movrels_b32 SD, SA",
            "SA:4xu32 m0 -> SD:u32",
            lambda a, m0: np.take_along_axis(a, m0[..., None].astype(int), axis=-1)[..., 0],
            adjust=few,
        ),
        scalar(
            "s_movrels_b64 SD2, SA2",
            "SA:2xu64 m0 -> SD:u64",
            lambda a, m0: np.take_along_axis(a, m0[..., None].astype(int) // 2, axis=-1)[..., 0],
            adjust=few_even,
        ),
        scalar("s_movreld_b64 SD2, SA2", "old:2xu64 SA:u64 m0 -> SD:2xu64", moved_pair, adjust=few_even),
        scalar("s_movreld_b32 SD, SA", "old:4xu32 SA:u32 m0 -> SD:4xu32", moved, adjust=few),
    ]


CASES = [*sop2(), *sop1(), *sopc_sopk_sopp(), *relative()]
