"""Random HIP kernels without undefined behaviour, from a seed: integer and floating-point arithmetic of all
widths, branches, loops, calls, private arrays, LDS, exchanges between lanes and atomics."""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import random
import re

U32S, U64S, F32S, F64S, F16S = (tuple(f"{p}{i}" for i in range(n)) for p, n in
                                (("a", 5), ("b", 3), ("f", 3), ("d", 2), ("h", 3)))  # fmt: skip
VARIABLES = {"u32": U32S, "u64": U64S, "f32": F32S, "f64": F64S, "f16": F16S}
RESULTS = sum(map(len, VARIABLES.values()))
PLACE = re.compile(r"\{(u32|u64|f32|f64|f16)\}")
COUNTERS = 16
INPUT_WORDS = 4096
BLOCKS = 2


class Writer:
    """Writes one kernel."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.number = seed
        self.threads = self.rng.choice([64, 64, 128, 256])
        self.array = self.rng.random() < 0.3
        self.loops = 0

    def pick(self, *choices):
        return self.rng.choice(choices)

    def variable(self, kind):
        return f"L.{self.rng.choice(VARIABLES[kind])}"

    def leaf(self, kind):
        rng = self.rng
        if kind == "u32":
            return self.pick(
                self.variable("u32"), self.variable("u32"), "L.tid", "L.gid", f"{rng.getrandbits(32)}u",
                f"{rng.randrange(70)}u", f"in[({self.variable('u32')}) % {INPUT_WORDS}u]",
                f"(u32)((const {self.pick('u8', 'i8')}*)in)[{self.variable('u32')} % {4 * INPUT_WORDS}u]",
                f"(u32)((const {self.pick('u16', 'i16')}*)in)[{self.variable('u32')} % {2 * INPUT_WORDS}u]",
            )  # fmt: skip
        if kind == "u64":
            return self.pick(
                self.variable("u64"), f"{rng.getrandbits(64)}ull", f"(u64){self.variable('u32')}",
                f"(u64)(i64)(i32){self.variable('u32')}",
                f"((const u64*)in)[{self.variable('u32')} % {INPUT_WORDS // 2}u]",
            )  # fmt: skip
        number = rng.choice(["0.5", "-2.0", "3.25", "1e-3", "0.0", "1024.0", "-0.1"])
        constant = {"f32": f"({number}f)", "f64": f"({number})", "f16": f"(f16)({number})"}
        made = {"f32": "to_f32({u32})", "f64": "to_f64({u64})", "f16": "to_f16({u32})"}[kind]
        made = made.format(u32=self.variable("u32"), u64=self.variable("u64"))
        return self.pick(self.variable(kind), self.variable(kind), constant[kind], made)

    def expression(self, kind, depth=3):
        if depth == 0 or self.rng.random() < 0.1:
            return self.leaf(kind)
        text = self.rng.choice(getattr(self, f"_{kind}"))
        # Each {kind} in the text is another expression of that kind.
        return f"({PLACE.sub(lambda match: self.expression(match.group(1), depth - 1), text)})"

    _u32 = (
        "{u32} + {u32}", "{u32} - {u32}", "{u32} * {u32}", "{u32} & {u32}", "{u32} | {u32}", "{u32} ^ {u32}",
        "~{u32}", "-{u32}", "{u32} << ({u32} & 31)", "{u32} >> ({u32} & 31)", "sra({u32}, {u32})",
        "rotl({u32}, {u32})", "div_u32({u32}, {u32})", "rem_u32({u32}, {u32})", "div_i32({u32}, {u32})",
        "clz({u32})", "ctz({u32})", "popcount({u32})", "popcount64({u64})", "reverse({u32})",
        "(u32)(((u64){u32} * {u32}) >> 32)", "(u32)(((i64)(i32){u32} * (i32){u32}) >> 32)",
        "{u32} < {u32} ? {u32} : {u32}", "(i32){u32} < (i32){u32} ? {u32} : {u32}", "(u32){u64}",
        "(u32)({u64} >> 32)", "to_u32({f32})", "to_i32({f32})", "to_i32d({f64})", "bits({f32})", "bits({f16})",
        "{f32} < {f32} ? {u32} : {u32}", "{f64} <= {f64} ? {u32} : {u32}", "(u32)(u8){u32}", "(u32)(i32)(i16){u32}",
        "(u32)(u16)((u16){u32} * 3u + (u16){u32})", "(u32)(i32)(i8)((i8){u32} - (i8){u32})",
        "({u32} >> 8 & 0xffu) | ({u32} & 0xff00ffu)", "{u32} * 5u + {u32}", "({u32} & 0xffffffu) * ({u32} & 0xfffu)",
        "({u64} == {u64}) + {u32}", "{u32} >= {u32} ? {u32} : {u32} + 1u",
        "__builtin_bit_cast(u32, (u16x2)(__builtin_bit_cast(u16x2, {u32}) + __builtin_bit_cast(u16x2, {u32})))",
        "__builtin_bit_cast(u32, (u16x2)(__builtin_bit_cast(u16x2, {u32}) * __builtin_bit_cast(u16x2, {u32})))",
        "called_u32({u32}, {u32})",
    )  # fmt: skip
    _u64 = (
        "{u64} + {u64}", "{u64} - {u64}", "{u64} * {u64}", "{u64} & {u64}", "{u64} | {u64}", "{u64} ^ {u64}",
        "~{u64}", "{u64} << ({u64} & 63)", "{u64} >> ({u64} & 63)", "sra64({u64}, {u64})", "mulhi({u64}, {u64})",
        "div_u64({u64}, {u64})", "rem_u64({u64}, {u64})", "div_i64({u64}, {u64})", "(u64){u32} * {u32}",
        "{u64} < {u64} ? {u64} : {u64}", "(i64){u64} > (i64){u64} ? {u64} : {u64}", "to_i64({f64})",
        "to_u64f({f32})", "bits({f64})", "(u64){u32} << 32 | {u32}", "(u64){u32} + {u64}",
        "{f16} > {f16} ? {u64} : {u64}",
    )  # fmt: skip
    _f32 = (
        "{f32} + {f32}", "{f32} - {f32}", "{f32} * {f32}", "{f32} / {f32}", "-{f32}", "__builtin_fabsf({f32})",
        "__builtin_fmaf({f32}, {f32}, {f32})", "__builtin_sqrtf(__builtin_fabsf({f32}))", "__builtin_floorf({f32})",
        "__builtin_truncf({f32})", "__builtin_rintf({f32})", "__builtin_ceilf({f32})", "(f32){f64}", "(f32){f16}",
        "(f32){u32}", "(f32)(i32){u32}", "(f32){u64}", "(f32)(i64){u64}", "__builtin_copysignf({f32}, to_f32({u32}))",
        "{f32} < {f32} ? {f32} : {f32}", "{u32} > {u32} ? {f32} : {f32}", "{f32} * {f32} + {f32}",
        "(((f32x2){{f32}, {f32}}) * ((f32x2){{f32}, {f32}})).x", "(f32)(u8){u32}",
    )  # fmt: skip
    _f64 = (
        "{f64} + {f64}", "{f64} - {f64}", "{f64} * {f64}", "{f64} / {f64}", "-{f64}",
        "__builtin_fma({f64}, {f64}, {f64})", "__builtin_sqrt(__builtin_fabs({f64}))", "__builtin_floor({f64})",
        "__builtin_rint({f64})", "(f64){f32}", "(f64){u32}", "(f64)(i32){u32}", "(f64){u64}", "(f64)(i64){u64}",
        "{f64} < {f64} ? {f64} : {f64}", "__builtin_trunc({f64})", "__builtin_fabs({f64})",
    )  # fmt: skip
    _f16 = (
        "{f16} + {f16}", "{f16} - {f16}", "{f16} * {f16}", "-{f16}", "(f16){f32}", "(f16)(f32)(u16){u32}",
        "(f16)(f32)(i16){u32}", "{f16} < {f16} ? {f16} : {f16}", "(f16){f64}",
        "(((f16x2){{f16}, {f16}}) + ((f16x2){{f16}, {f16}})).y",
        "(((f16x2){{f16}, {f16}}) * ((f16x2){{f16}, {f16}})).x",
    )  # fmt: skip

    def assignment(self):
        kind = self.pick("u32", "u32", "u32", "u64", "u64", "f32", "f32", "f64", "f16")
        if self.array and self.rng.random() < 0.25:
            index = f"{self.expression('u32', 1)} % 8u"
            return self.pick(
                f"L.array[{index}] = {self.expression('u32')};", f"{self.variable('u32')} = L.array[{index}];"
            )
        target = self.variable(kind)
        return f"{target} = {self.expression(kind)};"

    def condition(self):
        return self.pick(
            f"{self.expression('u32', 1)} < {self.expression('u32', 1)}", f"({self.variable('u32')} & 3u) == 1u",
            f"{self.expression('f32', 1)} > {self.expression('f32', 1)}", f"(L.tid & {1 << self.rng.randrange(6)}u)",
            f"(i64){self.expression('u64', 1)} < (i64){self.expression('u64', 1)}", "(L.gid % 3u) != 0u",
            f"{self.expression('f64', 1)} != {self.expression('f64', 1)}",
        )  # fmt: skip

    def statement(self, depth):
        """One statement of one lane."""
        roll = self.rng.random()
        if depth == 0 or roll < 0.55:
            return self.assignment()
        if roll < 0.75:
            other = f" else {{ {self.statements(depth - 1)} }}" if self.rng.random() < 0.5 else ""
            return f"if ({self.condition()}) {{ {self.statements(depth - 1)} }}{other}"
        if roll < 0.92:
            self.loops += 1
            i = f"k{self.loops}"
            leave = (
                f"if ({self.condition()}) {self.pick('break', 'continue')};"
                if self.rng.random() < 0.5
                else ""
            )
            count = self.pick(
                f"{self.rng.randrange(1, 5)}u", f"({self.variable('u32')} & 7u)", "(L.tid % 5u)"
            )
            # The bound is taken once: the body may change what it was made of.
            return (
                f"for (u32 {i} = 0, n{i} = {count}; {i} < n{i}; ++{i}) {{ {self.statements(depth - 1)} {leave}"
                f" {self.variable('u32')} += {i}; }}"
            )
        cases = " ".join(f"case {k}: {self.assignment()} break;" for k in range(self.rng.randrange(2, 6)))
        return f"switch ({self.variable('u32')} & 7u) {{ {cases} default: {self.assignment()} }}"

    def statements(self, depth):
        return " ".join(self.statement(depth) for _ in range(self.rng.randrange(1, 4)))

    def step(self):
        """A step of all lanes of the block."""
        rng = self.rng
        a, b = rng.choice(U32S), rng.choice(U32S)
        roll = rng.random()
        if roll < 0.45:
            return f"EACH({self.statements(2)})"
        if roll < 0.70:
            wide = f"SHUFFLE64({rng.choice(U64S)}, {rng.choice(U64S)}, L.tid ^ {rng.randrange(64)}u)"
            return self.pick(
                f"SHUFFLE({a}, {b}, {self.variable('u32')})", f"SHUFFLE({a}, {b}, L.tid + {rng.randrange(64)}u)", wide,
                f"BALLOT({rng.choice(U64S)}, ({self.condition()}))", f"FIRST({a}, {b})",
                f"ROTATE_ROW({a}, {b}, {rng.randrange(1, 16)})", f"SHIFT_ROW({a}, {b}, {rng.randrange(1, 16)})",
                f"REVERSE_ROW({a}, {b})", f"QUAD({a}, {b}, {', '.join(str(rng.randrange(4)) for _ in range(4))})",
                f"SWIZZLE({a}, {b}, {rng.randrange(1, 32)})",
            )  # fmt: skip
        if roll < 0.82:
            # Each lane writes its own place; after the barrier any place may be read.
            kind = self.pick("u32", "u64")
            name = f"lds_{kind}"
            return (
                f"EACH({name}[L.tid] = {self.expression(kind)};) BARRIER"
                f" EACH({self.variable(kind)} = {name}[{self.expression('u32', 1)} % {self.threads}u];) BARRIER"
            )
        op, width = rng.choice(["add", "or", "xor", "and", "max", "min"]), self.pick("u32", "u64")
        if roll < 0.90:
            name = f"lds_{width}"
            guard = f"if ({self.condition()}) " if rng.random() < 0.5 else ""
            return (
                f"EACH({name}[L.tid] = {self.expression(width, 1)};) BARRIER"
                f" EACH({guard}ATOMIC(fetch_{op}, &{name}[{self.variable('u32')} % 16u], {self.expression(width, 2)});)"
                f" BARRIER EACH({self.variable(width)} = {name}[{self.expression('u32', 1)} % {self.threads}u];) BARRIER"
            )
        # A counter takes only one kind of operation: sequences of different ones depend on their order.
        place = {"add": 0, "or": 1, "xor": 2, "and": 3, "max": 4, "min": 5}[op]
        if width == "u64":
            return f"EACH(ATOMIC(fetch_{op}, &counters[{place}], {self.expression('u64', 2)});)"
        return f"EACH(ATOMIC(fetch_{op}, (u32*)&counters[8 + {place}], {self.expression('u32', 2)});)"

    def kernel(self):
        """The text of the kernel."""
        members = "u32 tid, gid; " + " ".join(
            f"{kind} {', '.join(names)};" for kind, names in VARIABLES.items()
        )
        if self.array:
            members += " u32 array[8];"
        n = self.number
        start = " ".join(
            f"L.{name} = {self.leaf(kind)};" for kind, names in VARIABLES.items() for name in names
        )
        lines = [f"struct Lane{n} {{ {members} }};"]
        lines += [
            f"GLOBAL_KERNEL(kernel{n}, {self.threads}) {{",
            f"SHARED(u32, lds_u32, {self.threads});",
            f"SHARED(u64, lds_u64, {self.threads});",
            f"BEGIN(Lane{n}, {self.threads})",
            f"EACH({start})",
        ]
        for _ in range(self.rng.randrange(4, 9)):
            if self.rng.random() < 0.15:
                body = " ".join(self.step() for _ in range(2))
                lines.append(
                    f"for (u32 round = 0; round < {self.rng.randrange(2, 4)}u; ++round) {{ {body} }}"
                )
            else:
                lines.append(self.step())
        stores = []
        for kind, names in VARIABLES.items():
            for name in names:
                value = f"L.{name}" if kind[0] == "u" else f"bits(L.{name})"
                stores.append(f"out[L.gid * {RESULTS}u + {len(stores)}u] = {value};")
        lines += [f"EACH({' '.join(stores)})", "END", "}"]
        return "\n".join(lines)


CALLED = """CALLED u32 called_u32(u32 a, u32 b) {
  u32 sum = a;
  for (u32 i = 0; i < (b & 3u); ++i) sum = sum * 3u + (sum >> 7) + b;
  return sum;
}
"""


def translation_unit(seeds):
    """The source of the kernels of these seeds, and how many threads each one's block has."""
    writers = [Writer(seed) for seed in seeds]
    text = '#include "random_lanes.h"\n' + CALLED + "\n".join(writer.kernel() for writer in writers) + "\n"
    return text, [writer.threads for writer in writers]


def operations():
    """Every operation of the grammar as (result's kind, text)."""
    return [(kind, text) for kind in VARIABLES for text in getattr(Writer, f"_{kind}")]


def operations_unit(whose):
    """A translation unit with a kernel for each operation alone: kernel `i` stores what operation `i` gives.

    Operands are words as they are, or numbers of moderate size; each lane has its own where `whose` is "L.gid",
    and each block where it is "block", for which the compiler uses scalar instructions.
    """
    word = f"in[({whose} * 8u + {{0}}u) % {INPUT_WORDS}u]"
    lines = ['#include "random_lanes.h"', CALLED, "struct Lane { u32 tid, gid; };"]
    for i, (kind, text) in enumerate(operations()):
        place = iter(range(0, 100, 2))

        def operand(match, place=place):
            at = next(place)
            low, high = word.format(at), word.format(at + 1)
            # Half of the wide integers are small: divisions have a short way for them.
            raw = {"u32": low, "u64": f"((u64)({high} & 32u ? {high} : 0u) << 32 | {low})"}
            moderate = f"({high} & 64u)"
            made = {
                **raw,
                "f32": f"({moderate} ? to_f32({low}) : __builtin_bit_cast(f32, {low}))",
                "f64": f"({moderate} ? to_f64({raw['u64']}) : __builtin_bit_cast(f64, {raw['u64']}))",
                "f16": f"({moderate} ? to_f16({low}) : __builtin_bit_cast(f16, (u16){low}))",
            }
            return made[match.group(1)]

        value = PLACE.sub(operand, text)
        value = f"({kind})({value})"
        value = value if kind[0] == "u" else f"bits({value})"
        lines.append(f"GLOBAL_KERNEL(kernel{i}, 64) {{ BEGIN(Lane, 64) EACH(out[L.gid] = {value};) END }}")
    return "\n".join(lines) + "\n"
