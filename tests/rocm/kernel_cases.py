"""What test_kernels.py runs on simulated devices: python -m tests.rocm.kernel_cases NAME CODE_OBJECT."""

import ctypes
import struct
import sys
import threading
from ctypes import byref, c_int, c_size_t, c_void_p

import numpy as np

from tests.rocm import hip
from tests.rocm.hip import array, launch

LAUNCH_TIMEOUT = 702


def ints(address, count):
    return np.frombuffer(hip.read(address, 4 * count), np.int32)


def pointers(*addresses):
    return b"".join(struct.pack("<Q", address.value) for address in addresses)


def run(path, name, grid, block, arguments, lds=0):
    kernel = hip.function(hip.load(path), name)
    assert launch(kernel, grid, block, arguments, lds=lds) == hip.SUCCESS
    hip.check("hipDeviceSynchronize")


def geometry(path):
    for grid, block in (((2, 3, 4), (64, 2, 1)), ((5, 1, 1), (100, 1, 1)), ((1, 1, 2), (8, 4, 4))):
        count = int(np.prod(grid))
        out = array(np.zeros(6 * count, np.int32))
        run(path, "geometry", grid, block, pointers(out))
        np.testing.assert_array_equal(ints(out, 6 * count).reshape(-1, 6), [[*grid, *block]] * count)


def arguments(path):
    out = array(np.zeros(8, np.int32))
    # A char, a double at 8, a short at 16, a float at 20, a pointer at 24.
    packed = struct.pack("<bxxxxxxxdhxxfQ", -7, 1.5, -300, 2.5, out.value)
    run(path, "arguments", (1, 1, 1), (1, 1, 1), packed)
    assert np.frombuffer(hip.read(out, 32), np.int64).tolist() == [-7, 3, -300, 5]


def dynamic_lds(path):
    data = np.arange(256, dtype=np.int32)
    out = array(np.zeros_like(data))
    run(path, "reverse", (4, 1, 1), (64, 1, 1), pointers(array(data), out), lds=256)
    np.testing.assert_array_equal(ints(out, 256).reshape(4, 64), data.reshape(4, 64)[:, ::-1])


def scratch(path):
    index = np.random.default_rng(0).integers(0, 64, 64).astype(np.int32)
    out = array(np.zeros_like(index))
    run(path, "scratch", (1, 1, 1), (64, 1, 1), pointers(array(index), out))
    np.testing.assert_array_equal(ints(out, 64), index * index + np.arange(64))


def variables(path):
    module, out = hip.load(path), array(np.zeros(4, np.int32))
    kernel = hip.function(module, "count")
    address, size = c_void_p(), c_size_t()
    hip.check("hipModuleGetGlobal", byref(address), byref(size), module, b"counter")
    assert size.value == 4
    assert launch(kernel, (2, 1, 1), (64, 1, 1), pointers(out)) == hip.SUCCESS
    hip.check("hipDeviceSynchronize")
    assert ints(address, 1)[0] == 5 + 128
    assert ints(out, 4).tolist() == [10, 20, 30, 40]
    # Copies may write what kernels may only read: XLA fills constants of a deserialised program so.
    hip.check("hipModuleGetGlobal", byref(address), None, module, b"table")
    hip.write(address, np.array([1, 2, 3, 4], np.int32).tobytes())
    assert launch(kernel, (2, 1, 1), (64, 1, 1), pointers(out)) == hip.SUCCESS
    hip.check("hipDeviceSynchronize")
    assert ints(out, 4).tolist() == [1, 2, 3, 4]
    # Another load of the same code object has variables of its own.
    other = c_void_p()
    hip.check("hipModuleGetGlobal", byref(other), None, hip.load(path), b"counter")
    assert ints(other, 1)[0] == 5
    hip.check("hipModuleUnload", module)
    assert hip.call("hipModuleGetFunction", byref(c_void_p()), module, b"count") == hip.INVALID_HANDLE


def kernels_on_two_streams_meet(path):
    module = hip.load(path)
    flag, out = array(np.zeros(1, np.int32)), array(np.zeros(1, np.int32))
    first, second = hip.stream(), hip.stream()
    waiting, signalling = hip.function(module, "wait_for"), hip.function(module, "signal")
    assert launch(waiting, (1, 1, 1), (64, 1, 1), pointers(flag, out), first) == hip.SUCCESS
    assert hip.call("hipStreamQuery", first) == hip.NOT_READY
    assert launch(signalling, (1, 1, 1), (64, 1, 1), pointers(flag), second) == hip.SUCCESS
    hip.check("hipStreamSynchronize", first)
    assert ints(out, 1)[0] == 1


def captured_kernels(path):
    module, stream = hip.load(path), hip.stream()
    out = array(np.zeros(4, np.int32))
    kernel = hip.function(module, "count")
    address, graph, executable = c_void_p(), c_void_p(), c_void_p()
    hip.check("hipModuleGetGlobal", byref(address), None, module, b"counter")
    hip.check("hipStreamBeginCapture", stream, c_int(hip.CAPTURE_GLOBAL))
    for _ in range(2):
        assert launch(kernel, (1, 1, 1), (64, 1, 1), pointers(out), stream) == hip.SUCCESS
    hip.check("hipStreamEndCapture", stream, byref(graph))
    hip.check("hipGraphInstantiate", byref(executable), graph, None, None, c_size_t(0))
    for _ in range(3):
        hip.check("hipGraphLaunch", executable, stream)
    hip.check("hipStreamSynchronize", stream)
    assert ints(address, 1)[0] == 5 + 2 * 3 * 64


def expect_failure(path, name, arguments, error):
    """The error is seen by the call that waits, and by every call after it."""
    kernel, stream = hip.function(hip.load(path), name), hip.stream()
    queued, called = threading.Event(), threading.Event()
    gate = hip.HOST_FUNCTION(lambda _: queued.wait(10))
    note = hip.HOST_FUNCTION(lambda _: called.set())
    # The kernel waits until all are queued: what comes behind a failure is refused.
    hip.check("hipLaunchHostFunc", stream, gate, None)
    assert launch(kernel, (1, 1, 1), (1, 1, 1), arguments, stream) == hip.SUCCESS
    hip.check("hipLaunchHostFunc", stream, note, None)
    queued.set()
    assert hip.call("hipStreamSynchronize", stream) == error
    assert hip.call("hipGetLastError") == error
    assert hip.call("hipDeviceSynchronize") == error
    assert launch(kernel, (1, 1, 1), (1, 1, 1), arguments, stream) == error
    # Somebody may wait for a host function, so that it runs in any case.
    assert called.wait(10)


def store_past_the_end(path):
    target = c_void_p((hip.malloc(256).value or 0) + 256)
    expect_failure(path, "store", pointers(target) + struct.pack("<i", 1), hip.ILLEGAL_ADDRESS)


def store_to_freed_memory(path):
    target = hip.malloc(256)
    hip.check("hipFree", target)
    expect_failure(path, "store", pointers(target) + struct.pack("<i", 1), hip.ILLEGAL_ADDRESS)


def store_to_host_memory(path):

    target = ctypes.create_string_buffer(256)
    address = c_void_p(ctypes.addressof(target))
    expect_failure(path, "store", pointers(address) + struct.pack("<i", 1), hip.ILLEGAL_ADDRESS)


def store_to_constants(path):
    address = c_void_p()
    hip.check("hipModuleGetGlobal", byref(address), None, hip.load(path), b"table")
    expect_failure(path, "store", pointers(address) + struct.pack("<i", 1), hip.ILLEGAL_ADDRESS)


def wait_for_ever(path):
    flag = array(np.zeros(1, np.int32))
    expect_failure(path, "wait_for", pointers(flag, flag), LAUNCH_TIMEOUT)


def other_devices_go_on(path):
    store_past_the_end(path)
    hip.check("hipSetDevice", c_int(1))
    hip.check("hipDeviceSynchronize")
    dynamic_lds(path)


def refused_launches(path):
    kernel = hip.function(hip.load(path), "store")
    arguments = pointers(hip.malloc(4)) + struct.pack("<i", 1)
    for grid, block, lds in (
        ((0, 1, 1), (1, 1, 1), 0),
        ((1, 1, 1), (2000, 1, 1), 0),
        ((1, 1, 1), (1, 1, 1), 65537),
    ):
        assert launch(kernel, grid, block, arguments, lds=lds) == hip.INVALID_VALUE
    assert launch(kernel, (1, 1, 1), (1, 1, 1), arguments + bytes(4096)) == hip.INVALID_VALUE
    assert hip.call("hipModuleGetFunction", byref(c_void_p()), hip.load(path), b"none") != hip.SUCCESS


CASES = [
    geometry,
    arguments,
    dynamic_lds,
    scratch,
    variables,
    kernels_on_two_streams_meet,
    captured_kernels,
    refused_launches,
]
FAILURES = [
    store_past_the_end,
    store_to_freed_memory,
    store_to_host_memory,
    store_to_constants,
    wait_for_ever,
    other_devices_go_on,
]


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
