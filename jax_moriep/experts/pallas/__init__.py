"""experts="triton": grouped matrix products in Pallas, on every GPU of NVIDIA and AMD.

Pallas-Triton has kernels for every GPU, size and option (``triton/``), Pallas-Mosaic faster ones for the
common sizes on NVIDIA's Hopper (``hopper/``); ``choice`` says which of them a call gets, and why.

The rows' layout makes the products dense: a run starts at a multiple of ``block`` and belongs to one expert,
so a tile of rows needs one expert's weights and no gather. What follows from that:

- A table of tiles, made on the device from ``group_sizes``, says which expert and rows a tile has. Programs
  walk over the tiles in use only, so that time follows the rows and not the capacity; only the zeros of the
  results are as long as the capacity.
- Activation, biases, row weights and all masking are epilogues. A value that is padding reaches neither a
  result nor a gradient, whatever it is: masks select, they never multiply.
- Weights are read in the public layout. Pre-activations are kept for ``spec.saved_rows`` rows and computed
  again for the rows behind them.
- A sum has one program and one order, so that the same bytes in give the same bits out.

On a CPU the same kernels run interpreted, which serves tests: ``unavailable_reason`` says so.

| file | |
|---|---|
| `mlp.py` | the MLP: its derivative, and the kernels that each platform gets |
| `choice.py` | Mosaic's kernels or Triton's, and why |
| `triton/`, `hopper/` | the kernels; `triton/tuning.py` and constants in `hopper/` say how they are cut |
| `launch.py`, `tiles.py` | what kernels share: the call of Pallas, and the rows of each tile |
| `activation.py` | activations inside a kernel |
| `rowwise.py`, `biases.py`, `quantise.py` | passes over rows |
"""

from __future__ import annotations

import jax

from jax_moriep.config import MoEConfig
from jax_moriep.experts.pallas import choice
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, Stack
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime.place import Place

PLATFORMS = ("gpu", "cuda", "rocm")


def unavailable_reason(place: Place, cfg: MoEConfig | None) -> str | None:
    """None on GPUs; elsewhere why not."""
    del cfg
    if place.platform in PLATFORMS:
        return None
    return f"it needs a GPU of NVIDIA or AMD, and this is {place.platform}; use experts='blocked'"


def describe(place: Place, cfg: MoEConfig | None, shape: ExchangeShape | None, dtype: str) -> str | None:
    """See ``experts.Describes.describe``: whether Pallas-Mosaic's or Pallas-Triton's kernels run, and why."""
    if unavailable_reason(place, cfg) is not None:
        return None
    return choice.describe(place, cfg, shape, dtype)


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    spec: ExpertSpec,
    stack: Stack | None = None,
) -> jax.Array:
    """See ``blocked.expert_mlp``."""
    # Imported on first use: Pallas would be most of what `import jax_moriep` adds to jax's own time.
    from jax_moriep.experts.pallas import mlp

    return mlp.expert_mlp(rows, row_weights, group_sizes, weights, spec, stack)
