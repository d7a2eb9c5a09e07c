"""ExpertSpec: what an implementation of the experts must know at trace time."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The static side of one call of the experts; hashable by value.

    Attributes:
      activation: a name in ``config.ACTIVATIONS``.
      activation_limit: clamp of "swiglu_clamped".
      activation_alpha: sigmoid slope of "swiglu_clamped".
      weight_input: a row's weight multiplies the expert's input row (llama4) instead of its output row.
      block: every expert's run of rows starts at a multiple of it.
      saved_rows: the backward pass may keep the pre-activations of about this many rows and recompute
        those of the rows behind them; None: keep all.
    """

    activation: str
    activation_limit: float
    activation_alpha: float
    weight_input: bool
    block: int
    saved_rows: int | None = None
