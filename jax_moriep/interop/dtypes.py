"""dtypes as DLPack numbers them: (type code, bits)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

CODES: dict[str, tuple[int, int]] = {
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "bfloat16": (4, 16),
    "complex64": (5, 64),
    "complex128": (5, 128),
    "bool": (6, 8),
    "float8_e3m4": (7, 8),
    "float8_e4m3": (8, 8),
    "float8_e4m3b11fnuz": (9, 8),
    "float8_e4m3fn": (10, 8),
    "float8_e4m3fnuz": (11, 8),
    "float8_e5m2": (12, 8),
    "float8_e5m2fnuz": (13, 8),
    "float8_e8m0fnu": (14, 8),
}
_NAMES = {code: name for name, code in CODES.items()}


def supported(dtype: Any) -> bool:
    """Whether DLPack has the dtype in whole bytes."""
    return isinstance(dtype, np.dtype) and dtype.name in CODES


def dtype_of(code: int, bits: int) -> np.dtype[Any]:
    """NumPy's (or ml_dtypes') dtype of a DLPack type."""
    return jnp.dtype(_NAMES[code, bits])
