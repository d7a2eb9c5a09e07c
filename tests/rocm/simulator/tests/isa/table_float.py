"""Vector instructions of floating point: one line each, with its meaning, rounded once."""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import math
from fractions import Fraction

import numpy as np

from isa import exact
from isa.exact import f64, flushed, fma, quiet
from isa.frame import case

F16, F32, F64 = np.float16, np.float32, np.float64
U32 = np.uint32


def minimum(a, b):
    """The lesser; -0 is less than +0; a NaN is ignored if the other is a number."""
    lesser = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, lesser))


def maximum(a, b):
    greater = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, greater))


@quiet
def med3(a, b, c):
    """The middle one; with a NaN among them, the least of the numbers."""
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    low, high = minimum(a, b), maximum(a, b)
    return np.where(nan, minimum(minimum(a, b), c), maximum(low, minimum(high, c)))


# An allowance that no neighbour meets: it only frees the sign of zero, which clamping may keep or drop.
ZERO_SIGN_FREE = 0.01


def clamped(x):
    """0 to 1, a NaN becoming 0."""
    return np.where(np.isnan(x), 0, np.clip(x, 0, 1)).astype(x.dtype) + x.dtype.type(0)


@quiet
def legacy_mul(a, b):
    return np.where((a == 0) | (b == 0), F32(0), a * b)


def fract(dtype):
    below_one = np.nextafter(dtype(1), dtype(0))
    return quiet(lambda a: np.where(np.isinf(a), dtype(np.nan), np.minimum(a - np.floor(a), below_one)))


@quiet
def mantissa(a):
    m, _ = np.frexp(a)
    return np.where(np.isfinite(a), m, a).astype(a.dtype)


@quiet
def exponent(a):
    _, e = np.frexp(a)
    return np.where(np.isfinite(a) & (a != 0), e, 0)


def ldexp(dtype):
    bits = exact.MANTISSA[np.dtype(dtype)][0]

    def one(a, shift):
        a, shift = float(a), int(shift)
        if not math.isfinite(a) or a == 0:
            return dtype(a)
        shift = max(min(shift, 5000), -5000)
        value = Fraction(a) * Fraction(2) ** shift
        low = Fraction(2) ** (exact.MANTISSA[np.dtype(dtype)][1] - bits)
        if abs(value) < low:
            return dtype(math.copysign(0, a))
        return exact.round_to(dtype, value, "even")

    return np.vectorize(one, otypes=[dtype])


@quiet
def classes(a, mask):
    """Bits: signalling NaN, quiet NaN, -inf, -normal, -denormal, -0, +0, +denormal, +normal, +inf."""
    tiny = np.finfo(a.dtype).tiny
    negative = np.signbit(a)
    size = np.abs(a)
    kinds = np.select(
        [np.isnan(a), np.isinf(a), size >= tiny, size > 0],
        [1, np.where(negative, 2, 9), np.where(negative, 3, 8), np.where(negative, 4, 7)],
        np.where(negative, 5, 6),
    )
    return (mask >> kinds.astype(U32)) & 1 != 0


def relations():
    nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    return {
        "f": lambda a, b: np.zeros(a.shape, bool),
        "lt": lambda a, b: a < b,
        "eq": lambda a, b: a == b,
        "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b,
        "lg": lambda a, b: (a < b) | (a > b),
        "ge": lambda a, b: a >= b,
        "o": lambda a, b: ~nan(a, b),
        "u": nan,
        "nge": lambda a, b: ~(a >= b),
        "nlg": lambda a, b: ~((a < b) | (a > b)),
        "ngt": lambda a, b: ~(a > b),
        "nle": lambda a, b: ~(a <= b),
        "neq": lambda a, b: ~(a == b),
        "nlt": lambda a, b: ~(a < b),
        "tru": lambda a, b: np.ones(a.shape, bool),
    }


def compares():
    lines = []
    for kind in ("f16", "f32", "f64"):
        w = "2" if kind == "f64" else ""
        for name, function in relations().items():
            text = f"v_cmp_{name}_{kind}"
            lines.append(case(f"{text}_e32 vcc, A{w}, B{w}", f"{kind} {kind} -> vcc", quiet(function)))
            negated = quiet(lambda a, b, function=function: function(-a, np.abs(b)))
            lines.append(case(f"{text}_e64 SD2, -A{w}, |B{w}|", f"{kind} {kind} -> SD:mask", negated))
            both = quiet(lambda a, b, function=function: (function(a, b),) * 2)
            lines.append(
                case(f"v_cmpx_{name}_{kind}_e32 vcc, A{w}, B{w}", f"{kind} {kind} -> vcc exec", both)
            )
        lines.append(case(f"v_cmp_class_{kind}_e64 SD2, A{w}, B", f"{kind} u32 -> SD:mask", classes))
        lines.append(case(f"v_cmp_class_{kind}_e32 vcc, A{w}, B", f"{kind} u32 -> vcc", classes))
        lines.append(
            case(
                f"v_cmpx_class_{kind}_e32 vcc, A{w}, B",
                f"{kind} u32 -> vcc exec",
                lambda a, m: (classes(a, m),) * 2,
            )
        )
    return lines


def arithmetic():
    lines = []
    for kind, dtype in (("f16", F16), ("f32", F32), ("f64", F64)):
        two, three = f"{kind} {kind} -> {kind}", f"{kind} {kind} {kind} -> {kind}"
        w = "2" if kind == "f64" else ""
        A, B = f"A{w}", f"B{w}"
        mul, add = quiet(np.multiply), quiet(np.add)
        lines += [
            case(f"v_add_{kind}", two, add),
            case(f"v_mul_{kind}", two, mul),
            case(f"v_min_{kind}", two, quiet(minimum)),
            case(f"v_max_{kind}", two, quiet(maximum)),
            case(f"v_trunc_{kind}", f"{kind}c -> {kind}", np.trunc),
            case(f"v_ceil_{kind}", f"{kind}c -> {kind}", np.ceil),
            case(f"v_floor_{kind}", f"{kind}c -> {kind}", np.floor),
            case(f"v_rndne_{kind}", f"{kind}c -> {kind}", np.rint),
            case(f"v_fract_{kind}", f"{kind} -> {kind}", fract(dtype)),
            case(f"v_frexp_mant_{kind}", f"{kind} -> {kind}", mantissa),
            case(
                f"v_ldexp_{kind}",
                f"{kind} i32 -> {kind}" if kind != "f16" else "f16 i16 -> f16",
                ldexp(dtype),
            ),
            # Modifiers of operands and results.
            case(f"v_add_{kind}_e64 D{w}, -{A}, |{B}|", two, quiet(lambda a, b: -a + np.abs(b))),
            case(
                f"v_mul_{kind}_e64 D{w}, -|{A}|, {B} clamp",
                two,
                quiet(lambda a, b: clamped(-np.abs(a) * b)),
                ulp=ZERO_SIGN_FREE,
            ),
            case(
                f"v_add_{kind}_e64 D{w}, {A}, 0.5",
                f"{kind} -> {kind}",
                quiet(lambda a: a + a.dtype.type(0.5)),
            ),
            case(
                f"v_add_{kind}_e64 D{w}, {A}, -4.0",
                f"{kind} -> {kind}",
                quiet(lambda a: a + a.dtype.type(-4)),
            ),
        ]
        if kind != "f16":
            lines.append(case(f"v_fma_{kind}", three, fma(dtype)))
            lines.append(
                case(
                    f"v_fma_{kind} D{w}, -{A}, {B}, |C{w}|",
                    three,
                    lambda a, b, c, dtype=dtype: fma(dtype)(-a, b, np.abs(c)),
                )
            )
        lines.append(
            case(
                f"v_frexp_exp_i32_{kind}" if kind != "f16" else "v_frexp_exp_i16_f16",
                f"{kind} -> i32" if kind != "f16" else "f16 -> i16",
                exponent,
            )
        )
    three = "f16 f16 f16 -> f16lo"
    lines += [
        case("v_fma_f16", three, fma(F16)),
        case(
            "v_fma_f16 D, -A, |B|, C clamp",
            three,
            lambda a, b, c: clamped(fma(F16)(-a, np.abs(b), c)),
            ulp=ZERO_SIGN_FREE,
        ),
        case("v_fma_f16 D, A, B, C op_sel:[1,0,1,1]", "old:2xu16 2xf16 2xf16 2xf16 -> 2xf16", _fma_halves),
        case("v_fma_legacy_f16", "f16 f16 f16 -> f16", fma(F16)),
        # Multiplication and addition that each round, on operands that no step makes denormal.
        case("v_mad_f16", three, mad16, adjust=_everyday_halves),
        case("v_mad_legacy_f16", "f16 f16 f16 -> f16", mad16, adjust=_everyday_halves),
        case(
            "v_mac_f16 D, A, B",
            "old:f16 f16 f16 -> f16lo",
            lambda d, a, b: mad16(a, b, d),
            adjust=_everyday_halves,
        ),
        case(
            "v_madak_f16 D, A, B, 0x4248",
            "f16 f16 -> f16lo",
            lambda a, b: mad16(a, b, F16(3.140625)),
            adjust=_everyday_halves,
        ),
        case(
            "v_madmk_f16 D, A, 0x4248, B",
            "f16 f16 -> f16lo",
            lambda a, b: mad16(a, F16(3.140625), b),
            adjust=_everyday_halves,
        ),
        case("v_fmac_f32 D, A, B", "old:f32 f32 f32 -> f32", lambda d, a, b: fma(F32)(a, b, d)),
        case(
            "v_fmac_f32_e64 D, -A, |B|", "old:f32 f32 f32 -> f32", lambda d, a, b: fma(F32)(-a, np.abs(b), d)
        ),
        case("v_fmac_f64 D2, A2, B2", "old:f64 f64 f64 -> f64", lambda d, a, b: fma(F64)(a, b, d)),
        case(
            "v_fmaak_f32 D, A, B, 0x40490fdb",
            "f32 f32 -> f32",
            lambda a, b: fma(F32)(a, b, _bits(0x40490FDB)),
        ),
        case(
            "v_fmamk_f32 D, A, 0x40490fdb, B",
            "f32 f32 -> f32",
            lambda a, b: fma(F32)(a, _bits(0x40490FDB), b),
        ),
        case("v_sub_f32", "f32 f32 -> f32", quiet(np.subtract)),
        case("v_sub_f16", "f16 f16 -> f16", quiet(np.subtract)),
        case("v_subrev_f32", "f32 f32 -> f32", quiet(lambda a, b: b - a)),
        case("v_subrev_f16", "f16 f16 -> f16", quiet(lambda a, b: b - a)),
        case("v_mul_legacy_f32", "f32 f32 -> f32", legacy_mul),
        case(
            "v_add_f32_e64 D, A, B mul:2",
            "f32 f32 -> f32",
            quiet(lambda a, b: (a + b) * F32(2)),
            adjust=normals,
        ),
        case(
            "v_add_f32_e64 D, A, B mul:4",
            "f32 f32 -> f32",
            quiet(lambda a, b: (a + b) * F32(4)),
            adjust=normals,
        ),
        case(
            "v_add_f32_e64 D, A, B div:2",
            "f32 f32 -> f32",
            quiet(lambda a, b: (a + b) / F32(2)),
            adjust=normals,
        ),
        case("v_add_f32 D, SA, B", "SA:f32 B:f32 -> f32", quiet(np.add)),
        case("v_mul_f32 D, 0x3fb8aa3b, B", "B:f32 -> f32", quiet(lambda b: b * _bits(0x3FB8AA3B))),
        case("v_mul_f32 D, 0.15915494, B", "B:f32 -> f32", quiet(lambda b: b * _bits(0x3E22F983))),
        case("v_mul_f32 D, 3, B", "B:f32 -> f32", quiet(lambda b: b * _bits(3))),
        case("v_add_f16 D, 2, B", "B:f16 -> f16", quiet(lambda b: b + np.uint16(2).view(F16))),
        case("v_add_f64 D2, 2.0, B2", "B:f64 -> f64", quiet(lambda b: 2 + b)),
        case("v_mul_f64 D2, SA2, B2", "SA:f64 B:f64 -> f64", quiet(np.multiply)),
        *_min_max_three("f32", F32, "f32"),
        *_min_max_three("f16", F16, "f16lo"),
    ]
    return lines


def mad16(a, b, c):
    return (a * b) + c


def _everyday_halves(lanes, state):
    rng = np.random.default_rng(53)
    for register in (0, 4, 8, 12):
        lanes[..., register] = (rng.integers(16, 200, lanes.shape[:2]) / 16).astype(F16).view(np.uint16)


def _bits(word):
    return np.array([[word]], U32).view(F32)


def _fma_halves(old, a, b, c):
    high = fma(F16)(a[..., 1], b[..., 0], c[..., 1])
    return np.stack([old[..., 0].view(F16), high], axis=-1)


def _min_max_three(kind, dtype, out):
    three = f"{kind} {kind} {kind} -> {out}"
    return [
        case(f"v_min3_{kind}", three, quiet(lambda a, b, c: minimum(minimum(a, b), c))),
        case(f"v_max3_{kind}", three, quiet(lambda a, b, c: maximum(maximum(a, b), c))),
        case(f"v_med3_{kind}", three, med3),
        case(
            f"v_max3_{kind} D, |A|, -B, |C|",
            three,
            quiet(lambda a, b, c: maximum(maximum(np.abs(a), -b), np.abs(c))),
        ),
    ]


def normals(lanes, state):
    """Operands whose results, also when multiplied or halved, are no denormals: those an omod may flush."""
    rng = np.random.default_rng(11)
    for register in (0, 4):
        lanes[..., register] = rng.standard_normal(lanes.shape[:2]).astype(F32).view(U32)


def rounding_modes():
    """Additions and products under each rounding mode of single and of double precision."""
    lines = []
    for number, mode in ((1, "up"), (2, "down"), (3, "zero")):
        for kind, dtype, field in (("f32", F32, 0), ("f16", F16, 2), ("f64", F64, 2)):
            w = "2" if kind == "f64" else ""
            wanted = number << field
            for name, function in (("add", lambda x, y: x + y), ("mul", lambda x, y: x * y)):
                text = (
                    f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), {wanted}; v_{name}_{kind} D{w}, A{w}, B{w};"
                    " s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 0"
                )
                lines.append(
                    case(
                        text,
                        f"{kind} {kind} -> {kind}",
                        _directed(function, dtype, mode),
                        adjust=_finite(dtype),
                    )
                )
    return lines


def _finite(dtype):
    words = np.dtype(dtype).itemsize // 4 or 1

    def adjust(lanes, state):
        rng = np.random.default_rng(13)
        for register in (0, 4):
            values = (
                rng.standard_normal((*lanes.shape[:2], 4 * words // np.dtype(dtype).itemsize)) * 9
            ).astype(dtype)
            lanes[..., register : register + words] = np.ascontiguousarray(values).view(U32)

    return adjust


def _directed(function, dtype, mode):
    def one(a, b):
        return exact.round_to(dtype, function(Fraction(float(a)), Fraction(float(b))), mode)

    return np.vectorize(one, otypes=[dtype])


def flush_mode():
    """Single precision as AITER's kernels set it: denormal operands and results are zeros."""

    def two(function):
        return quiet(lambda a, b: flushed(function(flushed(a), flushed(b)).astype(F32)))

    def f32_three(function):
        return quiet(lambda a, b, c: flushed(function(flushed(a), flushed(b), flushed(c))))

    f, f3 = "f32 f32 -> f32", "f32 f32 f32 -> f32"
    return [
        case("v_add_f32", f, two(np.add), mode="flush"),
        case("v_mul_f32", f, two(np.multiply), mode="flush", adjust=_no_least_normal),
        case("v_fma_f32", f3, f32_three(fma(F32)), mode="flush", adjust=_no_least_normal),
        case("v_max_f32", f, two(maximum), mode="flush"),
        case("v_max3_f32", f3, f32_three(lambda a, b, c: maximum(maximum(a, b), c)), mode="flush"),
        case("v_pk_mul_f32", "2xf32 2xf32 -> 2xf32", two(np.multiply), mode="flush"),
        case("v_pk_fma_f32", "2xf32 2xf32 2xf32 -> 2xf32", f32_three(fma(F32)), mode="flush"),
        case("v_mov_b32", "u32 -> u32", lambda a: a, mode="flush"),
        case("v_add_f16", "f16 f16 -> f16", quiet(np.add), mode="flush"),
        case("v_cvt_f16_f32", "f32 -> f16", quiet(lambda a: flushed(a).astype(F16)), mode="flush"),
        case(
            "v_cmp_eq_f32_e32 vcc, A, B",
            "f32 f32 -> vcc",
            lambda a, b: flushed(a) == flushed(b),
            mode="flush",
        ),
        case("v_mul_f32_e64 D, A, B mul:2", f, two(lambda a, b: _flushed_double(a, b)), mode="flush"),
    ]


def _no_least_normal(lanes, state):
    """Whether a product just below the least normal is flushed before or after it rounds is not said anywhere."""
    for register in (0, 4, 8):
        words = lanes[..., register]
        words[(words & U32(0x7FFFFFFF)) == 0x00800000] ^= U32(0x01000000)


def _flushed_double(a, b):
    return flushed((a * b).astype(F32)) * F32(2)


def approximate(kind, dtype, name, function, ulp, out=None):
    """A function that hardware approximates: the reference is float64's, in the middle of the range."""

    def call(a):
        with np.errstate(all="ignore"):
            return function(np.asarray(a).astype(F64)).astype(dtype)

    return case(
        f"v_{name}_{kind}", f"{kind} -> {out or kind}", call, ulp=ulp, adjust=_positive_normals(dtype, name)
    )


def _positive_normals(dtype, name):
    """Everyday numbers, powers of two, zeros, infinities and NaN; no denormals, which hardware flushes."""
    limits = {"f2": (-6, 6), "f4": (-40, 40), "f8": (-200, 200)}[np.dtype(dtype).str[1:]]
    if name == "exp":
        limits = (-4, 3) if dtype == F16 else (-8, 6)
    if name in ("sin", "cos"):
        limits = (-4, 3) if dtype == F16 else (-4, 5)
    specials = [0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -0.0, 2.0, 0.25]
    if name in ("sin", "cos"):
        specials = [0.0, 1.0, -1.0, np.nan, 0.5]

    def adjust(lanes, state):
        rng = np.random.default_rng(17)
        shape = lanes.shape[:2]
        values = (
            (1 + rng.random(shape)) * np.exp2(rng.integers(*limits, shape)) * rng.choice([1, 1, 1, -1], shape)
        )
        values = np.where(rng.random(shape) < 0.2, rng.choice(specials, shape), values).astype(dtype)
        size = np.dtype(dtype).itemsize
        if size == 2:
            lanes[..., 0] = values.view(np.uint16)
        else:
            lanes[..., : size // 4] = values[..., None].view(U32)

    return adjust


def transcendental():
    tau = 2 * np.pi
    lines = []
    for kind, dtype in (("f32", F32), ("f16", F16)):
        lines += [
            approximate(kind, dtype, "rcp", lambda a: 1 / a, 1),
            approximate(kind, dtype, "rsq", lambda a: 1 / np.sqrt(a), 1),
            approximate(kind, dtype, "sqrt", np.sqrt, 1),
            approximate(kind, dtype, "exp", np.exp2, 1),
            approximate(kind, dtype, "log", np.log2, 2),
        ]
    lines += [
        approximate("f32", F32, "rcp_iflag", lambda a: 1 / a, 1),
        approximate("f32", F32, "exp_legacy", np.exp2, 1),
        approximate("f32", F32, "log_legacy", np.log2, 2),
        # Hardware gives 2**29 ulp of double precision; software refines it.
        approximate("f64", F64, "rcp", lambda a: 1 / a, 2**29),
        approximate("f64", F64, "rsq", lambda a: 1 / np.sqrt(a), 2**29),
        approximate("f64", F64, "sqrt", np.sqrt, 2**29),
        *(
            _circular(kind, dtype, name, function, tau)
            for kind, dtype in (("f32", F32), ("f16", F16))
            for name, function in (("sin", np.sin), ("cos", np.cos))
        ),
    ]
    lines.append(case("v_trig_preop_f64", "f64 u32 -> f64", _two_over_pi_parts(), adjust=_few_segments))
    return lines


def _circular(kind, dtype, name, function, tau):
    """Of turns, not radians; the error is absolute, which one more added makes one of the last place."""
    add = f"v_add_{kind} D, 4.0, D"
    return case(
        f"v_{name}_{kind} D, A; {add}",
        f"{kind} -> {kind}",
        quiet(lambda a: (function(f64(a) * tau) + 4).astype(dtype)),
        ulp=1,
        adjust=_positive_normals(dtype, name),
    )


def _two_over_pi_parts():
    """v_trig_preop_f64: 53 bits of 2/pi from bit 53 times the segment on, where the operand is below 2**1077."""
    # 1201 bits of 2/pi after its point, by Machin's formula in integers; those behind them count as zeros.
    digits = 1300
    one = 1 << digits

    def arctan_of_inverse(n):
        term, total, k, sign = one // n, 0, 1, 1
        while term:
            total += sign * (term // k)
            term, k, sign = term // (n * n), k + 2, -sign
        return total

    pi = 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))
    two_over_pi = (2 * one * one) // pi

    def one_lane(a, segment):
        exponent = int(np.float64(a).view(np.uint64) >> np.uint64(52)) & 0x7FF
        shift = 53 * (int(segment) & 31)
        if exponent > 1077:
            shift += exponent - 1077
        bits = (two_over_pi >> (digits - 1201) << shift) >> (1201 - 53) & (2**53 - 1)
        scale = -53 - shift + (128 if exponent >= 1968 else 0)
        return float(Fraction(bits) * Fraction(2) ** scale)

    return np.vectorize(one_lane, otypes=[F64])


def _few_segments(lanes, state):
    lanes[..., 4] %= 8


def division():
    """The three helpers of a correctly rounded division, and the division that LLVM builds of them."""
    full = """v_div_scale_f32 v50, vcc, B, B, A; v_div_scale_f32 v51, vcc, A, B, A; v_rcp_f32 v52, v50;
v_fma_f32 v53, -v50, v52, 1.0; v_fma_f32 v52, v53, v52, v52; v_mul_f32 v53, v51, v52;
v_fma_f32 v54, -v50, v53, v51; v_fma_f32 v53, v54, v52, v53; v_fma_f32 v54, -v50, v53, v51;
v_div_fmas_f32 v55, v54, v52, v53; v_div_fixup_f32 D, v55, B, A; s_mov_b64 vcc, 0"""
    double = """v_div_scale_f64 v[50:51], s[50:51], B2, B2, A2; v_rcp_f64 v[52:53], v[50:51];
v_fma_f64 v[54:55], -v[50:51], v[52:53], 1.0; v_fma_f64 v[52:53], v[52:53], v[54:55], v[52:53];
v_fma_f64 v[54:55], -v[50:51], v[52:53], 1.0; v_fma_f64 v[52:53], v[52:53], v[54:55], v[52:53];
v_div_scale_f64 v[56:57], vcc, A2, B2, A2; v_mul_f64 v[58:59], v[56:57], v[52:53];
v_fma_f64 v[60:61], -v[50:51], v[58:59], v[56:57];
v_div_fmas_f64 v[62:63], v[60:61], v[52:53], v[58:59]; v_div_fixup_f64 D2, v[62:63], B2, A2; s_mov_b64 vcc, 0"""
    zero = np.zeros((1, 1), bool)
    return [
        case(full.replace("\n", " "), "f32 f32 -> f32 vcc", lambda a, b: (quiet(np.divide)(a, b), zero)),
        case(double.replace("\n", " "), "f64 f64 -> f64 vcc", lambda a, b: (quiet(np.divide)(a, b), zero)),
        # Operands in the middle of the range need no scaling. Those at its ends are the divisions' part above.
        case("v_div_scale_f32 D, vcc, A, A, B", "f32 f32 -> f32 vcc", lambda a, b: (a, zero), adjust=normals),
        case(
            "v_div_scale_f32 D, SD2, B, A, B",
            "f32 f32 -> f32 SD:mask",
            lambda a, b: (b, zero),
            adjust=normals,
        ),
        case(
            "v_div_scale_f64 D2, vcc, B2, A2, B2",
            "f64 f64 -> f64 vcc",
            lambda a, b: (b, zero),
            adjust=_tame_doubles,
        ),
        case("v_div_fmas_f32 D, A, B, C", "f32 f32 f32 -> f32", fma(F32), adjust=_no_scale),
        case("v_div_fmas_f64 D2, A2, B2, C2", "f64 f64 f64 -> f64", fma(F64), adjust=_no_scale),
        case("v_div_fixup_f32", "f32 f32 f32 -> f32", _fixup, adjust=_quotients(F32)),
        case("v_div_fixup_f64", "f64 f64 f64 -> f64", _fixup, adjust=_quotients(F64)),
        case("v_div_fixup_legacy_f16", "f16 f16 f16 -> f16", _fixup, adjust=_quotients(F16)),
        case("v_div_fixup_f16", "f16 f16 f16 -> f16lo", _fixup, adjust=_quotients(F16)),
    ]


def _no_scale(lanes, state):
    state[:, 16:18] = 0


def _tame_doubles(lanes, state):
    rng = np.random.default_rng(23)
    for register in (0, 4, 8):
        values = rng.standard_normal(lanes.shape[:2]) * np.exp2(rng.integers(-30, 30, lanes.shape[:2]))
        lanes[..., register : register + 2] = values[..., None].view(U32)


def _quotients(dtype):
    """The first operand becomes what the steps before give: the quotient, or a NaN where it overflows."""

    def adjust(lanes, state):
        words = np.dtype(dtype).itemsize // 4 or 1
        q, b, c = (np.ascontiguousarray(lanes[..., r : r + words]).view(dtype) for r in (0, 4, 8))
        with np.errstate(all="ignore"):
            q[...] = c / b
        if dtype != F16:
            rng = np.random.default_rng(47)
            q[np.isinf(q) & np.isfinite(c) & (rng.random(q.shape) < 0.5)] = np.nan
        lanes[..., :words] = q.view(U32)

    return adjust


@quiet
def _fixup(q, denominator, numerator):
    return numerator / denominator


CASES = [*arithmetic(), *compares(), *rounding_modes(), *flush_mode(), *transcendental(), *division()]
