"""Other array libraries inside JAX programs; see docs/interop.md.

This package stands alone: it needs ``runtime``, ``config`` and ``errors``, and nothing needs it.
"""

from jax_moriep.interop.aiter import aiter_experts
from jax_moriep.interop.call import dlpack_call
from jax_moriep.interop.tensor import Tensor

__all__ = ["Tensor", "aiter_experts", "dlpack_call"]
