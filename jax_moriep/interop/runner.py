"""Runs a registered function when XLA reaches its custom call; csrc/interop/call.h is the other side."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import traceback

from jax_moriep.interop import dtypes, registry, streams
from jax_moriep.interop.tensor import CPU, Loans, Tensor
from jax_moriep.runtime import library, targets


class _DlTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("function_size", ctypes.c_int64),
        ("tensors", ctypes.POINTER(_DlTensor)),
        ("num_inputs", ctypes.c_int64),
        ("num_tensors", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    ]


# A callback of this kind takes the GIL by itself: XLA calls from threads that Python does not know.
_RUNNER = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(_Call))


# How long Python, when it ends, waits for functions that are still running.
_EXIT_SECONDS = 60.0
_keep: list[object] = []  # What C++ has the address of.


@functools.cache
def start() -> None:
    """Loads the library, makes its custom call known to XLA and connects it with the registry, once.

    Raises:
      LibraryError: the library is missing or does not fit.
    """
    lib = library.load("interop")
    lib.moriep_interop_set_runner.argtypes = [_RUNNER]
    lib.moriep_interop_set_runner.restype = None
    lib.moriep_interop_lend.argtypes = [ctypes.c_void_p, ctypes.c_int64] + 4 * [ctypes.c_int32]
    lib.moriep_interop_lend.restype = ctypes.c_void_p
    lib.moriep_interop_take_back.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    lib.moriep_interop_take_back.restype = None
    lib.moriep_interop_lent.argtypes = [ctypes.c_void_p]
    lib.moriep_interop_lent.restype = ctypes.c_int64
    lib.moriep_interop_fail.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]
    lib.moriep_interop_fail.restype = None
    runner = _RUNNER(functools.partial(_run, lib))
    lib.moriep_interop_set_runner(runner)
    _keep.append(runner)
    lib.moriep_interop_stop.argtypes = [ctypes.c_double]
    atexit.register(lib.moriep_interop_stop, _EXIT_SECONDS)
    targets.register_interop()


def _run(lib: ctypes.CDLL, pointer: ctypes._Pointer[_Call]) -> int:
    """Runs a call; gives 1, or 0 after it has set the text of the error."""
    call = pointer.contents
    try:
        _run_function(lib, call)
    except BaseException as e:  # noqa: BLE001 - nothing may pass through XLA; the error's text carries it
        text = "".join(traceback.format_exception_only(e)).strip()
        where = "".join(traceback.format_exception(e)).strip()
        message = f"{text}\n\n{where}".encode(errors="replace")
        lib.moriep_interop_fail(call.call, message, len(message))
        return 0
    return 1


def _run_function(lib: ctypes.CDLL, call: _Call) -> None:
    name = ctypes.string_at(call.function, call.function_size).decode()
    fn = registry.function(name)
    stream = call.stream or 0
    loans = Loans(lib, call.call)
    tensors = [_tensor(loans, call, index, stream) for index in range(call.num_tensors)]
    device_type, device = tensors[0].device
    on_stream = contextlib.nullcontext() if device_type == CPU else streams.current(device, stream)
    try:
        with on_stream:
            fn(*tensors)
    finally:
        loans.close()
    if loans.kept():
        gc.collect()  # A tensor in a cycle is nobody's and only not yet collected.
    if kept := loans.kept():
        raise RuntimeError(
            f"the function kept {kept} of its tensors (or views of them) after it returned, when their "
            "memory is XLA's again; copy what must live longer (torch: .clone(), NumPy: .copy())"
        )


def _tensor(loans: Loans, call: _Call, index: int, stream: int) -> Tensor:
    tensor = call.tensors[index]
    return Tensor(
        loans,
        index,
        tuple(tensor.shape[: tensor.ndim]),
        dtypes.dtype_of(tensor.code, tensor.bits),
        (tensor.device_type, tensor.device_id),
        stream,
        writable=index >= call.num_inputs,
    )
