"""Other array libraries inside JAX programs; see docs/interop.md.

This package stands alone: it needs ``runtime``, ``config`` and ``errors``, and nothing needs it.

| file | |
|---|---|
| `call.py` | ``dlpack_call`` |
| `registry.py`, `runner.py` | the functions by name, and what runs one when XLA comes to it |
| `tensor.py`, `dtypes.py`, `streams.py` | what a function is given, and on which stream |
| `aiter.py` | ``aiter_experts``: AITER's experts for torch |
"""

from jax_moriep.interop.aiter import aiter_experts
from jax_moriep.interop.call import dlpack_call
from jax_moriep.interop.tensor import Tensor

__all__ = ["Tensor", "aiter_experts", "dlpack_call"]
