"""Shares device memory: prints its handle and waits for a line; by then ipc_peer.py has written to it."""

import ctypes
import sys

from tests.rocm import hip

SIZE = 8192
OFFSET = 256  # a handle may name the middle of an allocation


def main() -> None:
    memory = hip.malloc(SIZE)
    hip.write(memory, bytes([1]) * SIZE)
    handle = hip.IpcHandle()
    hip.check("hipIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p((memory.value or 0) + OFFSET))
    out = ctypes.c_void_p()
    own = hip.call("hipIpcOpenMemHandle", ctypes.byref(out), handle, ctypes.c_uint(1))
    assert own == hip.INVALID_CONTEXT
    print(bytes(handle).hex(), flush=True)
    sys.stdin.readline()
    assert hip.read(memory, SIZE) == bytes([1]) * OFFSET + bytes([2]) * (SIZE - OFFSET)


if __name__ == "__main__":
    main()
