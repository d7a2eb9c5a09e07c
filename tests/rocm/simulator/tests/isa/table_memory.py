"""Loads, stores and atomics on global memory, through buffer descriptors, and on LDS.

Every wave has a region of its own. A line's oracle is called for each active lane in turn, with the region's
bytes, the address within the region, the lane's data words and its old destination; it changes the region in
place and returns the destination.
"""

# ruff: noqa: E501 (what a line of a table says is read in one piece)

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np

from isa.kernels import Kernel
from isa.toolchain import base_name

REGION = 4096
WAVES = 4
BUFFER_END = 2048  # of the descriptor's records: the second half of a region is out of its bounds
WORDS_OUT = 16
F16, F32, F64 = np.float16, np.float32, np.float64
BF16 = ml_dtypes.bfloat16


@dataclasses.dataclass
class MemoryCase:
    """An access.

    Attributes:
        text: with the registers A2 (the lane's address), C (its offset in the region), B (data), D
            (destination), S2 (the region's address), R4 (a buffer descriptor of the region's first half) and
            T4 (one whose elements are 32 bytes apart).
        disp: what the text adds to the lane's offset, in bytes.
        place: how offsets are drawn: each lane a slot of its own, all lanes few slots, or anywhere.
    """

    text: str
    oracle: Callable
    disp: int = 0
    place: str = "own"
    lds: bool = False
    align: int = 16
    high: int = REGION
    # Values of the data words that matter, such as a comparison that must succeed now and then.
    data: Callable | None = None
    # Whether the oracle is called once for a wave: with the region, the offsets, the data, the destinations and
    # which lanes are active, each for all lanes.
    whole: bool = False
    scratch: int = 0

    @property
    def id(self):
        return (
            self.text.split("; ")[-1 if self.scratch or self.whole else 0].replace(" ", "_").replace(",", "")
        )

    @property
    def mnemonics(self):
        return {base_name(line.split()[0]) for line in self.text.split(";")}


def kernel(one, name):
    """Arguments: lanes' operands [waves, 64, 32], the regions, the results [waves, 64, 16], EXEC [waves, 2]."""
    names = {"A2": "v[16:17]", "B4": "v[20:23]", "B3": "v[20:22]", "B2": "v[20:21]", "B": "v20", "C": "v24",
             "E2": "v[22:23]", "E": "v21", "D4": "v[28:31]", "D3": "v[28:30]", "D2": "v[28:29]", "D": "v28",
             "S2": "s[20:21]", "R4": "s[24:27]", "T4": "s[28:31]", "O": "s32"}  # fmt: skip
    lines = [
        " ".join(_renamed(word, names) for word in line.replace(",", " , ").split())
        for line in one.text.split(";")
    ]
    copy_in = copy_out = ""
    if one.lds:
        copy_in = "v_lshlrev_b32 v3, 4, v0\n" + "\n".join(
            f"v_add_u32 v4, {1024 * i}, v3\nglobal_load_dwordx4 v[60:63], v4, s[20:21]\ns_waitcnt vmcnt(0)\n"
            f"ds_write_b128 v4, v[60:63]"
            for i in range(REGION // 1024)
        )
        copy_out = "v_lshlrev_b32 v3, 4, v0\n" + "\n".join(
            f"v_add_u32 v4, {1024 * i}, v3\nds_read_b128 v[60:63], v4\ns_waitcnt lgkmcnt(0)\n"
            f"global_store_dwordx4 v4, v[60:63], s[20:21]"
            for i in range(REGION // 1024)
        )
    loads = "\n".join(
        f"global_load_dwordx4 v[{r}:{r + 3}], v2, s[8:9] offset:{16 * i}"
        for i, r in enumerate((20, 24, 28, 32, 36, 40))
    )
    stores = "\n".join(
        f"global_store_dwordx4 v2, v[{28 + 4 * i}:{31 + 4 * i}], s[12:13] offset:{16 * i}"
        for i in range(WORDS_OUT // 4)
    )
    body = f"""s_load_dwordx8 s[8:15], s[0:1], 0x0
s_mov_b32 m0, -1
v_and_b32 v0, 0x3ff, v0
s_lshl_b32 s3, s2, 6
v_add_u32 v1, s3, v0
v_lshlrev_b32 v2, 7, v1
s_waitcnt lgkmcnt(0)
{loads}
s_lshl_b32 s4, s2, 3
s_add_u32 s14, s14, s4
s_addc_u32 s15, s15, 0
s_load_dwordx2 s[18:19], s[14:15], 0x0
s_lshl_b32 s4, s2, 12
s_add_u32 s20, s10, s4
s_addc_u32 s21, s11, 0
s_mov_b32 s24, s20
s_mov_b32 s25, s21
s_mov_b32 s26, {BUFFER_END}
s_mov_b32 s27, 0x00020000
s_mov_b32 s28, s20
s_or_b32 s29, s21, 0x00200000
s_mov_b32 s30, {BUFFER_END // 32}
s_mov_b32 s31, 0x00020000
s_movk_i32 s32, 48
s_waitcnt vmcnt(0) lgkmcnt(0)
v_mov_b32 v17, s21
v_add_co_u32 v16, vcc, s20, v24
v_addc_co_u32 v17, vcc, 0, v17, vcc
{copy_in}
s_waitcnt vmcnt(0) lgkmcnt(0)
s_mov_b64 exec, s[18:19]
{chr(10).join(lines)}
s_waitcnt vmcnt(0) lgkmcnt(0)
s_mov_b64 exec, -1
{copy_out}
v_lshlrev_b32 v2, 6, v1
{stores}"""
    return Kernel(name, body, 4, lds=REGION if one.lds else 0, scratch=one.scratch)


def _renamed(word, names):
    return names.get(word, word)


def operands(one, rng):
    """Lanes' words [waves, 64, 32] as the kernel loads them, the regions, and EXEC's words."""
    lanes = rng.integers(0, 2**32, (WAVES, 64, 32), dtype=np.uint32)
    memory = rng.integers(0, 256, (WAVES, REGION), dtype=np.uint8)
    low = max(0, -one.disp)
    room = one.high - 64 - low - max(one.disp, 0)
    if one.place == "own":
        slot = 32 if room >= 64 * 32 else 16
        offsets = np.stack([rng.permutation(room // slot)[:64] * slot for _ in range(WAVES)])
    elif one.place == "few":
        offsets = rng.integers(0, 3, (WAVES, 64)) * 16
    else:
        offsets = rng.integers(0, room // one.align, (WAVES, 64)) * one.align
    lanes[..., 4] = offsets + low
    if one.data:
        one.data(lanes, memory, rng)
    exec_ = rng.integers(0, 2**64, WAVES, dtype=np.uint64)
    exec_[:2] = 2**64 - 1
    return lanes, memory, exec_.view(np.uint32).reshape(WAVES, 2)


def expected(one, lanes, memory, exec_):
    """The destination [waves, 64, 16] and the regions."""
    out, after = lanes[..., 8:24].copy(), memory.copy()
    masks = exec_.reshape(-1).view(np.uint64)
    for wave in range(WAVES):
        active = np.array([int(masks[wave]) >> lane & 1 for lane in range(64)], bool)
        if one.whole:
            one.oracle(after[wave], lanes[wave, :, 4] + one.disp, lanes[wave, :, :4], out[wave], active)
            continue
        for lane in range(64):
            if active[lane]:
                address = int(lanes[wave, lane, 4]) + one.disp
                result = one.oracle(after[wave], address, lanes[wave, lane, :4], out[wave, lane])
                if result is not None:
                    result = np.asarray(result, np.uint32).reshape(-1)
                    out[wave, lane, : len(result)] = result
    return out, after


def words_at(memory, address, count):
    return memory[address : address + 4 * count].view(np.uint32).copy()


def load(count):
    return lambda memory, address, data, old: words_at(memory, address, count)


def load_small(dtype):
    """A byte or a short, extended to a word."""

    def call(memory, address, data, old):
        value = memory[address : address + np.dtype(dtype).itemsize].view(dtype)[0]
        return [int(value) & 0xFFFFFFFF]

    return call


def load_half(dtype, high):
    """A byte or a short, extended to 16 bits; the register's other half stays."""

    def call(memory, address, data, old):
        value = int(memory[address : address + np.dtype(dtype).itemsize].view(dtype)[0]) & 0xFFFF
        kept = int(old[0])
        return [(kept & 0xFFFF) | value << 16 if high else (kept & 0xFFFF0000) | value]

    return call


def store(count):
    def call(memory, address, data, old):
        memory[address : address + 4 * count] = data[:count].view(np.uint8)

    return call


def store_small(size, first=0):
    def call(memory, address, data, old):
        memory[address : address + size] = data.view(np.uint8)[first : first + size]

    return call


def bounded_load(oracle, size):
    """Beyond a buffer's records loads give zero."""

    def call(memory, address, data, old):
        inside = address + size <= BUFFER_END
        return oracle(memory, address, data, old) if inside else [0] * max(1, size // 4)

    return call


def bounded_store(oracle, size):
    """Beyond a buffer's records stores are dropped."""

    def call(memory, address, data, old):
        if address + size <= BUFFER_END:
            oracle(memory, address, data, old)

    return call


def update(dtype, function, returns):
    """Memory becomes function(memory, data); the old value is returned where asked."""
    size = np.dtype(dtype).itemsize

    def call(memory, address, data, old):
        before = memory[address : address + size].copy()
        with np.errstate(all="ignore"):
            after = np.asarray(function(before.view(dtype), data.view(dtype)[:1]), dtype)
        memory[address : address + size] = after.reshape(-1).view(np.uint8)
        return before.view(np.uint32) if returns else None

    return call


def update_pair(dtype, returns):
    """Two 16-bit sums."""

    def call(memory, address, data, old):
        before = memory[address : address + 4].copy()
        with np.errstate(all="ignore"):
            after = before.view(dtype).astype(F32) + data.view(dtype)[:2].astype(F32)
        memory[address : address + 4] = after.astype(dtype).view(np.uint8)
        return before.view(np.uint32) if returns else None

    return call


def compare_swap(dtype, returns, swapped_operands=False):
    """The first data element replaces memory that equals the second, or the other way about."""
    size = np.dtype(dtype).itemsize

    def call(memory, address, data, old):
        before = memory[address : address + size].copy()
        new, compare = data.view(dtype)[:2][:: -1 if swapped_operands else 1]
        if before.view(dtype)[0] == compare:
            memory[address : address + size] = np.array([new], dtype).view(np.uint8)
        return before.view(np.uint32) if returns else None

    return call


def inc(m, d):
    return np.where(m >= d, 0, m + np.ones_like(m))


def dec(m, d):
    return np.where((m == 0) | (m > d), d, m - np.ones_like(m))


INTEGER = {
    "swap": ("u", lambda m, d: d),
    "add": ("u", lambda m, d: m + d),
    "sub": ("u", lambda m, d: m - d),
    "smin": ("i", np.minimum),
    "umin": ("u", np.minimum),
    "smax": ("i", np.maximum),
    "umax": ("u", np.maximum),
    "and": ("u", np.bitwise_and),
    "or": ("u", np.bitwise_or),
    "xor": ("u", np.bitwise_xor),
    "inc": ("u", inc),
    "dec": ("u", dec),
}


def floats(dtype):
    """Everyday numbers in memory and data, for which a sum's rounding shows."""

    def fill(lanes, memory, rng):
        size = np.dtype(dtype).itemsize
        for words in (lanes[..., :4], memory):
            count = words.nbytes // size
            values = (rng.standard_normal(count) * np.exp2(rng.integers(-4, 5, count))).astype(dtype)
            words[...] = values.view(words.dtype).reshape(words.shape)

    return fill


def whole_numbers(dtype):
    """Numbers whose sums are exact, in whatever order they are made."""

    def fill(lanes, memory, rng):
        size = np.dtype(dtype).itemsize
        for words in (lanes[..., :4], memory):
            count = words.nbytes // size
            words[...] = rng.integers(-2, 3, count).astype(dtype).view(words.dtype).reshape(words.shape)

    return fill


def equal_halves(size, swapped_operands=False):
    """Half of the lanes hold what their memory holds, so that their comparison succeeds."""

    def fill(lanes, memory, rng):
        for wave in range(WAVES):
            for lane in range(0, 64, 2):
                offset = int(lanes[wave, lane, 4])
                first = 0 if swapped_operands else size // 4
                for disp in (0, 16):
                    value = memory[wave, offset + disp : offset + disp + size].view(np.uint32)
                    # Both displacements that tables use hold the same.
                    memory[wave, offset : offset + size] = value.view(np.uint8)
                    memory[wave, offset + 16 : offset + 16 + size] = value.view(np.uint8)
                    lanes[wave, lane, first : first + size // 4] = value

    return fill


def address_forms(prefix):
    """Ways to write the same access: operands, and what they add to the lane's offset."""
    if prefix == "flat":
        return [("A2", "", 0), ("A2", " offset:16", 16)]
    return [("A2", "off", 0), ("A2", "off offset:16", 16), ("C", "S2", 0), ("C", "S2 offset:-16", -16)]


def plain_accesses():
    loads = {
        "load_dword": ("D", load(1), 4),
        "load_dwordx2": ("D2", load(2), 8),
        "load_dwordx3": ("D3", load(3), 12),
        "load_dwordx4": ("D4", load(4), 16),
        "load_ubyte": ("D", load_small("u1"), 1),
        "load_sbyte": ("D", load_small("i1"), 1),
        "load_ushort": ("D", load_small("u2"), 2),
        "load_sshort": ("D", load_small("i2"), 2),
        "load_ubyte_d16": ("D", load_half("u1", False), 1),
        "load_ubyte_d16_hi": ("D", load_half("u1", True), 1),
        "load_sbyte_d16": ("D", load_half("i1", False), 1),
        "load_sbyte_d16_hi": ("D", load_half("i1", True), 1),
        "load_short_d16": ("D", load_half("u2", False), 2),
        "load_short_d16_hi": ("D", load_half("u2", True), 2),
    }
    stores = {
        "store_dword": ("B", store(1), 4),
        "store_dwordx2": ("B2", store(2), 8),
        "store_dwordx3": ("B3", store(3), 12),
        "store_dwordx4": ("B4", store(4), 16),
        "store_byte": ("B", store_small(1), 1),
        "store_byte_d16_hi": ("B", store_small(1, 2), 1),
        "store_short": ("B", store_small(2), 2),
        "store_short_d16_hi": ("B", store_small(2, 2), 2),
    }
    lines = []
    for prefix in ("global", "flat"):
        for name, (register, oracle, size) in loads.items():
            place = dict(place="any", align=min(size & -size, 4))
            for address, tail, disp in address_forms(prefix):
                tail = f", {tail}" if prefix == "global" else tail
                lines.append(
                    MemoryCase(f"{prefix}_{name} {register}, {address}{tail}", oracle, disp, **place)
                )
        for name, (register, oracle, _) in stores.items():
            for address, tail, disp in address_forms(prefix):
                tail = f", {tail}" if prefix == "global" else tail
                lines.append(MemoryCase(f"{prefix}_{name} {address}, {register}{tail}", oracle, disp))
    for name, (register, oracle, size) in loads.items():
        place = dict(place="any", align=16)
        lines += [
            MemoryCase(f"buffer_{name} {register}, C, R4, 0 offen", bounded_load(oracle, size), **place)
            if "d16" not in name
            else MemoryCase(
                f"buffer_{name} {register}, C, R4, 0 offen", oracle, place="any", align=4, high=BUFFER_END
            ),
            MemoryCase(
                f"buffer_{name} {register}, C, R4, O offen offset:20",
                oracle,
                68,
                "any",
                align=4,
                high=BUFFER_END,
            ),
        ]
    for name, (register, oracle, size) in stores.items():
        lines += [
            MemoryCase(f"buffer_{name} {register}, C, R4, 0 offen", bounded_store(oracle, size)),
            MemoryCase(
                f"buffer_{name} {register}, C, R4, 0 offen offset:16", bounded_store(oracle, size), 16
            ),
        ]
    lines += [
        # No lane's offset: all lanes read the same place.
        MemoryCase("buffer_load_dword D, off, R4, O offset:8", lambda m, a, d, o: words_at(m, 56, 1)),
        # An index counts elements of 32 bytes; of 64 elements all but the last 0 are inside.
        MemoryCase(
            "v_lshrrev_b32 v24, 5, v24; buffer_load_dword D, C, T4, 0 idxen offset:4",
            _element_load,
            4,
            "any",
            align=32,
        ),
        MemoryCase(
            "v_lshrrev_b32 v24, 5, v24; buffer_store_dword B, C, T4, 0 idxen offset:8",
            _element_store,
            8,
            "own",
        ),
        MemoryCase(
            "v_lshrrev_b32 v34, 5, v24; v_mov_b32 v35, 12; buffer_load_dwordx2 D2, v[34:35], T4, 0 idxen offen",
            _element_load2,
            12,
            "any",
            align=32,
        ),
    ]
    return lines


def _element_load(memory, address, data, old):
    return words_at(memory, address, 1) if address // 32 < BUFFER_END // 32 else [0]


def _element_load2(memory, address, data, old):
    # The kernel's own scratch registers v34 and v35 are part of the destination's dump.
    result = words_at(memory, address, 2) if address // 32 < BUFFER_END // 32 else np.zeros(2, np.uint32)
    return [*result, *old[2:6], address // 32, 12]


def _element_store(memory, address, data, old):
    if address // 32 < BUFFER_END // 32:
        memory[address : address + 4] = data[:1].view(np.uint8)


def atomic_lines(name, register, oracle_of, **options):
    """The atomic with and without return through each kind of address."""
    lines = []
    width = register[1:] if name.split("_")[0] not in ("cmpswap",) else ("2" if "x2" in name else "")
    for prefix in ("global", "flat", "buffer"):
        for returns in (False, True):
            tail = " sc0" if returns else ""
            out = f"D{width}, " if returns else ""
            if prefix == "buffer":
                destination = register if not returns else None
                if destination is None:
                    continue
                texts = [(f"buffer_atomic_{name} {register}, C, R4, 0 offen offset:16", 16)]
            elif prefix == "flat":
                texts = [(f"flat_atomic_{name} {out}A2, {register}{tail}", 0)]
            else:
                texts = [
                    (f"global_atomic_{name} {out}A2, {register}, off offset:16{tail}", 16),
                    (f"global_atomic_{name} {out}C, {register}, S2{tail}", 0),
                ]
            for text, disp in texts:
                high = BUFFER_END if prefix == "buffer" else REGION
                lines.append(MemoryCase(text, oracle_of(returns), disp, high=high, **options))
    return lines


def atomics():
    lines = []
    for suffix, size in (("", 4), ("_x2", 8)):
        for name, (sign, function) in INTEGER.items():
            register = "B" if size == 4 else "B2"
            dtype = f"{sign}{size}"
            of = lambda returns, dtype=dtype, function=function: update(dtype, function, returns)  # noqa: E731
            lines += atomic_lines(f"{name}{suffix}", register, of)
        dtype = f"u{size}"
        lines += atomic_lines(
            f"cmpswap{suffix}",
            "B2" if size == 4 else "B4",
            lambda returns, dtype=dtype: compare_swap(dtype, returns),
            data=equal_halves(size),
        )
        lines.append(
            MemoryCase(
                f"global_atomic_add{suffix} C, {'B' if size == 4 else 'B2'}, S2",
                update(dtype, lambda m, d: m + d, False),
                place="few",
            )
        )
    total = lambda m, d: m + d  # noqa: E731
    lines += [
        *atomic_lines("add_f32", "B", lambda r: update(F32, total, r), data=floats(F32)),
        *atomic_lines("add_f64", "B2", lambda r: update(F64, total, r), data=floats(F64)),
        *atomic_lines("min_f64", "B2", lambda r: update(F64, np.fmin, r), data=floats(F64)),
        *atomic_lines("max_f64", "B2", lambda r: update(F64, np.fmax, r), data=floats(F64)),
        *atomic_lines("pk_add_f16", "B", lambda r: update_pair(F16, r), data=floats(F16)),
        *(
            line
            for line in atomic_lines("pk_add_bf16", "B", lambda r: update_pair(BF16, r), data=floats(BF16))
            if not line.text.startswith("buffer")
        ),
        MemoryCase(
            "global_atomic_add_f32 C, B, S2", update(F32, total, False), place="few", data=whole_numbers(F32)
        ),
        MemoryCase(
            "global_atomic_pk_add_bf16 C, B, S2",
            update_pair(BF16, False),
            place="few",
            data=whole_numbers(BF16),
        ),
        # The data register of a returning buffer atomic is its destination.
        MemoryCase(
            "v_mov_b32 v28, v20; buffer_atomic_add D, C, R4, 0 offen sc0",
            update("u4", total, True),
            high=BUFFER_END,
        ),
        MemoryCase(
            "v_mov_b32 v28, v20; v_mov_b32 v29, v21; buffer_atomic_cmpswap D2, C, R4, 0 offen sc0",
            lambda m, a, d, o: [*(compare_swap("u4", True)(m, a, d, o) or []), d[1]],
            high=BUFFER_END,
            data=equal_halves(4),
        ),
    ]
    return lines


def scalar_loads():
    lines = []

    def moves(n):
        return "s_waitcnt lgkmcnt(0); " + "; ".join(  # noqa: E731
            f"v_mov_b32 v{28 + i}, s{36 + i}" for i in range(n)
        )

    for n in (1, 2, 4, 8, 16):
        name = "s_load_dword" + (f"x{n}" if n > 1 else "")
        register = "s36" if n == 1 else f"s[36:{35 + n}]"
        same = lambda m, a, d, o, n=n: words_at(m, 64, n)  # noqa: E731
        lines.append(MemoryCase(f"{name} {register}, S2, 0x40; {moves(n)}", same))
        there = lambda m, a, d, o, n=n: words_at(m, 48 + 32, n)  # noqa: E731
        lines.append(MemoryCase(f"{name} {register}, S2, O offset:0x20; {moves(n)}", there))
        lines.append(
            MemoryCase(f"{name} {register}, S2, O; {moves(n)}", lambda m, a, d, o, n=n: words_at(m, 48, n))
        )
        name = name.replace("s_load", "s_buffer_load")
        lines.append(MemoryCase(f"{name} {register}, R4, 0x40; {moves(n)}", same))
        # Beyond the descriptor's end the words are zero.
        beyond = lambda m, a, d, o, n=n: np.zeros(n, np.uint32)  # noqa: E731
        lines.append(MemoryCase(f"{name} {register}, R4, {BUFFER_END:#x}; {moves(n)}", beyond))
    return lines


def lds_accesses():
    lds = dict(lds=True)
    at_any = dict(lds=True, place="any")

    def line(text, oracle, disp=0, **options):
        return MemoryCase(text, oracle, disp, **{**lds, **options})

    def read2(size, a, b):
        return lambda m, x, d, o: [*words_at(m, x + a, size // 4), *words_at(m, x + b, size // 4)]

    def write2(size, a, b):
        def call(memory, address, data, old):
            memory[address + a : address + a + size] = data.view(np.uint8)[:size]
            second = data[1:] if size == 4 else data[2:]
            memory[address + b : address + b + size] = second.view(np.uint8)[:size]

        return call

    return [
        line("ds_read_b32 D, C offset:12", load(1), 12, place="any", align=4),
        line("ds_read_b64 D2, C offset:16", load(2), 16, place="any", align=8),
        line("ds_read_b96 D3, C", load(3), **at_any),
        line("ds_read_b128 D4, C offset:32", load(4), 32, **at_any),
        line("ds_read_u8 D, C offset:3", load_small("u1"), 3, place="any", align=1),
        line("ds_read_i8 D, C", load_small("i1"), place="any", align=1),
        line("ds_read_u16 D, C", load_small("u2"), place="any", align=2),
        line("ds_read_i16 D, C offset:2", load_small("i2"), 2, place="any", align=2),
        *(
            line(
                f"ds_read_{kind}_d16{'_hi' if high else ''} D, C",
                load_half(dtype, high),
                place="any",
                align=2,
            )
            for kind, dtype in (("u8", "u1"), ("i8", "i1"), ("u16", "u2"))
            for high in (False, True)
        ),
        line("ds_write_b8 C, B offset:1", store_small(1), 1),
        line("ds_write_b16 C, B offset:2", store_small(2), 2),
        line("ds_write_b32 C, B", store(1)),
        line("ds_write_b64 C, B2", store(2)),
        line("ds_write_b96 C, B3", store(3)),
        line("ds_write_b128 C, B4 offset:16", store(4), 16),
        line("ds_write_b8_d16_hi C, B", store_small(1, 2)),
        line("ds_write_b16_d16_hi C, B", store_small(2, 2)),
        line("ds_read2_b32 D2, C offset0:1 offset1:3", read2(4, 4, 12), place="any", align=4),
        line("ds_read2_b64 D4, C offset0:2 offset1:1", read2(8, 16, 8), place="any", align=8),
        line("ds_read2st64_b32 D2, C offset0:0 offset1:2", read2(4, 0, 512), place="any", align=4, high=3000),
        line(
            "ds_read2st64_b64 D4, C offset0:1 offset1:2", read2(8, 512, 1024), place="any", align=8, high=2900
        ),
        line("ds_write2_b32 C, B, E offset0:1 offset1:3", write2(4, 4, 12)),
        line("ds_write2_b64 C, B2, E2 offset1:1", write2(8, 0, 8)),
        line("ds_write2st64_b32 C, B, E offset0:2 offset1:8", write2(4, 512, 2048), high=1100),
        line("ds_write2st64_b64 C, B2, E2 offset0:4 offset1:2", write2(8, 2048, 1024), high=1100),
    ]


def lds_atomics():
    lines = []
    names = {
        "add": ("u", lambda m, d: m + d),
        "sub": ("u", lambda m, d: m - d),
        "rsub": ("u", lambda m, d: d - m),
        "inc": ("u", inc),
        "dec": ("u", dec),
        "min": ("ui", np.minimum),
        "max": ("ui", np.maximum),
        "and": ("b", np.bitwise_and),
        "or": ("b", np.bitwise_or),
        "xor": ("b", np.bitwise_xor),
    }

    def both(name, rtn, width, dtype, function, **options):
        result = "D2" if width == 64 else "D"
        data = "B2" if width == 64 else "B"
        return [
            MemoryCase(
                f"{name} C, {data} offset:16", update(dtype, function, False), 16, lds=True, **options
            ),
            MemoryCase(f"{rtn} {result}, C, {data}", update(dtype, function, True), lds=True, **options),
        ]

    for width in (32, 64):
        for name, (signs, function) in names.items():
            for sign in signs:
                dtype = f"{'i' if sign == 'i' else 'u'}{width // 8}"
                full = f"ds_{name}_{sign}{width}"
                rtn = f"ds_{name}_rtn_{sign}{width}"
                lines += both(full, rtn, width, dtype, function)
        kind = "b64" if width == 64 else "b32"
        word = f"u{width // 8}"
        data, pair = ("B2", "E2") if width == 64 else ("B", "E")
        result = "D2" if width == 64 else "D"
        mskor = _mskor(word)
        lines += [
            MemoryCase(
                f"ds_wrxchg_rtn_{kind} {result}, C, {data}", update(word, lambda m, d: d, True), lds=True
            ),
            MemoryCase(
                f"ds_cmpst_{kind} C, {data}, {pair}",
                compare_swap(word, False, True),
                lds=True,
                data=equal_halves(width // 8, True),
            ),
            MemoryCase(
                f"ds_cmpst_rtn_{kind} {result}, C, {data}, {pair} offset:16",
                compare_swap(word, True, True),
                16,
                lds=True,
                data=equal_halves(width // 8, True),
            ),
            MemoryCase(f"ds_mskor_{kind} C, {data}, {pair}", mskor(False), lds=True),
            MemoryCase(f"ds_mskor_rtn_{kind} {result}, C, {data}, {pair}", mskor(True), lds=True),
        ]
        dtype = F64 if width == 64 else F32
        options = dict(data=floats(dtype))
        f = f"f{width}"
        lines += [
            *both(f"ds_add_{f}", f"ds_add_rtn_{f}", width, dtype, lambda m, d: m + d, **options),
            *both(f"ds_min_{f}", f"ds_min_rtn_{f}", width, dtype, np.fmin, **options),
            *both(f"ds_max_{f}", f"ds_max_rtn_{f}", width, dtype, np.fmax, **options),
        ]
    for kind, dtype in (("f16", F16), ("bf16", BF16)):
        lines += [
            MemoryCase(f"ds_pk_add_{kind} C, B", update_pair(dtype, False), lds=True, data=floats(dtype)),
            MemoryCase(
                f"ds_pk_add_rtn_{kind} D, C, B", update_pair(dtype, True), lds=True, data=floats(dtype)
            ),
        ]
    lines.append(
        MemoryCase("ds_add_u32 C, B", update("u4", lambda m, d: m + d, False), lds=True, place="few")
    )
    lines.append(
        MemoryCase(
            "ds_add_f32 C, B",
            update(F32, lambda m, d: m + d, False),
            lds=True,
            place="few",
            data=whole_numbers(F32),
        )
    )
    return lines


def counters():
    """Additions of the number of active lanes, which all of them see the value before."""

    def of(sign):
        def call(memory, offsets, data, out, active):
            word = memory[84:88].view(np.uint32)
            out[active, 0] = word[0]
            word += np.uint32(sign * int(active.sum()) % 2**32)

        return call

    place = "s_mov_b32 m0, 64; s_nop 1; "
    return [
        MemoryCase(f"{place}ds_append D offset:20", of(1), lds=True, whole=True),
        MemoryCase(f"{place}ds_consume D offset:20", of(-1), lds=True, whole=True),
    ]


def by_lane_number():
    """Accesses to the word of the lane's own number, from where M0 says."""

    def read(memory, offsets, data, out, active):
        out[active, 0] = memory[272:528].view(np.uint32)[active]

    def write(memory, offsets, data, out, active):
        memory[272:528].view(np.uint32)[active] = data[active, 0]

    def fetch(dtype):
        """From global memory, which the first copy of the region still holds, to LDS."""

        def call(memory, offsets, data, out, active):
            before = memory.copy()
            for lane in np.flatnonzero(active):
                value = before[offsets[lane] : offsets[lane] + np.dtype(dtype).itemsize].view(dtype)[0]
                memory[272 + 4 * lane : 276 + 4 * lane] = np.array([int(value) & 0xFFFFFFFF], np.uint32).view(
                    np.uint8
                )

        return call

    place = "s_movk_i32 m0, 256; s_nop 1; "
    kinds = {"dword": "u4", "ubyte": "u1", "sbyte": "i1", "ushort": "u2", "sshort": "i2"}
    return [
        MemoryCase(f"{place}ds_read_addtid_b32 D offset:16", read, lds=True, whole=True),
        MemoryCase(f"{place}ds_write_addtid_b32 B offset:16", write, lds=True, whole=True),
        *(
            MemoryCase(
                f"s_movk_i32 m0, 272; s_nop 1; global_load_lds_{kind} C, S2",
                fetch(dtype),
                lds=True,
                whole=True,
                place="any",
                align=4,
            )
            for kind, dtype in kinds.items()
        ),
        MemoryCase(
            "s_movk_i32 m0, 256; s_nop 1; global_load_lds_dword A2, off offset:16",
            fetch("u4"),
            16,
            lds=True,
            whole=True,
            place="any",
            align=4,
        ),
    ]


def private_accesses():
    """A lane's own memory: four words stored, one access of each kind, and what is then there."""
    fill = "scratch_store_dwordx4 off, B4, off offset:16; s_waitcnt vmcnt(0); "
    wait = "; s_waitcnt vmcnt(0)"
    lines = []
    loads = {
        "dword": ("D", load(1)), "dwordx2": ("D2", load(2)), "dwordx3": ("D3", load(3)), "dwordx4": ("D4", load(4)),
        "ubyte": ("D", load_small("u1")), "sbyte": ("D", load_small("i1")), "ushort": ("D", load_small("u2")),
        "sshort": ("D", load_small("i2")), "ubyte_d16": ("D", load_half("u1", False)),
        "ubyte_d16_hi": ("D", load_half("u1", True)), "sbyte_d16": ("D", load_half("i1", False)),
        "sbyte_d16_hi": ("D", load_half("i1", True)), "short_d16": ("D", load_half("u2", False)),
        "short_d16_hi": ("D", load_half("u2", True)),
    }  # fmt: skip

    def loaded(oracle):
        return lambda memory, address, data, old: oracle(data.view(np.uint8).copy(), 0, data, old)

    for name, (register, oracle) in loads.items():
        lines += [
            MemoryCase(
                f"{fill}scratch_load_{name} {register}, off, off offset:16", loaded(oracle), scratch=64
            ),
            MemoryCase(
                f"v_mov_b32 v34, 12; {fill}scratch_load_{name} {register}, v34, off offset:4{wait};"
                " v_mov_b32 v34, 0",
                _with_zero(loaded(oracle)),
                scratch=64,
            ),
            MemoryCase(
                f"{fill}s_mov_b32 s33, 4; scratch_load_{name} {register}, off, s33 offset:12",
                loaded(oracle),
                scratch=64,
            ),
        ]
    stores = {"dword": ("B", 4, 0), "dwordx2": ("B2", 8, 0), "dwordx3": ("B3", 12, 0), "dwordx4": ("B4", 16, 0),
              "byte": ("B", 1, 0), "byte_d16_hi": ("B", 1, 2), "short": ("B", 2, 0),
              "short_d16_hi": ("B", 2, 2)}  # fmt: skip
    for name, (register, size, first) in stores.items():

        def stored(memory, address, data, old, size=size, first=first):
            # The words were stored in the opposite order; some of the first's bytes replace some of those.
            words = data[::-1].copy()
            words.view(np.uint8)[:size] = data.view(np.uint8)[first : first + size]
            return words

        reverse = "; ".join(f"scratch_store_dword off, v{20 + i}, off offset:{28 - 4 * i}" for i in range(4))
        text = (
            f"{reverse}; scratch_store_{name} off, {register}, off offset:16{wait};"
            f" scratch_load_dwordx4 D4, off, off offset:16"
        )
        lines.append(MemoryCase(text, stored, scratch=64))
    return lines


def _with_zero(oracle):
    """The address register, which is part of what the kernel stores, is left zero."""

    def call(memory, address, data, old):
        result = np.asarray(oracle(memory, address, data, old), np.uint32).reshape(-1)
        return [*result, *old[len(result) : 6], 0]

    return call


def orders():
    """What orders memory and changes no register: caches written back and forgotten."""
    lines = []
    for bits in ("", " sc0", " sc1", " sc0 sc1"):
        lines.append(
            MemoryCase(
                f"global_store_dword C, B, S2; buffer_wbl2{bits}; s_waitcnt vmcnt(0);"
                f" buffer_inv{bits}; global_load_dword D, C, S2",
                _stored_and_loaded,
            )
        )
    return lines


def _stored_and_loaded(memory, address, data, old):
    memory[address : address + 4] = data[:1].view(np.uint8)
    return data[:1]


def _mskor(dtype):
    """The bits of the first data element are cleared, then those of the second are set."""

    def of(returns):
        def call(memory, address, data, old):
            size = np.dtype(dtype).itemsize
            before = memory[address : address + size].copy()
            mask, bits = data.view(dtype)[:2]
            memory[address : address + size] = ((before.view(dtype) & ~mask) | bits).view(np.uint8)
            return before.view(np.uint32) if returns else None

        return call

    return of


CASES = [
    *plain_accesses(),
    *atomics(),
    *scalar_loads(),
    *lds_accesses(),
    *lds_atomics(),
    *counters(),
    *by_lane_number(),
    *private_accesses(),
    *orders(),
]
