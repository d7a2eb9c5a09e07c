"""What an AMD code object says of its kernels, from its ELF notes."""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgpack

PT_NOTE = 4
NT_AMDGPU_METADATA = 32
PADDING = "pad"  # what AITER calls the fields between its arguments


@dataclass(frozen=True)
class Argument:
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Kernel:
    """A kernel and the layout of its arguments, all in bytes."""

    name: str
    arguments: tuple[Argument, ...]
    arguments_size: int

    def pack(self, values: Mapping[str, int]) -> bytes:
        """The block of arguments. Every argument must be given, and none that the kernel does not have."""
        wanted = {argument.name: argument for argument in self.arguments}
        assert wanted.keys() == values.keys(), wanted.keys() ^ values.keys()
        block = bytearray(self.arguments_size)
        for name, value in values.items():
            argument = wanted[name]
            end = argument.offset + argument.size
            block[argument.offset : end] = int(value).to_bytes(argument.size, "little")
        return bytes(block)


def _notes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, content) of each note of a 64-bit ELF file."""
    assert data[:5] == b"\x7fELF\x02"
    (headers,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    for header in range(headers, headers + size * count, size):
        kind, _, at, _, _, length = struct.unpack_from("<IIQQQQ", data, header)
        end = at + length if kind == PT_NOTE else at
        while at < end:
            name_size, content_size, note = struct.unpack_from("<III", data, at)
            content = at + 12 + -(-name_size // 4) * 4
            yield note, data[content : content + content_size]
            at = content + -(-content_size // 4) * 4


def kernels(path: Path) -> list[Kernel]:
    """The kernels of a code object."""
    found = []
    for note, content in _notes(path.read_bytes()):
        if note != NT_AMDGPU_METADATA:
            continue
        for kernel in msgpack.unpackb(content)["amdhsa.kernels"]:
            # Those that a compiler adds by itself have no names.
            arguments = tuple(
                Argument(
                    argument.get(".name", argument[".value_kind"]), argument[".offset"], argument[".size"]
                )
                for argument in kernel[".args"]
                if argument.get(".name") != PADDING
            )
            found.append(Kernel(kernel[".name"], arguments, kernel[".kernarg_segment_size"]))
    return found
