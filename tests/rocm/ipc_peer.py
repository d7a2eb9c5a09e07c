"""Opens the memory of ipc_owner.py. Usage: ipc_peer.py HANDLE [wait|gone]; "wait" waits for a line first."""

import ctypes
import sys

from tests.rocm import hip
from tests.rocm.ipc_owner import OFFSET, SIZE


def main(handle: str, mode: str) -> None:
    ipc = hip.IpcHandle.from_buffer_copy(bytes.fromhex(handle))
    memory = ctypes.c_void_p()
    error = hip.call("hipIpcOpenMemHandle", ctypes.byref(memory), ipc, ctypes.c_uint(1))
    if mode == "gone":
        print("gone" if error != hip.SUCCESS else "still there")
        return
    assert error == hip.SUCCESS, error
    if mode == "wait":
        print("opened", flush=True)
        sys.stdin.readline()
    size = SIZE - OFFSET
    assert hip.read(memory, size) == bytes([1]) * size
    hip.write(memory, bytes([2]) * size)
    hip.check("hipIpcCloseMemHandle", memory)
    assert hip.call("hipIpcCloseMemHandle", memory) == hip.INVALID_VALUE


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
