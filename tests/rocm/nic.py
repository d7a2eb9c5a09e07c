"""The board of simulated network adapters (simulator/src/nic/board.h): what they sent; their link."""

import struct
from dataclasses import dataclass
from pathlib import Path

_BYTES = 65536
_HEADER, _LINE = 64, struct.Struct("<iiII6Q")


@dataclass(frozen=True)
class Traffic:
    """What one queue pair has sent and what has arrived of it."""

    pid: int
    peer_pid: int
    number: int
    errors: int
    writes: int
    sends: int
    atomics: int
    write_bytes: int
    send_bytes: int
    atomic_bytes: int

    @property
    def bytes(self) -> int:
        return self.write_bytes + self.send_bytes + self.atomic_bytes

    @property
    def messages(self) -> int:
        return self.writes + self.sends + self.atomics


class Board:
    """A job's board, in a file that its processes are given as ROCM_SIM_NIC_BOARD."""

    def __init__(self, path: Path):
        self.path = path
        path.write_bytes(bytes(_BYTES))

    def stop(self, stopped: bool = True) -> None:
        """Stops the link between all adapters, or lets it go on."""
        with self.path.open("r+b") as file:
            file.write(struct.pack("<I", stopped))

    def traffic(self) -> list[Traffic]:
        """Of all queue pairs."""
        data = self.path.read_bytes()
        (count,) = struct.unpack_from("<I", data, 4)
        return [Traffic(*_LINE.unpack_from(data, _HEADER + i * _LINE.size)) for i in range(count)]
