"""Vector instructions of integers and bits: one line each, with its meaning."""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import numpy as np

from isa.frame import case
from isa.table_salu import each, first, leading_sign, signed

U8, U16, U32, U64, I32, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int32, np.int64


def wide(x):
    return np.asarray(x).astype(I64)


def low24(x):
    return wide(x) & 0xFFFFFF


def signed24(x):
    return ((wide(x) & 0xFFFFFF) ^ 0x800000) - 0x800000


def wrap(function):
    """Exact in 64 bits; the result's kind cuts it."""
    return lambda *arrays: function(*map(wide, arrays)) & 0xFFFFFFFF


def with_carry(function):
    def call(*arrays):
        exact = function(*map(wide, arrays))
        return exact & 0xFFFFFFFF, (exact < 0) | (exact > 0xFFFFFFFF)

    return call


def saturated(low, high, function):
    return lambda *arrays: np.clip(function(*map(wide, arrays)), low, high)


def bfe_u(a, offset, width):
    return (a >> (offset & 31)) & ((1 << (width & 31)) - 1)


def bfe_i(a, offset, width):
    a, offset, width = signed(a), offset & 31, width & 31
    if width == 0:
        return 0
    field = (a >> offset) & ((1 << width) - 1)
    return signed(field, width) if width + offset < 32 else a >> offset


def perm(a, b, selector):
    """Byte i of the result: of b in 0-3, of a in 4-7, of a word's sign in 8-11, zero or all ones."""
    data = (a << 32) | b
    out = 0
    for i in range(4):
        chosen = (selector >> (8 * i)) & 0xFF
        if chosen <= 7:
            byte = data >> (8 * chosen) & 0xFF
        elif chosen <= 11:
            byte = 0xFF if data >> (16 * (chosen - 8) + 15) & 1 else 0
        else:
            byte = 0 if chosen == 12 else 0xFF
        out |= byte << (8 * i)
    return out


def sad_bytes(a, b, c, masked=False):
    total = c
    for i in range(0, 32, 8):
        x, y = a >> i & 0xFF, b >> i & 0xFF
        total += 0 if masked and y == 0 else abs(x - y)
    return total


def windows(masked):
    """Four sums of differences, of b's bytes with those of a from byte 0, 1, 2 and 3 on, added to c's halves."""

    def one(a, b, c):
        out = 0
        for k in range(4):
            total = sad_bytes(a >> (8 * k) & 0xFFFFFFFF, b, c >> (16 * k) & 0xFFFF, masked)
            out |= (total & 0xFFFF) << (16 * k)
        return out

    return each(one)


def _low_halves(lanes, state):
    """Addends that the sums do not carry beyond 16 bits, for whether they saturate is not said anywhere."""
    lanes[..., 8:10] &= U32(0x7FFF7FFF)


def lerp(a, b, c):
    return sum((((a >> i & 0xFF) + (b >> i & 0xFF) + (c >> i & 1)) >> 1) << i for i in range(0, 32, 8))


def small_selectors(lanes, state):
    rng = np.random.default_rng(3)
    shape = lanes.shape[:2]
    selector = sum(rng.integers(0, 14, shape, dtype=np.uint32) << U32(8 * i) for i in range(4))
    lanes[..., 8] = np.where(rng.random(shape) < 0.8, selector, lanes[..., 8])


def mean3(function):
    return lambda a, b, c: function(np.stack([a, b, c]))


def median(stack):
    return np.sort(stack, axis=0)[1]


def carries():
    """Additions and subtractions whose carry goes to VCC or to a pair of scalar registers."""
    lines = []
    plain = {
        "add": (lambda a, b: a + b, lambda a, b, c: a + b + c),
        "sub": (lambda a, b: a - b, lambda a, b, c: a - b - c),
        "subrev": (lambda a, b: b - a, lambda a, b, c: b - a - c),
    }
    for name, (two, three) in plain.items():
        carried = name.replace("add", "addc").replace("sub", "subb")
        lines += [
            case(f"v_{name}_u32", "u32 u32 -> u32", wrap(two)),
            case(f"v_{name}_co_u32_e32 D, vcc, A, B", "u32 u32 -> u32 vcc", with_carry(two)),
            case(f"v_{name}_co_u32_e64 D, SD2, A, B", "u32 u32 -> u32 SD:mask", with_carry(two)),
            case(f"v_{carried}_co_u32_e32 D, vcc, A, B, vcc", "u32 u32 vcc -> u32 vcc", with_carry(three)),
            case(
                f"v_{carried}_co_u32_e64 D, SD2, A, B, SA2",
                "u32 u32 SA:mask -> u32 SD:mask",
                with_carry(three),
            ),
            case(f"v_{name}_u32_e64 D, A, B clamp", "u32 u32 -> u32", saturated(0, 2**32 - 1, two)),
        ]
    return lines


def mad64(kind, dtype):
    """32 x 32 + 64 bits, with the carry out of the 64th."""

    def call(a, b, c):
        exact = np.vectorize(lambda x, y, z: int(x) * int(y) + int(z), otypes=[object])(a, b, c)
        low, high = (0, 2**64) if dtype == U64 else (-(2**63), 2**63)
        outside = np.vectorize(lambda v: not low <= v < high, otypes=[bool])(exact)
        value = np.vectorize(lambda v: v % 2**64, otypes=[object])(exact).astype(U64)
        return value, outside

    return case(f"v_mad_{kind}64_{kind}32 D2, vcc, A, B, C2", f"{kind}32 {kind}32 {kind}64 -> u64 vcc", call)


def compares():
    order = {
        "f": lambda a, b: np.zeros(a.shape, bool),
        "lt": np.less,
        "eq": np.equal,
        "le": np.less_equal,
        "gt": np.greater,
        "ne": np.not_equal,
        "ge": np.greater_equal,
        "t": lambda a, b: np.ones(a.shape, bool),
    }
    lines = []
    for kind in ("i16", "u16", "i32", "u32", "i64", "u64"):
        w = "2" if "64" in kind else ""
        for name, function in order.items():
            text = f"v_cmp_{name}_{kind}"
            lines.append(case(f"{text}_e32 vcc, A{w}, B{w}", f"{kind} {kind} -> vcc", function))
            lines.append(case(f"{text}_e64 SD2, A{w}, B{w}", f"{kind} {kind} -> SD:mask", function))
            text = f"v_cmpx_{name}_{kind}"
            both = lambda a, b, function=function: (function(a, b),) * 2  # noqa: E731
            lines.append(case(f"{text}_e32 vcc, A{w}, B{w}", f"{kind} {kind} -> vcc exec", both))
    return lines


def two_operands():
    b32, u, i = "u32 u32 -> u32", "u32 u32 -> u32", "i32 i32 -> i32"
    return [
        case("v_and_b32", b32, np.bitwise_and),
        case("v_or_b32", b32, np.bitwise_or),
        case("v_xor_b32", b32, np.bitwise_xor),
        case("v_xnor_b32", b32, lambda a, b: ~(a ^ b)),
        case("v_min_i32", i, np.minimum),
        case("v_max_i32", i, np.maximum),
        case("v_min_u32", u, np.minimum),
        case("v_max_u32", u, np.maximum),
        case("v_lshlrev_b32", u, each(lambda a, b: b << (a & 31), U32)),
        case("v_lshrrev_b32", u, each(lambda a, b: b >> (a & 31), U32)),
        case("v_ashrrev_i32", "u32 i32 -> i32", each(lambda a, b: b >> (a & 31), U32)),
        case("v_lshlrev_b64", "u32 u64 -> u64", each(lambda a, b: b << (a & 63))),
        case("v_lshrrev_b64", "u32 u64 -> u64", each(lambda a, b: b >> (a & 63))),
        case("v_ashrrev_i64", "u32 i64 -> u64", each(lambda a, b: b >> (a & 63))),
        case("v_mul_i32_i24", i, wrap(lambda a, b: signed24(a) * signed24(b))),
        case("v_mul_u32_u24", u, wrap(lambda a, b: low24(a) * low24(b))),
        case("v_mul_hi_i32_i24", i, lambda a, b: (signed24(a) * signed24(b)) >> 32),
        case("v_mul_hi_u32_u24", u, lambda a, b: (low24(a) * low24(b)) >> 32),
        case("v_mul_lo_u32", u, each(lambda a, b: a * b, U32)),
        case("v_mul_lo_i32", i, each(lambda a, b: a * b, U32)),
        case("v_mul_hi_u32", u, each(lambda a, b: (a * b) >> 32, U32)),
        case("v_mul_hi_i32", i, each(lambda a, b: (a * b) >> 32, U32)),
        case("v_add_i32", i, wrap(lambda a, b: a + b)),
        case("v_sub_i32", i, wrap(lambda a, b: a - b)),
        case("v_add_i32 D, A, B clamp", i, saturated(-(2**31), 2**31 - 1, lambda a, b: a + b)),
        case("v_sub_i32 D, A, B clamp", i, saturated(-(2**31), 2**31 - 1, lambda a, b: a - b)),
        case("v_bfm_b32", u, each(lambda a, b: ((1 << (a & 31)) - 1) << (b & 31), U32)),
        case("v_bcnt_u32_b32", u, each(lambda a, b: f"{a:b}".count("1") + b, U32)),
        case("v_mbcnt_lo_u32_b32", u, _mbcnt(0)),
        case("v_mbcnt_hi_u32_b32", u, _mbcnt(32)),
        case(
            "v_pack_b32_f16",
            "u16 u16 -> 2xu16",
            lambda a, b: np.stack([a, b], axis=-1),
            adjust=_no_nan_halves,
        ),
        case("v_cndmask_b32_e32 D, A, B, vcc", "u32 u32 vcc -> u32", lambda a, b, m: np.where(m, b, a)),
        case("v_cndmask_b32_e64 D, A, B, SA2", "u32 u32 SA:mask -> u32", lambda a, b, m: np.where(m, b, a)),
        case("v_cndmask_b32_e64 D, 0, -1, SA2", "SA:mask -> u32", lambda m: np.where(m, 2**32 - 1, 0)),
        case(
            "v_cndmask_b32_e64 D, -A, |B|, SA2",
            "u32 u32 SA:mask -> u32",
            lambda a, b, m: np.where(m, b & U32(0x7FFFFFFF), a ^ U32(0x80000000)),
        ),
        # Scalars, constants and literals as operands.
        case("v_add_u32 D, SA, B", "SA:u32 B:u32 -> u32", wrap(lambda a, b: a + b)),
        case("v_add_u32 D, 0x12345678, B", "B:u32 -> u32", wrap(lambda b: 0x12345678 + b)),
        case("v_sub_u32 D, -16, B", "B:u32 -> u32", wrap(lambda b: -16 - b)),
        case("v_and_b32 D, 1.0, B", "B:u32 -> u32", lambda b: b & U32(0x3F800000)),
        case("v_or_b32 D, vcc_lo, B", "B:u32 vcc -> u32", lambda b, m: b | _low_word(m)),
        case("v_xor_b32 D, m0, B", "B:u32 m0 -> u32", lambda b, m: b ^ m),
        case("v_mov_b32 D, exec_lo", "exec -> u32", lambda m: _low_word(m)),
        case("v_lshlrev_b64 D2, SA, B2", "SA:u32 B:u64 -> u64", each(lambda a, b: b << (a & 63))),
    ]


def _low_word(mask):
    weights = 1 << np.arange(32, dtype=np.uint64)
    return (mask[:, :32] * weights).sum(axis=1, dtype=np.uint64).astype(U32)[:, None]


def _mbcnt(first_lane):
    def call(a, b):
        out = b.copy()
        for lane in range(64):
            below = (1 << min(max(lane - first_lane, 0), 32)) - 1
            out[:, lane] = [
                (bin(int(x) & below).count("1") + int(y)) % 2**32
                for x, y in zip(a[:, lane], b[:, lane], strict=False)
            ]
        return out

    return call


def _no_nan_halves(lanes, state):
    for register in (0, 4):
        lanes[..., register] &= U32(0xFFFFBFFF)


def three_operands():
    u3, i3 = "u32 u32 u32 -> u32", "i32 i32 i32 -> i32"
    return [
        case("v_mad_i32_i24", i3, wrap(lambda a, b, c: signed24(a) * signed24(b) + c)),
        case("v_mad_u32_u24", u3, wrap(lambda a, b, c: low24(a) * low24(b) + c)),
        case("v_bfe_u32", u3, each(bfe_u, U32)),
        case("v_bfe_i32", u3, each(bfe_i, U32)),
        case("v_bfi_b32", u3, lambda a, b, c: (a & b) | (~a & c)),
        case("v_alignbit_b32", u3, each(lambda a, b, c: ((a << 32) | b) >> (c & 31), U32)),
        case("v_alignbyte_b32", u3, each(lambda a, b, c: ((a << 32) | b) >> (8 * (c & 3)), U32)),
        case("v_perm_b32", u3, each(perm, U32), adjust=small_selectors),
        case("v_lerp_u8", u3, each(lerp, U32)),
        case("v_sad_u8", u3, each(sad_bytes, U32)),
        case("v_msad_u8", u3, each(lambda a, b, c: sad_bytes(a, b, c, True), U32)),
        case("v_qsad_pk_u16_u8", "u64 u32 u64 -> u64", windows(False), adjust=_low_halves),
        case("v_mqsad_pk_u16_u8", "u64 u32 u64 -> u64", windows(True), adjust=_low_halves),
        case("v_sad_hi_u8", u3, each(lambda a, b, c: (sad_bytes(a, b, 0) << 16) + c, U32)),
        case(
            "v_sad_u16",
            u3,
            each(lambda a, b, c: abs((a & 0xFFFF) - (b & 0xFFFF)) + abs((a >> 16) - (b >> 16)) + c, U32),
        ),
        case("v_sad_u32", u3, each(lambda a, b, c: abs(a - b) + c, U32)),
        case("v_min3_i32", i3, mean3(lambda s: s.min(axis=0))),
        case("v_max3_i32", i3, mean3(lambda s: s.max(axis=0))),
        case("v_med3_i32", i3, mean3(median)),
        case("v_min3_u32", u3, mean3(lambda s: s.min(axis=0))),
        case("v_max3_u32", u3, mean3(lambda s: s.max(axis=0))),
        case("v_med3_u32", u3, mean3(median)),
        case("v_add3_u32", u3, wrap(lambda a, b, c: a + b + c)),
        case("v_lshl_add_u32", u3, each(lambda a, b, c: (a << (b & 31)) + c, U32)),
        case("v_add_lshl_u32", u3, each(lambda a, b, c: (a + b) << (c & 31), U32)),
        case("v_lshl_or_b32", u3, each(lambda a, b, c: (a << (b & 31)) | c, U32)),
        case("v_and_or_b32", u3, lambda a, b, c: (a & b) | c),
        case("v_or3_b32", u3, lambda a, b, c: a | b | c),
        case("v_xad_u32", u3, each(lambda a, b, c: (a ^ b) + c, U32)),
        case(
            "v_lshl_add_u64",
            "u64 u32 u64 -> u64",
            each(lambda a, b, c: (a << (b & 7)) + c),
            adjust=_shift_to_4,
        ),
        mad64("u", U64),
        mad64("i", I64),
        case("v_mad_u32_u16", "u16 u16 u32 -> u32", wrap(lambda a, b, c: a * b + c)),
        case("v_mad_i32_i16", "i16 i16 i32 -> i32", wrap(lambda a, b, c: a * b + c)),
        case("v_cvt_pk_u8_f32", "f32c u32 u32 -> u32", _pack_byte, adjust=_whole),
    ]


def _shift_to_4(lanes, state):
    lanes[..., 4] %= 5


def _whole(lanes, state):
    """Whole numbers within and about a byte: how others are rounded is not said anywhere."""
    rng = np.random.default_rng(5)
    lanes[..., 0] = rng.integers(-20, 300, lanes.shape[:2]).astype(np.float32).view(U32)


def _pack_byte(a, b, c):
    with np.errstate(all="ignore"):
        value = np.clip(np.nan_to_num(np.trunc(a), nan=0.0), 0, 255).astype(U32)
    place = (b & U32(3)) * U32(8)
    return (c & ~(U32(0xFF) << place)) | (value << place)


def one_operand():
    return [
        case("v_mov_b32", "u32 -> u32", lambda a: a),
        case("v_mov_b64", "u64 -> u64", lambda a: a),
        case("v_mov_b32 D, 0x89abcdef", "-> u32", lambda: np.array([[0x89ABCDEF]])),
        case("v_not_b32", "u32 -> u32", np.invert),
        case("v_bfrev_b32", "u32 -> u32", each(lambda a: int(f"{a:032b}"[::-1], 2), U32)),
        case("v_ffbh_u32", "u32 -> u32", first(32, 1, True)),
        case("v_ffbl_b32", "u32 -> u32", first(32, 1, False)),
        case("v_ffbh_i32", "u32 -> u32", leading_sign(32)),
        case("v_sat_pk_u8_i16", "2xi16 -> u16lo", _saturated_bytes),
        case("v_nop; v_mov_b32 D, A", "u32 -> u32", lambda a: a),
        case("v_swap_b32 A, B; v_lshl_add_u32 D, A, 1, B", "u32 u32 -> u32", wrap(lambda a, b: 2 * b + a)),
    ]


def _saturated_bytes(a):
    low, high = np.clip(a[..., 0], 0, 255), np.clip(a[..., 1], 0, 255)
    return (low.astype(U16)) | (high.astype(U16) << U16(8))


def halves():
    """16-bit integers in the low half; the instruction clears the upper half or, where said, may keep it."""
    u, i = "u16 u16 -> u16", "i16 i16 -> i16"
    u3, i3 = "u16 u16 u16 -> u16lo", "i16 i16 i16 -> i16lo"
    return [
        case("v_add_u16", u, lambda a, b: a + b),
        case("v_sub_u16", u, lambda a, b: a - b),
        case("v_subrev_u16", u, lambda a, b: b - a),
        case("v_mul_lo_u16", u, lambda a, b: a * b),
        case("v_lshlrev_b16", u, each(lambda a, b: b << (a & 15), U16)),
        case("v_lshrrev_b16", u, each(lambda a, b: b >> (a & 15), U16)),
        case("v_ashrrev_i16", "u16 i16 -> i16", each(lambda a, b: b >> (a & 15), U16)),
        case("v_min_u16", u, np.minimum),
        case("v_max_u16", u, np.maximum),
        case("v_min_i16", i, np.minimum),
        case("v_max_i16", i, np.maximum),
        case("v_add_i16", "i16 i16 -> i16lo", lambda a, b: a + b),
        case("v_sub_i16", "i16 i16 -> i16lo", lambda a, b: a - b),
        case("v_add_u16_e64 D, A, B clamp", u, saturated(0, 65535, lambda a, b: a + b)),
        case("v_sub_u16_e64 D, A, B clamp", u, saturated(0, 65535, lambda a, b: a - b)),
        case("v_mad_u16", u3, wrap(lambda a, b, c: a * b + c)),
        case("v_mad_i16", i3, wrap(lambda a, b, c: a * b + c)),
        case("v_mad_legacy_u16", "u16 u16 u16 -> u16", wrap(lambda a, b, c: a * b + c)),
        case("v_mad_legacy_i16", "i16 i16 i16 -> i16", wrap(lambda a, b, c: a * b + c)),
        case("v_min3_i16", i3, mean3(lambda s: s.min(axis=0))),
        case("v_max3_i16", i3, mean3(lambda s: s.max(axis=0))),
        case("v_med3_i16", i3, mean3(median)),
        case("v_min3_u16", u3, mean3(lambda s: s.min(axis=0))),
        case("v_max3_u16", u3, mean3(lambda s: s.max(axis=0))),
        case("v_med3_u16", u3, mean3(median)),
        # Halves that op_sel chooses; the destination's other half stays.
        case(
            "v_mad_u16 D, A, B, C op_sel:[1,0,1,1]",
            "old:2xu16 2xu16 2xu16 2xu16 -> 2xu16",
            lambda old, a, b, c: np.stack([old[..., 0], a[..., 1] * b[..., 0] + c[..., 1]], axis=-1),
        ),
        case(
            "v_mad_u16 D, A, B, C op_sel:[0,1,0,0]",
            "old:2xu16 2xu16 2xu16 2xu16 -> 2xu16",
            lambda old, a, b, c: np.stack([a[..., 0] * b[..., 1] + c[..., 0], old[..., 1]], axis=-1),
        ),
        case(
            "v_mad_u32_u16 D, A, B, C op_sel:[1,0,0,0]",
            "2xu16 2xu16 u32 -> u32",
            lambda a, b, c: wide(a[..., 1]) * wide(b[..., 0]) + wide(c) & 0xFFFFFFFF,
        ),
    ]


CASES = [
    *one_operand(),
    *two_operands(),
    *carries(),
    *three_operands(),
    *halves(),
    *compares(),
]
