"""Numbers that others have published for an exchange, to stand beside ours; none was measured here."""

from __future__ import annotations

import dataclasses

MARK = "published by MORI, not measured here"


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
      operation: "dispatch" or "combine".
      tokens: T, per rank.
      wire: what is sent.
      gb_per_s: bytes that a rank receives, its own included, over the time.
      seconds: None where only the rate was published.
    """

    operation: str
    tokens: int
    wire: str
    gb_per_s: float
    seconds: float | None = None


# MORI's README of 1.2.4: DeepSeek-V3's sizes, eight ranks of one machine.
_DEVICE, _RANKS, _HIDDEN, _TOP_K = "MI300X", 8, 7168, 8
_ROWS = (
    Row("dispatch", 128, "fp8", 134, 35e-6),
    Row("dispatch", 4096, "fp8", 307),
    Row("combine", 128, "bf16", 204, 47e-6),
    Row("combine", 4096, "bf16", 330),
)


def rows(device: str, ranks: int, hidden: int, top_k: int, tokens: int, operation: str) -> list[Row]:
    """What was published for such an exchange.

    Args:
      device: as jax names its kind.
      ranks: R.
      hidden: H.
      top_k: K.
      tokens: T.
      operation: "dispatch" or "combine".
    """
    if _DEVICE not in device.upper() or (ranks, hidden, top_k) != (_RANKS, _HIDDEN, _TOP_K):
        return []
    return [row for row in _ROWS if (row.operation, row.tokens) == (operation, tokens)]
