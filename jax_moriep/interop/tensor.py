"""What a function that runs inside a program gets: XLA's buffers as objects of the DLPack protocol."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from jax_moriep.errors import rule
from jax_moriep.interop import dtypes

CPU, CUDA, ROCM = 1, 2, 10

# By [] each is an object of our own: those that attributes of pythonapi give are shared with other users of
# ctypes (jax.ffi is one), who set argument types too.
_python = ctypes.pythonapi
_new_capsule = _python["PyCapsule_New"]
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_capsule = _python["PyCapsule_IsValid"]
_is_capsule.restype = ctypes.c_int
_is_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]
_rename_capsule = _python["PyCapsule_SetName"]
_rename_capsule.restype = ctypes.c_int
_rename_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]

# A capsule does not copy its name, so these objects must live as long as any capsule. By: versioned or not.
_NAME = {True: b"dltensor_versioned", False: b"dltensor"}
_USED = {True: b"used_dltensor_versioned", False: b"used_dltensor"}


class Loans:
    """The capsules that were made during one call.

    Args:
      lib: the interop library.
      call: the address of the running call.
    """

    def __init__(self, lib: ctypes.CDLL, call: int) -> None:
        self.open = True
        self._lib = lib
        self._call = call
        self._capsules: list[tuple[Any, int, bool]] = []

    def lend(self, index: int, code: tuple[int, int], *, versioned: bool, read_only: bool) -> Any:
        """A DLPack capsule over a tensor of the call."""
        if not self.open:
            raise BufferError(
                "a tensor of dlpack_call was used after the function returned, when its memory is XLA's "
                "again; copy inside the function what must live longer"
            )
        managed = self._lib.moriep_interop_lend(self._call, index, *code, int(versioned), int(read_only))
        capsule = _new_capsule(managed, _NAME[versioned], None)
        self._capsules.append((capsule, managed, versioned))
        return capsule

    def close(self) -> None:
        """Ends the call's loans; a capsule that nobody consumed can be consumed no more."""
        self.open = False
        for capsule, managed, versioned in self._capsules:
            if _is_capsule(capsule, _NAME[versioned]):
                _rename_capsule(capsule, _USED[versioned])
                self._lib.moriep_interop_take_back(managed, int(versioned))
        self._capsules.clear()

    def kept(self) -> int:
        """How many tensors are still alive that were made from the capsules."""
        return self._lib.moriep_interop_lent(self._call)


class Tensor:
    """An input or an output of the running function: XLA's own buffer, lent until the function returns.

    ``torch.from_dlpack(x)``, ``cupy.from_dlpack(x)``, ``np.from_dlpack(x)`` and ``np.asarray(x)`` are views
    of it, never copies. NumPy has no bfloat16 and no float8 in DLPack; ``np.asarray`` gives ml_dtypes' ones.

    Attributes:
      shape: its shape.
      dtype: its NumPy dtype, of ml_dtypes where NumPy has none.
      device: (type, id) as DLPack numbers devices.
      stream: the address of the stream on which XLA runs the call; 0 on the CPU.
      writable: True for an output; an input is XLA's and must not be written.
    """

    def __init__(
        self,
        loans: Loans,
        index: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        device: tuple[int, int],
        stream: int,
        *,
        writable: bool,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.stream = stream
        self.writable = writable
        self._loans = loans
        self._index = index

    def __repr__(self) -> str:
        kind = "output" if self.writable else "input"
        return f"Tensor({kind}, shape={self.shape}, dtype={self.dtype.name}, device={self.device})"

    def bits(self) -> Tensor:
        """The same memory as unsigned integers of the same size, for a library without its dtype."""
        dtype = np.dtype(f"uint{8 * self.dtype.itemsize}")
        return Tensor(
            self._loans, self._index, self.shape, dtype, self.device, self.stream, writable=self.writable
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule over the buffer, of DLPack 1.x if the consumer knows it.

        Raises:
          BufferError: the function has returned, or the consumer asks for a copy or another device, or runs
            on a stream that does not wait for XLA's.
        """
        if copy:
            raise BufferError(rule("copy", copy, "be None or False", "copy with the consumer's own function"))
        if dl_device is not None and tuple(map(int, dl_device)) != self.device:
            raise BufferError(
                rule("dl_device", tuple(dl_device), f"be {self.device}", "move the tensor after from_dlpack")
            )
        self._check_stream(stream)
        versioned = max_version is not None and max_version[0] >= 1
        return self._loans.lend(
            self._index, dtypes.CODES[self.dtype.name], versioned=versioned, read_only=not self.writable
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """A NumPy view on the CPU; a copy only if another dtype is asked for."""
        if self.device[0] != CPU:
            raise TypeError("a tensor on a GPU has no NumPy view; use torch.from_dlpack or cupy.from_dlpack")
        native = self.dtype.isbuiltin == 1
        array = np.from_dlpack(self if native else self.bits()).view(self.dtype)  # pyright: ignore[reportArgumentType]
        if self.writable and not array.flags.writeable:
            raise BufferError("NumPy before 2.1 makes read-only arrays from DLPack; use NumPy >= 2.1")
        if dtype is None or np.dtype(dtype) == self.dtype:
            return array.copy() if copy else array
        if copy is False:
            raise ValueError(f"dtype {self.dtype.name} is {np.dtype(dtype).name} only in a copy")
        return array.astype(dtype)

    def _check_stream(self, stream: int | None) -> None:
        """Refuses a consumer that would not see XLA's work, nor XLA the consumer's.

        DLPack lets a producer make the consumer's stream wait, but gives no way to make XLA's wait for the
        consumer afterwards. -1 is a consumer that takes care itself.
        """
        if self.device[0] == CPU or stream in (self.stream, -1):
            return
        raise BufferError(
            rule(
                "stream",
                stream,
                f"be XLA's stream {self.stream}",
                "import torch or cupy before the program runs, so that the function starts on that stream, "
                "or enter torch.cuda.ExternalStream(x.stream) or cupy.cuda.ExternalStream(x.stream) in it",
            )
        )
