"""One instruction, executed on many operands in a kernel of its own.

A table's line names the instruction, the kinds of its operands and results, and a function that states its
meaning in NumPy. The kernel around it loads every register an instruction may read, also those that it
should leave alone, executes it, and stores every register that it may write.

    vector registers   A v[16:19]  B v[20:23]  C v[24:27]  D v[28:31], the destination
    scalar registers   SA s[20:23] SB s[24:27] SC s[28:31] SD s[32:35], the destination
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from isa import kernels
from isa.kinds import KINDS

LANES = 64
VECTOR_WAVES = 8
SCALAR_WAVES = 96
FIRST = {"A": 16, "B": 20, "C": 24, "D": 28, "SA": 20, "SB": 24, "SC": 28, "SD": 32}
# Words of one wave's scalar state, in and out.
STATE = {"SA": 0, "SB": 4, "SC": 8, "SD": 12, "vcc": 16, "exec": 18, "scc": 20, "m0": 21}
STATE_WORDS = 24
BITS = 1 << np.arange(LANES, dtype=np.uint64)


@dataclasses.dataclass
class Case:
    """An instruction with its meaning.

    Attributes:
        text: mnemonic, or mnemonic and operands in which `A2` is the 64-bit register pair of operand A.
        sources, results: (register, kind) each.
        oracle: takes the sources as arrays, [waves, lanes] or of scalars [waves, 1], gives the results.
        ulp: the difference that is allowed, in units of the last place of the right result.
    """

    text: str
    sources: list
    results: list
    oracle: Callable
    scalar: bool = False
    ulp: float = 0
    mode: str = "ieee"
    # Changes the random words in place before the launch: {register: words}.
    adjust: Callable | None = None

    @property
    def mnemonics(self):
        from isa.toolchain import base_name

        return {base_name(line.split()[0]) for line in self.text.split(";") if line.split()}

    @property
    def id(self):
        return re.sub(
            r"\W+", "_", f"{self.text}_{'_'.join(kind for _, kind in self.sources)}_{self.mode}"
        ).strip("_")

    @property
    def waves(self):
        return SCALAR_WAVES if self.scalar else VECTOR_WAVES


IMPLICIT = ("vcc", "exec", "scc", "m0", "old")


def case(text, signature, oracle, *, scalar=False, **options):
    """`"f32 SA:u32 -> f32 vcc"`: sources take A, B, C in turn unless they name their register."""
    sources, results = (side.split() for side in signature.split("->"))
    prefix = "S" if scalar else ""
    letters = iter("ABC")
    named = []
    for token in sources:
        register, _, kind = token.rpartition(":")
        if token in ("vcc", "exec", "scc", "m0"):
            register, kind = token, "mask" if token in ("vcc", "exec") else "bit" if token == "scc" else "u32"
            if scalar and kind == "mask":
                kind = "u64"
        elif register == "old":
            register = prefix + "D"
        elif not register:
            register = prefix + next(letters)
        named.append((register, kind))
    written = []
    for token in results:
        register, _, kind = token.rpartition(":")
        if token in ("vcc", "exec", "scc", "m0"):
            register, kind = token, "mask" if token in ("vcc", "exec") else "bit" if token == "scc" else "u32"
            if scalar and kind == "mask":
                kind = "u64"
        elif not register:
            register = prefix + "D"
        written.append((register, kind))
    if " " not in text.strip():
        operands = [r + _width(kind) for r, kind in written if r not in IMPLICIT]
        implicit_old = sum(token.startswith("old:") for token in sources)
        explicit = [s for s, token in zip(named, sources, strict=True) if not token.startswith("old:")]
        assert implicit_old + len(explicit) == len(named)
        operands += [r + _width(kind) for r, kind in explicit if r not in IMPLICIT]
        text = f"{text} {', '.join(operands)}"
    return Case(text, named, written, oracle, scalar, **options)


def _width(kind):
    dwords = 2 if kind == "mask" else KINDS[kind].dwords
    return "" if dwords == 1 else str(dwords)


def _expanded(text):
    """`v_add_f64 D2, A2, B2` -> `v_add_f64 v[28:29], v[16:17], v[20:21]`, one instruction a line."""

    def register(match):
        name, dwords = match.group(1), int(match.group(2) or 1)
        bank, first = ("s" if name[0] == "S" else "v"), FIRST[name]
        return f"{bank}{first}" if dwords == 1 else f"{bank}[{first}:{first + dwords - 1}]"

    lines = [re.sub(r"\b(S?[ABC]|S?D)(\d?)\b", register, line.strip()) for line in text.split(";")]
    return "\n".join(lines)


def kernel(one, name):
    """The kernel of a case: arguments are lanes' operands, waves' state, lanes' results, waves' results."""
    if one.scalar:
        load = store = ""
    else:
        load = """v_lshlrev_b32 v2, 6, v1
global_load_dwordx4 v[16:19], v2, s[8:9]
global_load_dwordx4 v[20:23], v2, s[8:9] offset:16
global_load_dwordx4 v[24:27], v2, s[8:9] offset:32
global_load_dwordx4 v[28:31], v2, s[8:9] offset:48"""
        store = """v_lshlrev_b32 v2, 4, v1
global_store_dwordx4 v2, v[28:31], s[12:13]"""
    save = "\n".join(
        f"v_mov_b32 v{40 + i}, s{register}"
        for i, register in enumerate([*range(20, 36), 48, 49, 46, 47, 44, 45])
    )
    body = f"""s_load_dwordx8 s[8:15], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
s_lshl_b32 s3, s2, 6
v_add_u32 v1, s3, v0
s_waitcnt lgkmcnt(0)
{load}
s_mul_i32 s4, s2, {4 * STATE_WORDS}
s_add_u32 s10, s10, s4
s_addc_u32 s11, s11, 0
s_load_dwordx16 s[20:35], s[10:11], 0x0
s_load_dwordx8 s[36:43], s[10:11], 0x40
s_waitcnt vmcnt(0) lgkmcnt(0)
s_mov_b32 m0, s41
s_mov_b64 vcc, s[36:37]
s_cmp_lg_u32 s40, 0
s_mov_b64 exec, s[38:39]
s_nop 7
{_expanded(one.text)}
s_nop 7
s_nop 7
s_cselect_b32 s44, 1, 0
s_mov_b32 s45, m0
s_mov_b64 s[46:47], exec
s_mov_b64 s[48:49], vcc
s_mov_b64 exec, -1
s_waitcnt vmcnt(0) lgkmcnt(0)
{store}
{save}
s_mov_b64 exec, 1
s_mul_i32 s4, s2, {4 * STATE_WORDS}
v_mov_b32 v2, s4
""" + "\n".join(
        f"global_store_dwordx4 v2, v[{40 + 4 * i}:{43 + 4 * i}], s[14:15] offset:{16 * i}"
        for i in range(STATE_WORDS // 4)
    )
    return kernels.Kernel(name, body, 4, mode=one.mode)


def _masks(rng, waves):
    masks = rng.integers(0, 2**64, waves, dtype=np.uint64)
    masks[: waves // 2] = 2**64 - 1
    masks[waves // 2] = 1 << 17
    return masks


def operands(one, rng):
    """Random words: lanes' registers [waves, 64, 16] and waves' state [waves, 24]."""
    lanes = rng.integers(0, 2**32, (one.waves, LANES, 16), dtype=np.uint32)
    state = rng.integers(0, 2**32, (one.waves, STATE_WORDS), dtype=np.uint32)
    state[:, 18:20] = _masks(rng, one.waves).view(np.uint32).reshape(-1, 2)
    state[:, 20] = rng.integers(0, 2, one.waves)
    for register, kind in one.sources:
        if register in ("vcc", "exec", "scc", "m0") or kind == "mask":
            continue
        if register.startswith("S"):
            first = STATE[register]
            state[:, first : first + KINDS[kind].dwords] = KINDS[kind].random(rng, (one.waves,))
        else:
            first = FIRST[register] - 16
            lanes[..., first : first + KINDS[kind].dwords] = KINDS[kind].random(rng, (one.waves, LANES))
    if one.adjust:
        one.adjust(lanes, state)
    return lanes, state


def unpacked(words):
    """uint32 [waves, 2] -> bool [waves, 64], a bit for each lane."""
    masks = np.ascontiguousarray(words).view(np.uint64)
    return (masks & BITS) != 0


def packed(bits):
    """bool [waves, 64] -> uint32 [waves, 2]."""
    return np.where(bits, BITS, np.uint64(0)).sum(axis=1, dtype=np.uint64).view(np.uint32).reshape(-1, 2)


def _source(register, kind, lanes, state):
    if register.startswith("S") or register in ("vcc", "exec", "scc", "m0"):
        first = STATE[register]
        if kind == "mask":
            return unpacked(state[:, first : first + 2])
        if kind == "bit":
            return (state[:, first] != 0)[:, None]
        values = KINDS[kind].decode(state[:, first:])
        return values[:, None]
    return KINDS[kind].decode(lanes[..., FIRST[register] - 16 :])


@dataclasses.dataclass
class Outcome:
    """What a case's launch left: lanes' destination [waves, 64, 4] and waves' state [waves, 24]."""

    lanes: np.ndarray
    state: np.ndarray


def expected(one, lanes, state):
    """The right outcome: what the instruction does not name stays as it was."""
    right = Outcome(lanes[..., 12:].copy(), state.copy())
    values = one.oracle(*(_source(register, kind, lanes, state) for register, kind in one.sources))
    values = values if isinstance(values, tuple) else (values,)
    active = unpacked(state[:, 18:20])
    for (register, kind), value in zip(one.results, values, strict=True):
        if kind == "mask":
            first = STATE[register]
            right.state[:, first : first + 2] = packed(np.broadcast_to(value, active.shape) & active)
        elif kind == "bit":
            right.state[:, STATE[register]] = np.broadcast_to(value, (one.waves, 1))[:, 0]
        elif register == "D":
            words = KINDS[kind].encode(value)
            words = np.broadcast_to(words, (one.waves, LANES, words.shape[-1]))
            count = words.shape[-1]
            right.lanes[..., :count] = np.where(active[..., None], words, right.lanes[..., :count])
        else:
            words = KINDS[kind].encode(value)
            words = np.broadcast_to(words, (one.waves, 1, words.shape[-1]))[:, 0]
            right.state[:, STATE[register] : STATE[register] + words.shape[-1]] = words
    return right


def check(one, lanes, state, got):
    """Fails with the operands of the first few places where the outcome is not the right one."""
    right = expected(one, lanes, state)
    active = unpacked(state[:, 18:20])
    wrong_lanes = (got.lanes != right.lanes).any(axis=-1) if not one.scalar else np.zeros(active.shape, bool)
    wrong_state = got.state[:, :22] != right.state[:, :22]
    for register, kind in one.results:
        if kind in ("mask", "bit"):
            continue
        count = KINDS[kind].dwords
        if register == "D":
            judged = KINDS[kind].differing(got.lanes, right.lanes, one.ulp)
            untouched = (got.lanes[..., count:] != right.lanes[..., count:]).any(axis=-1)
            wrong_lanes = np.where(active, judged | untouched, wrong_lanes)
        elif register.startswith("S"):
            first = STATE[register]
            judged = KINDS[kind].differing(
                got.state[:, first : first + 4], right.state[:, first : first + 4], one.ulp
            )
            wrong_state[:, first : first + count] = judged[:, None]
    if not wrong_lanes.any() and not wrong_state.any():
        return
    lines = [
        f"{one.text}: wrong in {wrong_lanes.sum()} lanes and {wrong_state.any(axis=1).sum()} waves' state"
    ]
    for wave, lane in np.argwhere(wrong_lanes)[:6]:
        values = [_source(r, k, lanes, state) for r, k in one.sources]
        shown = [v[wave, min(lane, v.shape[1] - 1)] for v in values]
        lines.append(
            f"wave {wave} lane {lane} {'active' if active[wave, lane] else 'inactive'}: sources {shown}"
            f" words {_hex(lanes[wave, lane])} -> got {_hex(got.lanes[wave, lane])}"
            f" expected {_hex(right.lanes[wave, lane])}"
        )
    names = [f"{name}[{i - first}]" for i in range(22) for name, first in _named(i)]
    for wave in np.flatnonzero(wrong_state.any(axis=1))[:4]:
        for i in np.flatnonzero(wrong_state[wave]):
            lines.append(
                f"wave {wave} {names[i]}: got {got.state[wave, i]:#x} expected {right.state[wave, i]:#x};"
                f" state {_hex(state[wave])}"
            )
    raise AssertionError("\n".join(lines))


def _named(i):
    return [max(((n, f) for n, f in STATE.items() if f <= i), key=lambda pair: pair[1])]


def _hex(words):
    return " ".join(f"{word:x}" for word in words)
