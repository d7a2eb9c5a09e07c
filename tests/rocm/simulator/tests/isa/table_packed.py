"""Instructions on pairs of elements, mixed precision and dot products."""

import numpy as np

from isa.exact import fma, quiet
from isa.frame import case
from isa.table_float import ZERO_SIGN_FREE, clamped, maximum, minimum
from isa.table_integer import wide

F16, F32 = np.float16, np.float32
U16, U32, I64 = np.uint16, np.uint32, np.int64


def pairs(low, high, kind):
    return lambda *sources: np.stack([low(*sources), high(*sources)], axis=-1).astype(kind)


def shifted(function):
    return lambda a, b: function(wide(b), wide(a) & 15)


def selected(function, sel, sel_hi, neg_lo=(0, 0, 0), neg_hi=(0, 0, 0)):
    """A packed instruction whose halves read the elements that op_sel and op_sel_hi name."""

    @quiet
    def call(*sources):
        low = [-s[..., i] if n else s[..., i] for s, i, n in zip(sources, sel, neg_lo, strict=False)]
        high = [-s[..., i] if n else s[..., i] for s, i, n in zip(sources, sel_hi, neg_hi, strict=False)]
        return np.stack([function(*low), function(*high)], axis=-1)

    return call


def integers():
    u, i = "2xu16 2xu16 -> 2xu16", "2xi16 2xi16 -> 2xi16"
    u3, i3 = "2xu16 2xu16 2xu16 -> 2xu16", "2xi16 2xi16 2xi16 -> 2xi16"
    return [
        case("v_pk_add_u16", u, lambda a, b: a + b),
        case("v_pk_sub_u16", u, lambda a, b: a - b),
        case("v_pk_add_i16", i, lambda a, b: a + b),
        case("v_pk_sub_i16", i, lambda a, b: a - b),
        case("v_pk_mul_lo_u16", u, lambda a, b: a * b),
        case("v_pk_min_u16", u, np.minimum),
        case("v_pk_max_u16", u, np.maximum),
        case("v_pk_min_i16", i, np.minimum),
        case("v_pk_max_i16", i, np.maximum),
        case("v_pk_mad_u16", u3, lambda a, b, c: a * b + c),
        case("v_pk_mad_i16", i3, lambda a, b, c: a * b + c),
        case("v_pk_lshlrev_b16", u, shifted(lambda x, n: (x << n) & 0xFFFF)),
        case("v_pk_lshrrev_b16", u, shifted(lambda x, n: x >> n)),
        case("v_pk_ashrrev_i16", "2xu16 2xi16 -> 2xi16", shifted(lambda x, n: x >> n)),
        case("v_pk_add_u16 D, A, B clamp", u, lambda a, b: np.clip(wide(a) + wide(b), 0, 65535)),
        case("v_pk_sub_u16 D, A, B clamp", u, lambda a, b: np.clip(wide(a) - wide(b), 0, 65535)),
        case("v_pk_add_i16 D, A, B clamp", i, lambda a, b: np.clip(wide(a) + wide(b), -32768, 32767)),
        case("v_pk_sub_i16 D, A, B clamp", i, lambda a, b: np.clip(wide(a) - wide(b), -32768, 32767)),
        case(
            "v_pk_add_u16 D, A, B op_sel:[1,0] op_sel_hi:[0,0]",
            u,
            selected(lambda a, b: a + b, (1, 0), (0, 0)),
        ),
        case(
            "v_pk_mad_u16 D, A, B, C op_sel:[0,1,1] op_sel_hi:[1,0,1]",
            u3,
            selected(lambda a, b, c: a * b + c, (0, 1, 1), (1, 0, 1)),
        ),
        case("v_pk_mov_b32", "2xu32 2xu32 -> 2xu32", lambda a, b: np.stack([a[..., 0], b[..., 0]], axis=-1)),
        case(
            "v_pk_mov_b32 D2, A2, B2 op_sel:[0,1]",
            "2xu32 2xu32 -> 2xu32",
            lambda a, b: np.stack([a[..., 0], b[..., 1]], axis=-1),
        ),
        case(
            "v_pk_mov_b32 D2, A2, B2 op_sel:[1,0]",
            "2xu32 2xu32 -> 2xu32",
            lambda a, b: np.stack([a[..., 1], b[..., 0]], axis=-1),
        ),
    ]


def floats():
    lines = []
    operations = {"add": np.add, "mul": np.multiply, "min": minimum, "max": maximum}
    for name, function in operations.items():
        lines.append(case(f"v_pk_{name}_f16", "2xf16 2xf16 -> 2xf16", quiet(function)))
        lines.append(
            case(
                f"v_pk_{name}_f16 D, A, B op_sel:[0,1] op_sel_hi:[0,1] neg_lo:[1,0] neg_hi:[0,1]",
                "2xf16 2xf16 -> 2xf16",
                selected(function, (0, 1), (0, 1), (1, 0), (0, 1)),
            )
        )
    for kind, dtype in (("f16", F16), ("f32", F32)):
        w = "2" if kind == "f32" else ""
        three = f"2x{kind} 2x{kind} 2x{kind} -> 2x{kind}"
        lines += [
            case(f"v_pk_fma_{kind}", three, fma(dtype)),
            case(
                f"v_pk_fma_{kind} D{w}, A{w}, B{w}, C{w} op_sel:[1,0,1] op_sel_hi:[0,0,1]",
                three,
                selected(fma(dtype), (1, 0, 1), (0, 0, 1)),
            ),
            case(
                f"v_pk_fma_{kind} D{w}, A{w}, B{w}, C{w} neg_lo:[1,0,0] neg_hi:[0,0,1]",
                three,
                selected(fma(dtype), (0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 0, 1)),
            ),
        ]
    f = "2xf32 2xf32 -> 2xf32"
    lines += [
        case(
            "v_pk_mul_f16 D, A, B clamp",
            "2xf16 2xf16 -> 2xf16",
            quiet(lambda a, b: clamped(a * b)),
            ulp=ZERO_SIGN_FREE,
        ),
        case("v_pk_add_f32", f, quiet(np.add)),
        case("v_pk_mul_f32", f, quiet(np.multiply)),
        case(
            "v_pk_mul_f32 D2, A2, B2 op_sel:[1,0] op_sel_hi:[0,1]", f, selected(np.multiply, (1, 0), (0, 1))
        ),
        case(
            "v_pk_add_f32 D2, A2, B2 op_sel_hi:[1,0] neg_lo:[0,1] neg_hi:[0,1]",
            f,
            selected(np.add, (0, 0), (1, 0), (0, 1), (0, 1)),
        ),
        case("v_pk_mul_f32 D2, A2, SA2", "2xf32 SA:2xf32 -> 2xf32", quiet(np.multiply)),
        case(
            "v_pk_mul_f32 D2, A2, SA2 op_sel_hi:[1,0]",
            "2xf32 SA:2xf32 -> 2xf32",
            selected(np.multiply, (0, 0), (1, 0)),
        ),
        case("v_pk_add_f16 D, A, 1.0 op_sel_hi:[1,0]", "2xf16 -> 2xf16", quiet(lambda a: a + F16(1))),
    ]
    return lines


def mixed():
    """op_sel_hi says of each source whether it is half precision, op_sel which half."""
    f3 = "f32 f32 f32 -> f32"
    f = fma(F32)
    half = lambda x, i: x[..., i].astype(F32)  # noqa: E731
    return [
        case("v_fma_mix_f32", f3, f),
        case("v_fma_mix_f32 D, -A, |B|, C", f3, lambda a, b, c: f(-a, np.abs(b), c)),
        case(
            "v_fma_mix_f32 D, A, B, C op_sel_hi:[1,0,0]",
            "2xf16 f32 f32 -> f32",
            lambda a, b, c: f(half(a, 0), b, c),
        ),
        case(
            "v_fma_mix_f32 D, A, B, C op_sel:[1,0,1] op_sel_hi:[1,1,1]",
            "2xf16 2xf16 2xf16 -> f32",
            lambda a, b, c: f(half(a, 1), half(b, 0), half(c, 1)),
        ),
        case(
            "v_fma_mix_f32 D, A, B, C op_sel:[0,1,0] op_sel_hi:[0,1,0] clamp",
            "f32 2xf16 f32 -> f32",
            lambda a, b, c: clamped(f(a, half(b, 1), c)),
            ulp=ZERO_SIGN_FREE,
        ),
        case("v_fma_mixlo_f16 D, A, B, C", "old:2xf16 f32 f32 f32 -> 2xf16", _mixed_half(0)),
        case("v_fma_mixhi_f16 D, A, B, C", "old:2xf16 f32 f32 f32 -> 2xf16", _mixed_half(1)),
    ]


def _mixed_half(place):
    """The single-precision result is rounded once more, to half precision."""

    @quiet
    def call(old, a, b, c):
        out = old.copy()
        out[..., place] = fma(F32)(a, b, c).astype(F16)
        return out

    return call


def nibbles(a, signed):
    values = np.stack([(a >> U32(4 * i)) & U32(15) for i in range(8)], axis=-1).astype(I64)
    return (values ^ 8) - 8 if signed else values


def dot(products, clamp=None):
    def call(a, b, c):
        exact = products(a, b) + wide(c)
        return np.clip(exact, *clamp) if clamp else exact & 0xFFFFFFFF

    return call


def small_halves(lanes, state):
    """Integers whose products and sums no order of summation can round."""
    rng = np.random.default_rng(37)
    for register in (0, 4):
        lanes[..., register] = rng.integers(-30, 31, (*lanes.shape[:2], 2)).astype(F16).view(U32)[..., 0]
    for register in (8, 12):
        lanes[..., register] = rng.integers(-100, 101, lanes.shape[:2]).astype(F32).view(U32)


def dots():
    i32 = (-(2**31), 2**31 - 1)
    u32 = (0, 2**32 - 1)
    total = lambda a, b: (wide(a) * wide(b)).sum(axis=-1)  # noqa: E731
    total4 = lambda signed: lambda a, b: (nibbles(a, signed) * nibbles(b, signed)).sum(axis=-1)  # noqa: E731
    lines = [
        case(
            "v_dot2_f32_f16",
            "2xf16 2xf16 f32 -> f32",
            lambda a, b, c: (a.astype(F32) * b.astype(F32)).sum(axis=-1) + c + F32(0),
            adjust=small_halves,
            ulp=0.1,
        ),
        case(
            "v_dot2c_f32_f16 D, A, B",
            "old:f32 2xf16 2xf16 -> f32",
            lambda d, a, b: (a.astype(F32) * b.astype(F32)).sum(axis=-1) + d + F32(0),
            adjust=small_halves,
            ulp=0.1,
        ),
    ]
    shapes = {
        "dot2_i32_i16": ("2xi16", "i32", total, i32),
        "dot2_u32_u16": ("2xu16", "u32", total, u32),
        "dot4_i32_i8": ("4xi8", "i32", total, i32),
        "dot4_u32_u8": ("4xu8", "u32", total, u32),
        "dot8_i32_i4": ("u32", "i32", total4(True), i32),
        "dot8_u32_u4": ("u32", "u32", total4(False), u32),
    }
    for name, (source, kind, products, limits) in shapes.items():
        signature = f"{source} {source} {kind} -> {kind}"
        lines.append(case(f"v_{name}", signature, dot(products)))
        lines.append(case(f"v_{name} D, A, B, C clamp", signature, dot(products, limits)))
        if kind == "i32":
            name = name.replace("_", "c_", 1)
            accumulated = lambda d, a, b, products=products: dot(products)(a, b, d)  # noqa: E731
            lines.append(case(f"v_{name} D, A, B", f"old:i32 {source} {source} -> i32", accumulated))
    return lines


CASES = [*integers(), *floats(), *mixed(), *dots()]
