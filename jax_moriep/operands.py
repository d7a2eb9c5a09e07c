"""What must hold of the arrays that a caller gives: a public function asks once, and nothing below it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, rule

ROW_DTYPES = ("float32", "bfloat16", "float16")
"""What tokens and rows may be of."""


def check_array(name: str, array: Any, cure: str = "wrap it in jnp.asarray") -> None:
    """Raises ConfigError unless it has a shape and a dtype."""
    if not (hasattr(array, "dtype") and hasattr(array, "shape")):
        raise ConfigError(rule(name, type(array).__name__, "be an array", cure))


def check_tokens(x: jax.Array, cfg: MoEConfig, *, in_rows: bool = False) -> None:
    """Raises ConfigError unless x is [..., hidden_size] of a dtype that rows can have.

    Args:
      x: the tokens.
      cfg: the layer.
      in_rows: x must be [T, hidden_size].
    """
    if isinstance(x, MoEParams):
        check_array("x", x, "call ep_moe(x, params, cfg)")
    check_array("x", x)
    if in_rows and (x.ndim != 2 or x.shape[1] != cfg.hidden_size):
        raise ConfigError(
            rule("x.shape", x.shape, f"be (T, hidden_size={cfg.hidden_size})", "reshape x to [T, H]")
        )
    if x.ndim < 1 or x.shape[-1] != cfg.hidden_size:
        raise ConfigError(
            rule("x.shape", x.shape, f"end in hidden_size={cfg.hidden_size}", "pass x as [..., H]")
        )
    if str(x.dtype) not in ROW_DTYPES:
        raise ConfigError(rule("x.dtype", str(x.dtype), "be float32, bfloat16 or float16", "cast x"))


def check_mask(token_mask: jax.Array, x: jax.Array) -> None:
    """Raises ConfigError unless it is bool of x's shape without H."""
    check_array("token_mask", token_mask)
    if token_mask.shape != x.shape[:-1] or token_mask.dtype != jnp.bool_:
        raise ConfigError(
            rule(
                "token_mask",
                f"{token_mask.dtype}{list(token_mask.shape)}",
                f"be bool{list(x.shape[:-1])}, x's shape without H",
                "compare or reshape it",
            )
        )
