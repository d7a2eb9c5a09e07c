"""How many bytes an exchange moves, by the convention of MORI's own benchmarks."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one dispatch, for each rank; combine moves the same bytes the other way.

    Attributes:
      received: int64[R], distinct (token, rank) pairs that a rank receives, its own tokens included, times
        the bytes of a row. This is what MORI and DeepEP divide by the time.
      remote: int64[R], the part of it that comes from other ranks.
    """

    received: np.ndarray
    remote: np.ndarray


def of_routes(ids: np.ndarray, num_ranks: int, experts_per_rank: int, row_bytes: int) -> Traffic:
    """Counts the bytes of an exchange.

    Args:
      ids: i32[R*T, K], expert ids of all tokens in rank order, each a valid expert.
      num_ranks: R.
      experts_per_rank: L.
      row_bytes: bytes of one token.

    Returns:
      The bytes.
    """
    num_tokens = ids.shape[0] // num_ranks
    goes_to = np.zeros((ids.shape[0], num_ranks), bool)
    np.put_along_axis(goes_to, ids // experts_per_rank, True, axis=1)
    # [source, destination]
    pairs = goes_to.reshape(num_ranks, num_tokens, num_ranks).sum(axis=1, dtype=np.int64)
    received = pairs.sum(axis=0)
    return Traffic(received * row_bytes, (received - np.diagonal(pairs)) * row_bytes)
