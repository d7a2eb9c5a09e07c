"""What a code object says of its kernels' arguments, read from its ELF notes and compared with what
``csrc/aiter/arguments.h`` passes.

The notes are MessagePack, of which the few forms that compilers write here are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_moriep.errors import LibraryError

_PT_NOTE = 4
_AMDGPU_METADATA = 32
_PADDING = "pad"  # what AITER calls the rest of an argument's 16 bytes
_ARGUMENT_STRIDE = 16

_POINTERS = ("O", "X", "G", "U", "D", "XQ", "GQ", "DQ", "SMQ", "STP", "SW", "SEP")
_NUMBERS = (
    *("dim", "hdim", "batch", "eprt", "Xs", "GUs", "Ds", "Os"),
    *("eGUs", "eDs", "eGUQs", "eDQs", "eSMQs", "topk", "total_tgs", "ps_deno"),
)
ARGUMENTS = {
    name: (i * _ARGUMENT_STRIDE, 8 if name in _POINTERS else 4) for i, name in enumerate(_POINTERS + _NUMBERS)
}
"""Each argument's offset and size in bytes, by the names in AITER's code objects."""
ARGUMENT_BYTES = len(ARGUMENTS) * _ARGUMENT_STRIDE


def check(path: Path, image: bytes, symbol: str) -> None:
    """Refuses a code object whose kernel takes other arguments than it is given.

    Args:
      path: for the text.
      image: the file.
      symbol: of the kernel.

    Raises:
      LibraryError: it is no code object, has no such kernel, or one with other arguments.
    """
    try:
        kernels = {kernel[".name"]: kernel for kernel in _kernels(image)}
    except (struct.error, IndexError, KeyError, UnicodeDecodeError, ValueError) as error:
        raise LibraryError(f"{path} must be a code object with notes; reinstall amd-aiter") from error
    if symbol not in kernels:
        raise LibraryError(
            f"{path} must hold the kernel {symbol}, not {sorted(kernels)}; reinstall amd-aiter"
        )
    kernel = kernels[symbol]
    found = {
        argument.get(".name"): (argument[".offset"], argument[".size"])
        for argument in kernel[".args"]
        if argument.get(".name") != _PADDING
    }
    size = kernel[".kernarg_segment_size"]
    if found != ARGUMENTS or size != ARGUMENT_BYTES:
        other = sorted(f"{name} {place}" for name, place in set(found.items()) ^ set(ARGUMENTS.items()))
        raise LibraryError(
            f"the kernel of {path} must take the {ARGUMENT_BYTES} bytes of arguments that this release gives "
            f"it; it takes {size} bytes, and differs in {other}: reinstall amd-aiter, or update jax_moriep"
        )


def _kernels(image: bytes) -> Iterator[dict[str, Any]]:
    for kind, content in _notes(image):
        if kind == _AMDGPU_METADATA:
            yield from _read(content, 0)[0]["amdhsa.kernels"]


def _notes(image: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each note of a 64-bit ELF file."""
    if image[:5] != b"\x7fELF\x02":
        raise ValueError("no ELF file of 64 bits")
    (headers,) = struct.unpack_from("<Q", image, 0x20)
    size, count = struct.unpack_from("<HH", image, 0x36)
    for header in range(headers, headers + size * count, size):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", image, header)
        end = at + length if kind == _PT_NOTE else at
        while at < end:
            name_size, content_size, note = struct.unpack_from("<III", image, at)
            content = at + 12 + -(-name_size // 4) * 4
            yield note, image[content : content + content_size]
            at = content + -(-content_size // 4) * 4


def _read(data: bytes, at: int) -> tuple[Any, int]:
    """One value of MessagePack, and where the next one starts."""
    first = data[at]
    if first < 0x80 or first >= 0xE0:
        return first if first < 0x80 else first - 0x100, at + 1
    if first < 0xC0:
        kind, count = (_read_map, _read_array, _read_text, _read_text)[(first >> 4) - 8], first & 0x1F
        return kind(data, at + 1, count if kind is _read_text else count & 0xF)
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at + 1
    for codes, forms, read in (
        (range(0xCC, 0xD0), "BHIQ", None),
        (range(0xD0, 0xD4), "bhiq", None),
        (range(0xD9, 0xDC), "BHI", _read_text),
        (range(0xDC, 0xDE), "HI", _read_array),
        (range(0xDE, 0xE0), "HI", _read_map),
    ):
        if first in codes:
            form = ">" + forms[first - codes.start]
            (value,) = struct.unpack_from(form, data, at + 1)
            at += 1 + struct.calcsize(form)
            return (value, at) if read is None else read(data, at, value)
    raise ValueError(f"byte {first:#x} at {at} is no form that is read here")


def _read_text(data: bytes, at: int, count: int) -> tuple[str, int]:
    return data[at : at + count].decode(), at + count


def _read_array(data: bytes, at: int, count: int) -> tuple[list[Any], int]:
    values = []
    for _ in range(count):
        value, at = _read(data, at)
        values.append(value)
    return values, at


def _read_map(data: bytes, at: int, count: int) -> tuple[dict[Any, Any], int]:
    pairs, at = _read_array(data, at, 2 * count)
    return dict(zip(pairs[::2], pairs[1::2], strict=True)), at
