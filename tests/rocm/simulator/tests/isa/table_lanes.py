"""What reads other lanes, or parts of registers: DPP, SDWA, and lanes to and from scalar registers."""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import numpy as np

from isa.exact import quiet
from isa.frame import case

F16, F32 = np.float16, np.float32
U8, U16, U32 = np.uint8, np.uint16, np.uint32
LANE = np.arange(64)
ROW, IN_ROW = LANE // 16 * 16, LANE % 16
NOWHERE = -1


def within(row_start, place, size):
    return np.where((place >= 0) & (place < size), row_start + place, NOWHERE)


def controls():
    """DPP control -> the lane that each lane reads."""
    table = {
        "quad_perm:[0,1,2,3]": LANE,
        "quad_perm:[3,1,0,2]": LANE // 4 * 4 + np.array([3, 1, 0, 2])[LANE % 4],
        "quad_perm:[1,1,1,1]": LANE // 4 * 4 + 1,
        "row_mirror": ROW + 15 - IN_ROW,
        "row_half_mirror": LANE // 8 * 8 + 7 - LANE % 8,
        "wave_shl:1": within(0, LANE + 1, 64),
        "wave_shr:1": within(0, LANE - 1, 64),
        "wave_rol:1": (LANE + 1) % 64,
        "wave_ror:1": (LANE - 1) % 64,
        "row_bcast:15": np.where(LANE >= 16, ROW - 1, NOWHERE),
        "row_bcast:31": np.where(LANE >= 32, 31, NOWHERE),
    }
    for n in range(1, 16):
        table[f"row_shl:{n}"] = within(ROW, IN_ROW + n, 16)
        table[f"row_shr:{n}"] = within(ROW, IN_ROW - n, 16)
        table[f"row_ror:{n}"] = ROW + (IN_ROW - n) % 16
    for n in range(16):
        table[f"row_newbcast:{n}"] = ROW + n
    return table


def fetched(a, source, active, zero_fill):
    """What each lane reads, and whether it may write: a source lane must exist and be active."""
    readable = np.broadcast_to((source >= 0) & active[:, source], active.shape)
    value = np.where(readable, a[:, source], np.zeros_like(a))
    return value, readable | zero_fill


def moved(source, row_mask=15, bank_mask=15, zero_fill=False, function=lambda a, old: a):
    enabled = (row_mask >> (LANE // 16) & 1 != 0) & (bank_mask >> (LANE // 4 % 4) & 1 != 0)

    def call(old, a, active):
        value, writes = fetched(a, source, active, zero_fill)
        return np.where(writes & enabled, function(value, old), old)

    return call


def dpp():
    lines = []
    for control, source in controls().items():
        text = f"v_mov_b32_dpp D, A {control} row_mask:0xf bank_mask:0xf"
        lines.append(case(text, "old:u32 u32 exec -> D:u32", moved(source)))
        lines.append(case(text + " bound_ctrl:0", "old:u32 u32 exec -> D:u32", moved(source, zero_fill=True)))
    source = controls()["row_shr:3"]
    for row_mask, bank_mask in ((0x5, 0xF), (0xF, 0x6), (0xA, 0x9), (0x0, 0xF)):
        text = f"v_mov_b32_dpp D, A row_shr:3 row_mask:{row_mask:#x} bank_mask:{bank_mask:#x}"
        lines.append(case(text, "old:u32 u32 exec -> D:u32", moved(source, row_mask, bank_mask)))
    tail = "row_mask:0xf bank_mask:0xf"
    shr = controls()["row_shr:1"]
    lines += [
        case(
            f"v_add_u32_dpp D, A, D row_shr:1 {tail}",
            "old:u32 u32 exec -> D:u32",
            moved(shr, function=lambda a, old: a + old),
        ),
        case(
            f"v_add_u32_dpp D, A, D row_shr:1 {tail} bound_ctrl:0",
            "old:u32 u32 exec -> D:u32",
            moved(shr, zero_fill=True, function=lambda a, old: a + old),
        ),
        case(
            f"v_mul_f32_dpp D, -A, |D| quad_perm:[1,0,3,2] {tail}",
            "old:f32 f32 exec -> D:f32",
            moved(LANE ^ 1, function=quiet(lambda a, old: -a * np.abs(old))),
        ),
        case(
            f"v_max_f32_dpp D, A, D row_ror:8 {tail}",
            "old:f32 f32 exec -> D:f32",
            moved(controls()["row_ror:8"], function=quiet(np.fmax)),
            adjust=_no_zeros,
        ),
        case(
            f"v_add_f16_dpp D, A, D row_ror:4 {tail}",
            "old:f16 f16 exec -> D:f16lo",
            moved(controls()["row_ror:4"], function=quiet(np.add)),
        ),
        case(
            f"v_mov_b64_dpp D2, A2 row_newbcast:3 {tail}",
            "old:u64 u64 exec -> D:u64",
            moved(controls()["row_newbcast:3"]),
        ),
        case(
            f"v_cvt_f32_i32_dpp D, A row_half_mirror {tail}",
            "old:u32 i32 exec -> D:u32",
            moved(controls()["row_half_mirror"], function=lambda a, old: a.astype(F32).view(U32)),
        ),
        case(
            f"v_cndmask_b32_dpp D, A, B, vcc row_ror:1 {tail}",
            "old:u32 u32 u32 vcc exec -> D:u32",
            lambda old, a, b, m, active: moved(
                controls()["row_ror:1"], function=lambda v, o: np.where(m, b, v)
            )(old, a, active),
        ),
    ]
    return lines


def _no_zeros(lanes, state):
    for register in (0, 12):
        lanes[..., register] |= U32(0x00100000)


def selected(words, selection, sign=False):
    """The part of a word that an SDWA selection names, zero- or sign-extended to 32 bits."""
    kind, _, number = selection.partition("_")
    if kind == "DWORD":
        return words
    bits = 8 if kind == "BYTE" else 16
    part = (words >> U32(bits * int(number))) & U32((1 << bits) - 1)
    return (part ^ U32(1 << (bits - 1))) - U32(1 << (bits - 1)) if sign else part


def placed(result, old, selection, unused):
    kind, _, number = selection.partition("_")
    if kind == "DWORD":
        return result
    bits = 8 if kind == "BYTE" else 16
    shift = U32(bits * int(number))
    mask = U32((1 << bits) - 1)
    part = (result & mask) << shift
    if unused == "UNUSED_PRESERVE":
        return part | (old & ~(mask << shift))
    if unused == "UNUSED_SEXT":
        above = selected(result, "WORD_0" if bits == 16 else "BYTE_0", sign=True)
        return above << shift
    return part


def sdwa():
    lines = []
    selections = ["BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1", "DWORD"]
    rng = np.random.default_rng(41)
    combos = [(d, rng.choice(selections), rng.choice(selections)) for d in selections]
    combos += [("DWORD", s, s) for s in selections]
    for dst, s0, s1 in combos:
        for unused in ("UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"):
            if dst == "DWORD" and unused != "UNUSED_PAD":
                continue
            for sign in (False, True):
                a, b = ("sext(A)", "sext(B)") if sign else ("A", "B")
                text = f"v_add_u32_sdwa D, {a}, {b} dst_sel:{dst} dst_unused:{unused} src0_sel:{s0} src1_sel:{s1}"
                oracle = lambda old, x, y, dst=dst, unused=unused, s0=s0, s1=s1, sign=sign: placed(  # noqa: E731
                    selected(x, s0, sign) + selected(y, s1, sign), old, dst, unused
                )
                lines.append(case(text, "old:u32 u32 u32 -> u32", oracle))
    half = lambda x, selection: selected(x, selection).astype(U16).view(F16)  # noqa: E731
    lines += [
        case(
            "v_mov_b32_sdwa D, A dst_sel:BYTE_3 dst_unused:UNUSED_PRESERVE src0_sel:WORD_1",
            "old:u32 u32 -> u32",
            lambda old, a: placed(selected(a, "WORD_1"), old, "BYTE_3", "UNUSED_PRESERVE"),
        ),
        case(
            "v_lshlrev_b32_sdwa D, A, B dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_1 src1_sel:WORD_1",
            "u32 u32 -> u32",
            lambda a, b: selected(b, "WORD_1") << (selected(a, "BYTE_1") & U32(31)),
        ),
        case(
            "v_and_b32_sdwa D, A, SA dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:DWORD",
            "u32 SA:u32 -> u32",
            lambda a, s: selected(a, "WORD_1") & s,
        ),
        case(
            "v_add_f16_sdwa D, -A, |B| dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_1 src1_sel:WORD_0",
            "old:2xf16 2xf16 2xf16 -> 2xf16",
            quiet(lambda old, a, b: np.stack([old[..., 0], -a[..., 1] + np.abs(b[..., 0])], axis=-1)),
        ),
        case(
            "v_mul_f16_sdwa D, A, B dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:WORD_1",
            "2xf16 2xf16 -> f16",
            quiet(lambda a, b: a[..., 1] * b[..., 1]),
        ),
        case(
            "v_cvt_f32_ubyte0_sdwa D, A dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_2",
            "u32 -> f32",
            lambda a: selected(a, "BYTE_2").astype(F32),
        ),
        case(
            "v_cmp_lt_u32_sdwa vcc, A, B src0_sel:BYTE_1 src1_sel:WORD_1",
            "u32 u32 -> vcc",
            lambda a, b: selected(a, "BYTE_1") < selected(b, "WORD_1"),
        ),
        case(
            "v_cmp_eq_f16_sdwa SD2, A, |B| src0_sel:WORD_0 src1_sel:WORD_1",
            "u32 u32 -> SD:mask",
            quiet(lambda a, b: half(a, "WORD_0") == np.abs(half(b, "WORD_1"))),
        ),
        case(
            "v_mul_u32_u24_sdwa D, A, B dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:BYTE_3",
            "u32 u32 -> u32",
            lambda a, b: selected(a, "BYTE_0") * selected(b, "BYTE_3"),
        ),
        case(
            "v_or_b32_sdwa D, A, sext(B) dst_sel:WORD_1 dst_unused:UNUSED_SEXT src0_sel:BYTE_0 src1_sel:BYTE_2",
            "old:u32 u32 u32 -> u32",
            lambda old, a, b: placed(
                selected(a, "BYTE_0") | selected(b, "BYTE_2", True), old, "WORD_1", "UNUSED_SEXT"
            ),
        ),
    ]
    return lines


def first_active(a, active):
    return np.where(active.any(axis=1), active.argmax(axis=1), 0)


def scalar_lanes():
    def read_lane(a, lane):
        return np.take_along_axis(a, (lane % 64).astype(int), axis=1)

    def read_first(a, active):
        return np.take_along_axis(a, first_active(a, active)[:, None], axis=1)

    return [
        case("v_readlane_b32 SD, A, SB", "A:u32 SB:u32 -> SD:u32", read_lane),
        case("v_readlane_b32 SD, A, 37", "A:u32 -> SD:u32", lambda a: a[:, 37:38]),
        case("v_readlane_b32 SD, A, m0", "A:u32 m0 -> SD:u32", read_lane),
        case("v_readfirstlane_b32 SD, A", "A:u32 exec -> SD:u32", read_first),
        case(
            "s_mov_b64 exec, 0; v_readfirstlane_b32 SD, A",
            "A:u32 exec -> SD:u32 exec",
            lambda a, active: (a[:, :1], np.zeros_like(active)),
        ),
        case(
            "v_writelane_b32 D, SA, 5",
            "old:u32 SA:u32 -> u32",
            lambda old, value: np.where(LANE == 5, value, old),
            adjust=_all_active,
        ),
        case(
            "v_writelane_b32 D, 7, 63",
            "old:u32 -> u32",
            lambda old: np.where(LANE == 63, 7, old),
            adjust=_all_active,
        ),
        # Also to a lane that EXEC has off.
        case(
            "s_mov_b64 exec, 1; v_writelane_b32 D, 7, 63; s_mov_b64 exec, -1",
            "old:u32 -> u32 exec",
            lambda old: (np.where(LANE == 63, 7, old), np.ones((1, 64), bool)),
            adjust=_all_active,
        ),
        case(
            "s_mov_b32 m0, SB; v_writelane_b32 D, SA, m0",
            "old:u32 SA:u32 SB:u32 -> u32 m0",
            lambda old, value, lane: (np.where(lane % 64 == LANE, value, old), lane),
            adjust=_all_active,
        ),
    ]


def swizzled(offset):
    """The lane that each lane reads with ds_swizzle_b32."""
    if offset & 0x8000:
        return LANE // 4 * 4 + np.array([offset >> (2 * i) & 3 for i in range(4)])[LANE % 4]
    keep, set_, flip = offset & 31, offset >> 5 & 31, offset >> 10 & 31
    return LANE // 32 * 32 + (((LANE % 32 & keep) | set_) ^ flip)


def through_lds():
    """Exchanges that use the paths of LDS but none of its memory. A lane that is off gives zero."""
    wait = "; s_waitcnt lgkmcnt(0)"

    def backward(extra):
        def call(place, a, active):
            lane = (((place.astype(np.int64) + extra) >> 2) % 64).astype(int)
            given = np.where(active, a, U32(0))
            return np.take_along_axis(given, lane, axis=1)

        return call

    def forward(extra):
        """Lanes write; of several that write to one lane the last stays."""

        def call(place, a, active):
            out = np.zeros_like(a)
            for wave in range(len(a)):
                for lane in range(64):
                    if active[wave, lane]:
                        out[wave, (int(place[wave, lane]) + extra >> 2) % 64] = a[wave, lane]
            return out

        return call

    lines = [
        case(f"ds_bpermute_b32 D, A, B{wait}", "u32 u32 exec -> D:u32", backward(0)),
        case(f"ds_bpermute_b32 D, A, B offset:20{wait}", "u32 u32 exec -> D:u32", backward(20)),
        case(f"ds_permute_b32 D, A, B{wait}", "u32 u32 exec -> D:u32", forward(0), adjust=_permutation),
        case(
            f"ds_permute_b32 D, A, B offset:8{wait}", "u32 u32 exec -> D:u32", forward(8), adjust=_permutation
        ),
    ]
    for offset in (
        0x1F | 1 << 10,
        0x1F | 16 << 10,
        0x18 | 3 << 5,
        0x10,
        0x8000 | 0b00011011,
        0x8000 | 0b10110001,
    ):
        source = swizzled(offset)
        lines.append(
            case(
                f"ds_swizzle_b32 D, A offset:{offset}{wait}",
                "u32 exec -> D:u32",
                lambda a, active, source=source: np.where(active, a, U32(0))[:, source],
            )
        )
    return lines


def relative():
    """Vector register numbers that M0 displaces, and vector instructions that are skipped."""

    def small(lanes, state):
        state[:, 0] %= 4
        state[:, 4] %= 4

    def m0_of(m0, index, bits):
        return (m0 & U32(0xFFFF0F00)) | index | U32(bits << 12)

    def at(a, index):
        return np.take_along_axis(a, np.broadcast_to(index, a.shape[:2])[..., None].astype(int), axis=-1)[
            ..., 0
        ]

    def put(old, a, index):
        return np.where(np.arange(4) == index[..., None], a[..., None], old)

    off = "; s_set_gpr_idx_off; v_mov_b32 v60, A"
    return [
        case(
            f"s_set_gpr_idx_on SA, gpr_idx(SRC0); v_mov_b32 D, A{off}",
            "A:4xu32 SA:u32 m0 -> D:u32 m0",
            lambda a, i, m0: (at(a, i), m0_of(m0, i, 1)),
            adjust=small,
        ),
        case(
            f"s_set_gpr_idx_on SA, gpr_idx(DST); v_mov_b32 D, A{off}",
            "old:4xu32 A:u32 SA:u32 m0 -> D:4xu32 m0",
            lambda old, a, i, m0: (put(old, a, i), m0_of(m0, i, 8)),
            adjust=small,
        ),
        case(
            f"s_set_gpr_idx_on SA, gpr_idx(SRC0); s_set_gpr_idx_idx SB; v_mov_b32 D, A{off}",
            "A:4xu32 SB:u32 m0 -> D:u32 m0",
            lambda a, i, m0: (at(a, i), m0_of(m0, i, 1)),
            adjust=small,
        ),
        case(
            f"s_set_gpr_idx_on SA, gpr_idx(DST); s_set_gpr_idx_mode gpr_idx(SRC1); v_add_u32 D, A, B{off}",
            "A:u32 B:4xu32 SA:u32 m0 -> D:u32 m0",
            lambda a, b, i, m0: (a + at(b, i), m0_of(m0, i, 2)),
            adjust=small,
        ),
        case(
            "s_setvskip SA, SB; v_mov_b32 D, A; s_setvskip 0, 0; v_mov_b32 v60, A",
            "old:u32 A:u32 SA:u32 SB:u32 -> u32",
            lambda old, a, word, bit: np.where(word >> (bit & U32(31)) & U32(1), old, a),
        ),
    ]


def _permutation(lanes, state):
    """Every lane goes somewhere else."""
    rng = np.random.default_rng(43)
    for wave in range(lanes.shape[0]):
        lanes[wave, :, 0] = rng.permutation(64) * 4


def accumulators():
    return [
        case(
            "v_accvgpr_write_b32 a7, A; v_accvgpr_mov_b32 a9, a7; v_accvgpr_read_b32 D, a9",
            "u32 -> u32",
            lambda a: a,
        ),
        case("v_accvgpr_write_b32 a0, -3; v_accvgpr_read_b32 D, a0", "-> D:i32", lambda: np.array([[-3]])),
        # A lane that is off keeps its accumulator too.
        case(
            "v_accvgpr_write_b32 a1, A; s_mov_b64 exec, SA2; v_accvgpr_write_b32 a1, B; s_mov_b64 exec, -1;"
            " v_accvgpr_read_b32 D, a1",
            "u32 u32 SA:mask -> u32",
            lambda a, b, m: np.where(m, b, a),
            adjust=_all_active,
        ),
    ]


def _all_active(lanes, state):
    state[:, 18:20] = 2**32 - 1


CASES = [*dpp(), *sdwa(), *scalar_lanes(), *through_lds(), *accumulators(), *relative()]
