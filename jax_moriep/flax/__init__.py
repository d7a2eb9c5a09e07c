"""The layer as a Flax module: ``EpMoE`` for nnx, ``LinenEpMoE`` for linen. Only this folder imports Flax.

| file | |
|---|---|
| `nnx_moe.py`, `linen_moe.py` | the modules |
| `shared.py` | what both have in common |
"""

try:
    import flax as _flax
except ImportError as e:
    raise ImportError(
        f"jax_moriep.flax needs flax, and importing it failed ({e}); pip install 'jax-moriep[flax]'"
    ) from e

from jax_moriep.flax.linen_moe import LinenEpMoE
from jax_moriep.flax.nnx_moe import EpMoE, FrozenWeight, ScoreBias

__all__ = ["EpMoE", "FrozenWeight", "LinenEpMoE", "ScoreBias"]

del _flax
