"""Data by a formula: every value is a function of where it stands, so that it can be made anywhere.

Devices make their own part of what a run needs, whatever its size, and the oracle makes the few values that
it looks at, on the host, the same to the bit: all values are whole multiples of a power of two with at most
eight significant bits, which every dtype of the bench holds exactly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

TOKENS, COTANGENTS, W1, W2, FACTORS = range(1, 6)
"""What a value is of; each has values of its own."""
STEPS = {W1: 1, W2: 3}
"""By how many rows an expert's matrix is turned against that of the expert before it."""


def values(what: int, row: Any, column: Any, exponent: int = -7) -> Any:
    """Even-looking numbers in [-128, 128) * 2**exponent.

    Args:
      what: ``TOKENS`` or another of these.
      row: uint32 of NumPy or JAX, of any shape.
      column: likewise; the two are broadcast together.
      exponent: of the step between neighbouring values.

    Returns:
      f32, of the broadcast shape.
    """
    word = (
        row * np.uint32(0x9E3779B1)
        + column * np.uint32(0x85EBCA77)
        + np.uint32(what * 0x27D4EB2F & 0xFFFFFFFF)
    )
    word = (word ^ (word >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    word = (word ^ (word >> np.uint32(12))) * np.uint32(0x297A2D39)
    byte = (word >> np.uint32(24)).astype(np.float32)
    return (byte - np.float32(128)) * np.float32(2.0**exponent)


def matrix(what: int, rows: np.ndarray, num_columns: int, exponent: int = -7) -> np.ndarray:
    """f32[rows, num_columns] of some rows, on the host."""
    column = np.arange(num_columns, dtype=np.uint32)
    return values(what, np.asarray(rows, np.uint32)[:, None], column[None], exponent)


def by_blocks(what: int, matrix: Any, row: Any, num_rows: int, height: int) -> tuple[Any, Any]:
    """Where the rows of one of many matrices come from, which differ by what quantising commutes with.

    Rows are turned within their blocks of ``height``, and each block has a factor of its own, 1 or 2. So a
    block has the same values in another order, times a power of two, and its codes are those of the first
    matrix.

    Args:
      what: ``W1`` or ``W2``.
      matrix: uint32, its number.
      row: uint32, below ``num_rows``; broadcast against ``matrix``.
      num_rows: of the part of the matrix whose blocks these are.
      height: of a block; the last one may have less.

    Returns:
      The row of the first matrix, and its factor, f32.
    """
    last = num_rows // height
    block = row // np.uint32(height)
    size = np.uint32(height) - np.uint32(height - num_rows % height) * (block == last)
    inside = (row % np.uint32(height) + size - matrix * np.uint32(STEPS[what]) % size) % size
    factor = 1 + (values(FACTORS + what, matrix, block) > 0).astype(np.float32)
    return block * np.uint32(height) + inside, factor


def exponent_for(fan_in: int) -> int:
    """The exponent with which a sum of ``fan_in`` products with numbers near 1 is near 1."""
    return -6 - round(math.log2(fan_in) / 2)
