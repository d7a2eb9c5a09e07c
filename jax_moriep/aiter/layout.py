"""How AITER's kernels want the codes of weights to lie, and the way back."""

from __future__ import annotations

import jax

_ROWS = 16
_COLUMNS = 32
_LANE = 16  # bytes that a lane loads at once


def shuffled(codes: jax.Array) -> jax.Array:
    """Codes [..., N, D] of 8 bits in tiles of 16 rows and 32 columns, in which the 16 bytes that a lane loads
    are neighbours, first those of all rows' first half.

    Args:
      codes: N must be a multiple of 16 and D of 32.

    Returns:
      The same shape and values, elsewhere.
    """
    *lead, tall, wide = codes.shape
    halves = _COLUMNS // _LANE
    tiles = codes.reshape(*lead, tall // _ROWS, _ROWS, wide // _COLUMNS, halves, _LANE)
    return _swapped(tiles, len(lead), (0, 2, 3, 1, 4)).reshape(codes.shape)


def unshuffled(codes: jax.Array) -> jax.Array:
    """The inverse of ``shuffled``."""
    *lead, tall, wide = codes.shape
    halves = _COLUMNS // _LANE
    tiles = codes.reshape(*lead, tall // _ROWS, wide // _COLUMNS, halves, _ROWS, _LANE)
    return _swapped(tiles, len(lead), (0, 3, 1, 2, 4)).reshape(codes.shape)


def _swapped(tiles: jax.Array, lead: int, order: tuple[int, ...]) -> jax.Array:
    return tiles.transpose(*range(lead), *(lead + axis for axis in order))
