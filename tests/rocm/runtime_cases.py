"""What test_runtime.py runs on a simulated device, one case per process.

Usage: python -m tests.rocm.runtime_cases NAME.

Host functions that wait for a `threading.Event` hold a stream back, so that no case depends on time.
"""

import ctypes
import sys
import threading
from ctypes import byref, c_int, c_size_t, c_uint, c_void_p

from tests.rocm import hip

SIZE = 4096


class Gate:
    """Holds streams back until it is opened."""

    def __init__(self):
        self._opened = threading.Event()
        self._callback = hip.HOST_FUNCTION(lambda _: self._opened.wait(60))

    def hold(self, stream):
        hip.check("hipLaunchHostFunc", stream, self._callback, None)

    def open(self):
        self._opened.set()


def fill(address, value, stream):
    hip.check("hipMemsetAsync", address, c_int(value), c_size_t(SIZE), stream)


def copy(to, source, kind, stream):
    hip.check("hipMemcpyAsync", to, source, c_size_t(SIZE), c_int(kind), stream)


def query(stream):
    return hip.call("hipStreamQuery", stream)


def synchronize(stream):
    hip.check("hipStreamSynchronize", stream)


def value(address):
    """The value that every byte of device memory has."""
    data = hip.read(address, SIZE)
    assert len(set(data)) == 1, set(data)
    return data[0]


def streams_run_after_the_call():
    gate, stream = Gate(), hip.stream()
    device, host = hip.malloc(SIZE), hip.host_malloc(SIZE)
    ctypes.memset(host, 1, SIZE)
    gate.hold(stream)
    fill(device, 7, stream)
    copy(host, device, hip.D2H, stream)
    assert query(stream) == hip.NOT_READY
    assert ctypes.string_at(host, SIZE) == bytes([1]) * SIZE
    gate.open()
    synchronize(stream)
    assert query(stream) == hip.SUCCESS
    assert ctypes.string_at(host, SIZE) == bytes([7]) * SIZE


def copies_read_pinned_memory_late():
    gate, stream = Gate(), hip.stream()
    device, host = hip.malloc(SIZE), hip.host_malloc(SIZE)
    ctypes.memset(host, 1, SIZE)
    gate.hold(stream)
    copy(device, host, hip.H2D, stream)
    ctypes.memset(host, 2, SIZE)
    gate.open()
    synchronize(stream)
    assert value(device) == 2


def copies_from_pageable_memory_wait():
    stream, device = hip.stream(), hip.malloc(SIZE)
    buffer = ctypes.create_string_buffer(bytes([5]) * SIZE)
    copy(device, buffer, hip.H2D, stream)
    ctypes.memset(buffer, 6, SIZE)
    assert value(device) == 5


def streams_do_not_wait_for_each_other():
    gate, held, free = Gate(), hip.stream(), hip.stream()
    device = hip.malloc(SIZE)
    gate.hold(held)
    fill(device, 3, free)
    synchronize(free)
    assert query(held) == hip.NOT_READY
    gate.open()
    synchronize(held)


def events_order_streams():
    gate, first, second = Gate(), hip.stream(), hip.stream()
    device, event = hip.malloc(SIZE), hip.event()
    gate.hold(first)
    fill(device, 1, first)
    hip.check("hipEventRecord", event, first)
    hip.check("hipStreamWaitEvent", second, event, c_uint(0))
    fill(device, 2, second)
    assert hip.call("hipEventQuery", event) == hip.NOT_READY
    assert query(second) == hip.NOT_READY
    gate.open()
    synchronize(second)
    assert hip.call("hipEventQuery", event) == hip.SUCCESS
    assert value(device) == 2


def a_wait_means_the_event_as_it_was_recorded_before():
    gate, first, second = Gate(), hip.stream(), hip.stream()
    event = hip.event()
    hip.check("hipStreamWaitEvent", second, event, c_uint(0))  # It was never recorded: no wait.
    hip.check("hipEventRecord", event, first)
    hip.check("hipStreamWaitEvent", second, event, c_uint(0))
    gate.hold(first)
    hip.check("hipEventRecord", event, first)  # The second stream does not wait for this one.
    synchronize(second)
    gate.open()
    synchronize(first)


def events_tell_time():
    stream, start, stop = hip.stream(), hip.event(), hip.event()
    hip.check("hipEventRecord", start, stream)
    hip.check("hipEventRecord", stop, stream)
    hip.check("hipEventSynchronize", stop)
    assert hip.elapsed(start, stop) >= 0
    untimed = hip.event(hip.NO_TIMING)
    hip.check("hipEventRecord", untimed, stream)
    hip.check("hipEventSynchronize", untimed)
    out = ctypes.c_float()
    assert hip.call("hipEventElapsedTime", byref(out), start, untimed) == hip.INVALID_HANDLE


def the_null_stream_waits_for_blocking_streams():
    gate, blocking, free = Gate(), hip.stream(0), hip.stream()
    device = hip.malloc(SIZE)
    gate.hold(blocking)
    fill(device, 1, blocking)
    fill(device, 2, None)
    fill(device, 3, blocking)
    synchronize(free)
    assert query(None) == hip.NOT_READY
    gate.open()
    synchronize(blocking)
    assert value(device) == 3


def free_waits_for_the_device():
    gate, stream, done = Gate(), hip.stream(), threading.Event()
    device = hip.malloc(SIZE)
    gate.hold(stream)
    fill(device, 1, stream)

    def free():
        hip.check("hipFree", device)
        done.set()

    thread = threading.Thread(target=free)
    thread.start()
    assert not done.wait(0.2)
    gate.open()
    thread.join()


def handles_and_ranges_are_checked():
    stream = hip.stream()
    hip.check("hipStreamDestroy", stream)
    assert hip.call("hipStreamSynchronize", stream) == hip.INVALID_HANDLE
    device = hip.malloc(SIZE)
    for size, kind in ((SIZE + 1, hip.D2D), (SIZE, 9)):
        assert hip.call("hipMemcpy", device, device, c_size_t(size), c_int(kind)) != hip.SUCCESS
    hip.check("hipFree", device)
    assert hip.call("hipFree", device) == hip.INVALID_VALUE
    assert hip.call("hipMemset", device, c_int(0), c_size_t(1)) == hip.INVALID_VALUE
    assert hip.call("hipGetLastError") == hip.INVALID_VALUE
    assert hip.call("hipGetLastError") == hip.SUCCESS
    assert hip.call("hipSetDevice", c_int(1)) != hip.SUCCESS


def memory_runs_out():
    out = c_void_p()
    assert hip.call("hipMalloc", byref(out), c_size_t(17 << 30)) == 2
    free, total = c_size_t(), c_size_t()
    hip.check("hipMemGetInfo", byref(free), byref(total))
    assert free.value == total.value == 16 << 30
    hip.malloc(1 << 30)
    hip.check("hipMemGetInfo", byref(free), byref(total))
    assert free.value == 15 << 30


def begin_capture(stream):
    hip.check("hipStreamBeginCapture", stream, c_int(hip.CAPTURE_GLOBAL))


def end_capture(stream):
    graph = c_void_p()
    hip.check("hipStreamEndCapture", stream, byref(graph))
    return graph


def instantiate(graph):
    out = c_void_p()
    hip.check("hipGraphInstantiate", byref(out), graph, None, None, c_size_t(0))
    return out


def captured_work_runs_at_each_replay():
    stream, one, other = hip.stream(), hip.malloc(SIZE), hip.malloc(SIZE)
    hip.check("hipMemset", one, c_int(1), c_size_t(SIZE))
    begin_capture(stream)
    copy(other, one, hip.D2D, stream)
    fill(one, 9, stream)
    graph = instantiate(end_capture(stream))
    assert value(one) == 1
    for expected in (1, 9):
        hip.check("hipGraphLaunch", graph, stream)
        synchronize(stream)
        assert value(other) == expected
    hip.check("hipGraphExecDestroy", graph)


def capture_follows_events_to_other_streams():
    first, second = hip.stream(), hip.stream()
    fork, join = hip.event(), hip.event()
    one, other = hip.malloc(SIZE), hip.malloc(SIZE)
    begin_capture(first)
    fill(one, 4, first)
    hip.check("hipEventRecord", fork, first)
    hip.check("hipStreamWaitEvent", second, fork, c_uint(0))
    copy(other, one, hip.D2D, second)
    hip.check("hipEventRecord", join, second)
    hip.check("hipStreamWaitEvent", first, join, c_uint(0))
    fill(one, 5, first)
    graph = instantiate(end_capture(first))
    for _ in range(10):
        hip.check("hipGraphLaunch", graph, first)
    synchronize(first)
    assert (value(one), value(other)) == (5, 4)


def a_fork_must_be_joined():
    first, second, fork = hip.stream(), hip.stream(), hip.event()
    device, graph = hip.malloc(SIZE), c_void_p()
    begin_capture(first)
    fill(device, 4, first)
    hip.check("hipEventRecord", fork, first)
    hip.check("hipStreamWaitEvent", second, fork, c_uint(0))
    fill(device, 5, second)
    assert hip.call("hipStreamEndCapture", first, byref(graph)) == hip.CAPTURE_UNJOINED
    fill(device, 6, second)  # The stream is an ordinary one again.
    synchronize(second)
    assert value(device) == 6


def calls_that_wait_end_a_capture():
    for name, arguments in (
        ("hipStreamSynchronize", lambda stream: (stream,)),
        ("hipDeviceSynchronize", lambda stream: ()),
        ("hipMalloc", lambda stream: (byref(c_void_p()), c_size_t(1))),
    ):
        stream, graph = hip.stream(), c_void_p()
        begin_capture(stream)
        assert hip.call(name, *arguments(stream)) == hip.CAPTURE_UNSUPPORTED, name
        assert hip.call("hipStreamEndCapture", stream, byref(graph)) == hip.CAPTURE_INVALIDATED, name


def graphs_run_in_an_order_that_dependencies_allow():
    stream = hip.stream()
    buffers = [hip.malloc(SIZE) for _ in range(8)]
    hip.check("hipMemset", buffers[0], c_int(3), c_size_t(SIZE))
    graph = c_void_p()
    hip.check("hipGraphCreate", byref(graph), c_uint(0))
    previous = []
    for source, to in zip(buffers, buffers[1:], strict=False):
        node = c_void_p()
        dependencies = (c_void_p * len(previous))(*previous)
        arguments = (dependencies, c_size_t(len(previous)), to, source, c_size_t(SIZE), c_int(hip.D2D))
        hip.check("hipGraphAddMemcpyNode1D", byref(node), graph, *arguments)
        previous = [node]
    executable = instantiate(graph)
    hip.check("hipGraphDestroy", graph)
    hip.check("hipGraphLaunch", executable, stream)
    synchronize(stream)
    assert value(buffers[-1]) == 3


def unknown_calls_say_their_name():
    assert hip.call("hipMemCreate", None, c_size_t(1), None, ctypes.c_ulonglong(0)) == hip.NOT_SUPPORTED


CASES = [
    streams_run_after_the_call,
    copies_read_pinned_memory_late,
    copies_from_pageable_memory_wait,
    streams_do_not_wait_for_each_other,
    events_order_streams,
    a_wait_means_the_event_as_it_was_recorded_before,
    events_tell_time,
    the_null_stream_waits_for_blocking_streams,
    free_waits_for_the_device,
    handles_and_ranges_are_checked,
    memory_runs_out,
    captured_work_runs_at_each_replay,
    capture_follows_events_to_other_streams,
    a_fork_must_be_joined,
    calls_that_wait_end_a_capture,
    graphs_run_in_an_order_that_dependencies_allow,
]


if __name__ == "__main__":
    globals()[sys.argv[1]]()
