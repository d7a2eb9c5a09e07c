"""Matrix instructions: which element of A, B and D each lane's register holds, and the product over them."""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import dataclasses

import ml_dtypes
import numpy as np

from isa.kernels import Kernel

BF16, FP8, BF8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz
F16, F32, F64 = np.float16, np.float32, np.float64
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "i8": np.int8, "fp8": FP8, "bf8": BF8, "f64": F64, "xf32": F32}
LANE = np.arange(64)


@dataclasses.dataclass
class MatrixCase:
    """D = A B + C of `blocks` independent matrices, M x K by K x N."""

    text: str
    m: int
    n: int
    k: int
    blocks: int
    a_type: str
    b_type: str
    whole: bool = True  # whole numbers, whose sums are exact; else any numbers, with a tolerance
    # Which block's A each block uses, and which lane's B each lane uses.
    a_block: np.ndarray | None = None
    b_lane: np.ndarray | None = None
    negate: tuple = (False, False, False)

    @property
    def id(self):
        return self.text.replace(" ", "_").replace(",", "") + ("" if self.whole else "_any")

    @property
    def mnemonics(self):
        return {self.text.split()[0]}

    @property
    def out_type(self):
        return {"f64": F64, "i8": np.int32}.get(self.a_type, F32)

    @property
    def per_lane(self):
        """Elements of A, and of B, in each lane."""
        return self.m * self.k * self.blocks // 64

    @property
    def registers(self):
        """32-bit registers of C and of D."""
        return self.m * self.n * self.blocks // 64 * np.dtype(self.out_type).itemsize // 4


def inputs_of_lane(one):
    """[64, per_lane] each: block, row (of A) or column (of B), and k of what a lane's registers hold."""
    element = np.arange(one.per_lane)
    if one.a_type == "f64" and one.m == 4:
        # Four blocks of 4 x 4: the lanes count through rows, then blocks, then k.
        block, row, k = LANE // 4 % 4, LANE % 4, LANE // 16
    elif one.blocks == 1:
        block, row, k = 0 * LANE, LANE % one.m, LANE // one.m * one.per_lane
    else:
        block, row, k = LANE // one.m, LANE % one.m, 0 * LANE
    spread = np.ones_like(element)
    return np.outer(block, spread), np.outer(row, spread), k[:, None] + element[None, :]


def outputs_of_lane(one):
    """[64, elements] each: block, row and column of the elements of C and D that a lane holds."""
    count = one.m * one.n * one.blocks // 64
    r = np.arange(count)[None, :]
    lane = LANE[:, None]
    if one.a_type == "f64":
        if one.m == 4:
            return lane // 4 % 4 + 0 * r, lane // 16 + 0 * r, lane % 4 + 0 * r
        return 0 * lane + 0 * r, 4 * r + lane // 16, lane % 16 + 0 * r
    if one.m == 4:
        return lane // 4 + 0 * r, r + 0 * lane, lane % 4 + 0 * r
    # Groups of four rows go round the lanes' halves or quarters.
    per_block = count // one.blocks
    place = r % per_block
    groups = 64 // one.m
    row = 4 * groups * (place // 4) + 4 * (lane // one.m) + place % 4
    return r // per_block + 0 * lane, row, lane % one.m + 0 * r


def operands(one, rng):
    """A and B [64, per_lane], C [64, elements], as the lanes hold them."""

    def numbers(shape, dtype, top):
        if one.whole:
            return rng.integers(-top, top + 1, shape).astype(dtype)
        return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 4, shape))).astype(dtype)

    shape = (64, one.per_lane)
    top = 127 if one.a_type == "i8" else 8
    a, b = numbers(shape, TYPES[one.a_type], top), numbers(shape, TYPES[one.b_type], top)
    c = numbers((64, one.m * one.n * one.blocks // 64), one.out_type, 1000)
    return a, b, c


def expected(one, a, b, c):
    """D as the lanes hold it, and for each element the sum of its terms' sizes."""
    wide = np.int64 if one.a_type == "i8" else np.longdouble
    block, row, k = inputs_of_lane(one)
    whole_a = np.zeros((one.blocks, one.m, one.k), wide)
    whole_b = np.zeros((one.blocks, one.n, one.k), wide)
    whole_a[block, row, k] = a
    whole_b[block, row, k] = b[one.b_lane] if one.b_lane is not None else b
    if one.a_block is not None:
        whole_a = whole_a[one.a_block]
    whole_a = -whole_a if one.negate[0] else whole_a
    whole_b = -whole_b if one.negate[1] else whole_b
    product = np.einsum("bmk,bnk->bmn", whole_a, whole_b)
    size = np.einsum("bmk,bnk->bmn", np.abs(whole_a), np.abs(whole_b))
    where = outputs_of_lane(one)
    addend = -c.astype(wide) if one.negate[2] else c.astype(wide)
    return product[where] + addend, size[where] + np.abs(addend)


def kernel(one, name):
    """Arguments: A [64, 4 words], B, C [64, 32 words] and, of the same shape, D. The lanes' words are rows."""

    def load(first, words, pointer, stride):
        return f"v_mul_u32_u24 v2, {stride * 4}, v0\n" + "\n".join(
            f"global_load_dwordx4 v[{first + 4 * i}:{first + 4 * i + 3}], v2, {pointer} offset:{16 * i}"
            for i in range(words // 4)
        )

    return Kernel(
        name,
        f"""s_load_dwordx8 s[8:15], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
s_waitcnt lgkmcnt(0)
{load(16, 4, "s[8:9]", 4)}
{load(20, 4, "s[10:11]", 4)}
{load(32, 32, "s[12:13]", 32)}
s_waitcnt vmcnt(0)
{chr(10).join(f"v_accvgpr_write_b32 a{i}, v{32 + i}" for i in range(32))}
{chr(10).join(f"v_mov_b32 v{64 + i}, -1" for i in range(32))}
s_nop 7
{one.text}
s_nop 7
s_nop 7
s_nop 7
{_from_accumulators(one)}
v_mul_u32_u24 v2, 128, v0
{chr(10).join(f"global_store_dwordx4 v2, v[{64 + 4 * i}:{67 + 4 * i}], s[14:15] offset:{16 * i}" for i in range(8))}""",
        4,
    )


def _from_accumulators(one):
    if " a[" not in one.text:
        return ""
    return "\n".join(f"v_accvgpr_read_b32 v{64 + i}, a{i}" for i in range(one.registers))


def _line(shape, a_type, b_type="", *, accumulators=False, tail="", **options):
    blocks = 1
    m, n, k, *rest = shape.replace("_", "x").split("x")
    if rest:
        blocks = int(rest[0].removesuffix("b"))
    one = MatrixCase("", int(m), int(n), int(k), blocks, a_type, b_type or a_type, **options)
    out = {F64: "f64", np.int32: "i32"}.get(one.out_type, "f32")
    source = f"v[16:{15 + max(1, one.per_lane * np.dtype(TYPES[a_type]).itemsize // 4)}]"
    source = "v16" if source == "v[16:16]" else source
    second = source.replace("16", "20", 1).replace("17", "21").replace("19", "23")
    last = one.registers - 1
    d, c = (f"a[0:{last}]", f"a[0:{last}]") if accumulators else (f"v[64:{64 + last}]", f"v[32:{32 + last}]")
    types = f"{a_type}_{b_type}" if b_type else a_type
    one.text = f"v_mfma_{out}_{shape}_{types} {d}, {source}, {second}, {c}{tail}"
    return one


def cases():
    shapes = {
        "f32": ["32x32x1_2b", "16x16x1_4b", "4x4x1_16b", "32x32x2", "16x16x4"],
        "f16": ["32x32x4_2b", "16x16x4_4b", "4x4x4_16b", "32x32x8", "16x16x16"],
        "bf16": ["32x32x4_2b", "16x16x4_4b", "4x4x4_16b", "32x32x8", "16x16x16"],
        "i8": ["32x32x4_2b", "16x16x4_4b", "4x4x4_16b", "32x32x16", "16x16x32"],
        "xf32": ["16x16x8", "32x32x4"],
        "f64": ["16x16x4", "4x4x4_4b"],
    }
    lines = []
    for a_type, names in shapes.items():
        for shape in names:
            lines.append(_line(shape, a_type))
            lines.append(_line(shape, a_type, accumulators=True))
            if a_type not in ("i8", "xf32"):
                lines.append(_line(shape, a_type, whole=False))
    for a_type in ("fp8", "bf8"):
        for b_type in ("fp8", "bf8"):
            for shape in ("16x16x32", "32x32x16"):
                lines.append(_line(shape, a_type, b_type))
                lines.append(_line(shape, a_type, b_type, whole=False))
    lines.append(_line("16x16x32", "fp8", "fp8", accumulators=True))
    # Groups of 2**cbsz blocks share the A of their block number abid.
    for shape, a_type in (("32x32x1_2b", "f32"), ("16x16x4_4b", "f16"), ("4x4x4_16b", "f16")):
        blocks = int(shape.split("_")[1][:-1])
        for cbsz, abid in ((1, 0), (1, 1), (2, 3), (4, 9)):
            if 1 << cbsz <= blocks:
                group = np.arange(blocks) >> cbsz << cbsz
                lines.append(_line(shape, a_type, tail=f" cbsz:{cbsz} abid:{abid}", a_block=group + abid))
    lanes = {
        1: LANE % 32,
        2: LANE % 32 + 32,
        3: (LANE + 16) % 64,
        **{4 + i: LANE % 16 + 16 * i for i in range(4)},
    }
    for blgp, b_lane in lanes.items():
        lines.append(_line("32x32x1_2b", "f32", tail=f" blgp:{blgp}", b_lane=b_lane))
    for i in range(3):
        flags = [int(i == j) for j in range(3)]
        lines.append(
            _line(
                "16x16x4",
                "f64",
                tail=f" neg:[{flags[0]},{flags[1]},{flags[2]}]",
                negate=tuple(map(bool, flags)),
            )
        )
    return lines


CASES = cases()
