"""HIP calls by ctypes, for scripts that the tests run on the simulated devices."""

import ctypes
import functools
from ctypes import byref, c_char, c_float, c_int, c_size_t, c_uint, c_void_p

import numpy as np

# Error codes and flags of hip_runtime_api.h.
SUCCESS = 0
INVALID_VALUE = 1
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_READY = 600
ILLEGAL_ADDRESS = 700
NOT_SUPPORTED = 801
CAPTURE_UNSUPPORTED = 900
CAPTURE_INVALIDATED = 901
CAPTURE_UNJOINED = 904
H2D, D2H, D2D = 1, 2, 3
NON_BLOCKING = 1
NO_TIMING = 2
CAPTURE_GLOBAL = 0

HOST_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p)


class IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", c_char * 64)]


class LaunchBuffer:
    """Launch arguments in the form of HIP_LAUNCH_PARAM_BUFFER_POINTER, and what they point at."""

    def __init__(self, data: bytes):
        self.data = ctypes.create_string_buffer(data, len(data))
        self.size = c_size_t(len(data))
        pointers = [c_void_p(1), ctypes.cast(self.data, c_void_p)]
        pointers += [c_void_p(2), ctypes.cast(ctypes.pointer(self.size), c_void_p), c_void_p(3)]
        self.extra = (c_void_p * 5)(*pointers)


@functools.cache
def library() -> ctypes.CDLL:
    """The runtime; only a process on the simulated devices finds it."""
    return ctypes.CDLL("libamdhip64.so.7")


def call(name: str, *arguments: object) -> int:
    """The error code of a call. Integers that do not fit an int must be wrapped by the caller."""
    return getattr(library(), name)(*arguments)


def check(name: str, *arguments: object) -> None:
    error = call(name, *arguments)
    assert error == SUCCESS, f"{name} gave {error}"


def malloc(size: int) -> c_void_p:
    out = c_void_p()
    check("hipMalloc", byref(out), c_size_t(size))
    return out


def host_malloc(size: int) -> c_void_p:
    out = c_void_p()
    check("hipHostMalloc", byref(out), c_size_t(size), c_uint(0))
    return out


def stream(flags: int = NON_BLOCKING) -> c_void_p:
    out = c_void_p()
    check("hipStreamCreateWithFlags", byref(out), c_uint(flags))
    return out


def event(flags: int = 0) -> c_void_p:
    out = c_void_p()
    check("hipEventCreateWithFlags", byref(out), c_uint(flags))
    return out


def read(address: c_void_p, size: int) -> bytes:
    out = ctypes.create_string_buffer(size)
    check("hipMemcpy", out, address, c_size_t(size), c_int(D2H))
    return out.raw


def write(address: c_void_p, data: bytes) -> None:
    check("hipMemcpy", address, ctypes.c_char_p(data), c_size_t(len(data)), c_int(H2D))


def array(data: np.ndarray) -> c_void_p:
    """Device memory with the values of an array."""
    address = malloc(data.nbytes)
    write(address, data.tobytes())
    return address


def load(path: str) -> c_void_p:
    out = c_void_p()
    check("hipModuleLoad", byref(out), path.encode())
    return out


def function(module: c_void_p, name: str) -> c_void_p:
    out = c_void_p()
    check("hipModuleGetFunction", byref(out), module, name.encode())
    return out


def launch(
    kernel: c_void_p,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: bytes,
    on: c_void_p | None = None,
    lds: int = 0,
) -> int:
    """The error code of a launch of ``grid`` workgroups."""
    buffer = LaunchBuffer(arguments)
    sizes = [c_uint(n) for n in (*grid, *block, lds)]
    return library().hipModuleLaunchKernel(kernel, *sizes, on, None, buffer.extra)


def elapsed(start: c_void_p, stop: c_void_p) -> float:
    out = c_float()
    check("hipEventElapsedTime", byref(out), start, stop)
    return out.value
