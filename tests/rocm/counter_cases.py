"""What test_counters.py counts on two simulated devices: python -m tests.rocm.counter_cases CODE_OBJECT."""

import struct
import sys

from tests.rocm import hip
from tests.rocm.kernel_cases import pointers, run

ITEMS = 384
BLOCK = 128
GRID = ITEMS // BLOCK
ROUNDS = (5, 12)
ROW = 16  # bytes of an item of copy_rows


def of_device(number, size):
    hip.check("hipSetDevice", number)
    memory = hip.malloc(size)
    hip.check("hipSetDevice", 0)
    return memory


def main(path):
    size = 64 * ITEMS
    own, other, peer, host = of_device(0, size), of_device(0, size), of_device(1, size), hip.host_malloc(size)
    for source, to in ((own, other), (peer, own), (own, peer), (host, own), (own, host)):
        run(path, "copy_rows", (GRID, 1, 1), (BLOCK, 1, 1), pointers(source, to))
    run(path, "read_far", (GRID, 1, 1), (BLOCK, 1, 1), pointers(own, other))
    run(path, "add", (GRID, 1, 1), (BLOCK, 1, 1), pointers(peer))
    run(path, "mixed", (2, 1, 1), (64, 1, 1), pointers(own, other, other))
    for rounds in ROUNDS:
        run(path, "loop", (1, 1, 1), (128, 1, 1), struct.pack("<ixxxxQ", rounds, own.value))
    hip.check("hipMemset", own, 0, hip.c_size_t(100))
    hip.check("hipMemcpy", other, own, hip.c_size_t(101), hip.D2D)
    hip.check("hipMemcpy", peer, own, hip.c_size_t(102), hip.D2D)
    hip.write(own, bytes(103))


if __name__ == "__main__":
    main(sys.argv[1])
