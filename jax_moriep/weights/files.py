"""The safetensors files of a checkpoint: names, shapes and places of tensors, and reading parts of them.

The ``safetensors`` package gives NumPy no float8, and bfloat16 from files only; and it makes new arrays,
while stacked weights want to be read to their place. A file is simple: eight bytes with the length of a JSON
header (little-endian), the header with each tensor's dtype, shape and place, and then the bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep.errors import ConfigError, rule

INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000
"""Bytes; the limit of safetensors itself."""
_LARGEST_READ = 1 << 30
"""Bytes of one call: Linux reads no more than 2 GiB at once."""
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
        "F8_E8M0": jnp.float8_e8m0fnu,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


class Tensor:
    """A tensor in a file, or some of its first dimension; nothing is read before it is asked for.

    Attributes:
      dtype: of NumPy.
      shape: of what is asked for.
    """

    def __init__(self, file: _File, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self._file = file
        self._offset = offset

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        """Some of the first dimension, without reading them."""
        first, end, step = rows.indices(self.shape[0])
        if step != 1:
            raise IndexError("a tensor in a file has slices of step 1 only")
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (max(0, end - first), *self.shape[1:])
        return Tensor(self._file, self.dtype, shape, self._offset + first * row_bytes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, self.dtype)
        self.read_into(out)
        return out if dtype is None else out.astype(dtype, copy=False)

    def read_into(self, out: np.ndarray) -> None:
        """Reads into a C-contiguous array of the same shape and dtype."""
        if out.size:
            self._file.read(self._offset, out.reshape(-1).view(np.uint8).data)


class _File:
    """One file: what its header says, and an open descriptor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._size = os.fstat(self._descriptor).st_size
            self._start, self._header = self._read_header()
        except OSError as e:
            self.close()
            raise ConfigError(
                rule("file", str(path), f"be readable ({e.strerror})", "see that the checkpoint is complete")
            ) from None
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Gives the descriptor back."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def names(self) -> list[str]:
        return list(self._header)

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, as far as the header can be believed."""
        entry = self._header.get(name)
        if entry is None:
            raise self._error(f"lacks {name!r}, which {INDEX} says is in it")
        if not isinstance(entry, dict):
            raise self._error(f"has {name!r} as {entry!r} in its header, not as an object")
        kind, shape, place = (entry.get(key, []) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(kind, str) or kind not in _DTYPES:
            raise self._error(
                f"has {name!r} of dtype {kind!r}, which is none of {tuple(_DTYPES)}", "convert the checkpoint"
            )
        if not (_are_counts(shape) and _are_counts(place) and len(place) == 2):
            raise self._error(f"has {name!r} with shape {shape!r} and data_offsets {place!r} in its header")
        dtype, (first, end) = _DTYPES[kind], place
        if end > self._size - self._start or end - first != math.prod(shape) * dtype.itemsize:
            raise self._error(
                f"has {name!r} of shape {shape} and dtype {kind} at bytes {first} to {end} of "
                f"{self._size - self._start}"
            )
        return Tensor(self, dtype, tuple(shape), self._start + first)

    def read(self, offset: int, out: memoryview) -> None:
        """Fills a buffer with the bytes from an offset on."""
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done : done + _LARGEST_READ]], offset + done)
            if count == 0:
                raise self._error("ends early")
            done += count

    def _read_header(self) -> tuple[int, dict[str, Any]]:
        """Where the bytes begin, and the header."""
        if self._size < 8:
            raise self._error(f"has {self._size} bytes")
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        if length > min(_LARGEST_HEADER, self._size - 8):
            raise self._error(f"says that its header has {length} bytes, and has {self._size} itself")
        text = bytearray(length)
        self.read(8, memoryview(text))
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise self._error(f"has a header that is no JSON ({e})") from None
        if not isinstance(header, dict):
            raise self._error("has a header that is no JSON object")
        header.pop("__metadata__", None)
        return 8 + length, header

    def _error(self, what: str, cure: str = "download it again") -> ConfigError:
        return ConfigError(f"safetensors file {str(self.path)!r} {what}; {cure}")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder, by their whole names. Headers are read of the files that are asked for only.

    Args:
      folder: with one safetensors file, or several and their index.

    Raises:
      ConfigError: there are none, or a file is not what it must be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._files: dict[str, _File] = {}
        self._file_of = self._of_index() if (self._folder / INDEX).is_file() else self._of_files()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def __getitem__(self, name: str) -> Tensor:
        return self._file(self._file_of[name]).tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _of_index(self) -> dict[str, str]:
        path = self._folder / INDEX
        try:
            found = json.loads(path.read_text())
        except ValueError as e:
            raise ConfigError(rule("index", str(path), f"be JSON ({e})", "download it again")) from None
        file_of = found.get("weight_map") if isinstance(found, dict) else None
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(file_of, dict) or not all(
            isinstance(file, str) and file == os.path.basename(file) and file.endswith(".safetensors")
            for file in file_of.values()
        ):
            must = "have a 'weight_map' from tensors to names of safetensors files beside it"
            raise ConfigError(rule("index", str(path), must, "download it again"))
        return file_of

    def _of_files(self) -> dict[str, str]:
        file_of: dict[str, str] = {}
        paths = sorted(self._folder.glob("*.safetensors"))
        self._check_parts({path.name for path in paths})
        for path in paths:
            for name in self._file(path.name).names():
                if name in file_of:
                    raise ConfigError(
                        f"folder {str(self._folder)!r} has {name!r} in {file_of[name]!r}, in {path.name!r} "
                        f"and no {INDEX} that says which counts; leave one checkpoint in the folder"
                    )
                file_of[name] = path.name
        if not file_of:
            raise ConfigError(
                rule(
                    "folder",
                    str(self._folder),
                    f"have a *.safetensors file, or several and {INDEX}",
                    "pass the folder of a checkpoint on this machine",
                )
            )
        return file_of

    def _check_parts(self, names: set[str]) -> None:
        """Refuses some of the files that by their names are parts of a whole."""
        for name in sorted(names):
            part = re.fullmatch(r"(.*-)(\d{5})(-of-(\d{5})\.safetensors)", name)
            if part is None:
                continue
            whole = (f"{part[1]}{i:05}{part[3]}" for i in range(1, int(part[4]) + 1))
            lost = next((other for other in whole if other not in names), None)
            if lost is not None:
                must = f"have {lost!r}, as it has {name!r}"
                raise ConfigError(rule("folder", str(self._folder), must, "download it again"))

    def _file(self, name: str) -> _File:
        if name not in self._files:
            self._files[name] = _File(self._folder / name)
        return self._files[name]
