"""aiter_experts: AITER's mixture of experts for torch, in bfloat16 or float16, inside a JAX program.

AITER builds its kernels for unquantised experts by itself and calls them through torch. Here torch sees XLA's
buffers, and the result is copied once, from the buffer that AITER makes to XLA's.
"""

from __future__ import annotations

import enum
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, LibraryError, rule
from jax_moriep.interop.call import dlpack_call

_ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu"}


class ActivationType(enum.IntEnum):
    """The numbers of ``aiter.ActivationType``, for a function that is not AITER's."""

    Silu = 0
    Gelu = 1


def aiter_experts(
    came: Any,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    first_expert: int | jax.Array = 0,
    fused_moe: Callable[..., Any] | None = None,
) -> jax.Array:
    """Runs this rank's experts by ``aiter.fused_moe``; a ``jm.expert_mlp`` for AMD GPUs with torch.

    It takes rows, or tokens as a token-major transport brings them::

        disp = jm.dispatch(x, route.ids, route.weights, cfg, axis_name="ep")
        y = jm.combine(jm.interop.aiter_experts(disp, params, cfg), disp.plan, axis_name="ep")

    Every route with an expert here is computed; padding and other routes are masked and cost nothing. There
    is no gradient. **It has not run on AMD hardware yet**: tests run it with functions of the same signature.

    Args:
      came: what ``jm.dispatch`` returned, or ``transports.arrivals.Arrivals``; bfloat16 or float16.
      params: this rank's experts in ``layout="plain"``: w1 [L, 2*I, H] and w2 [L, H, I] in the same dtype.
      cfg: the layer; silu or gelu, without expert biases and quantisation.
      first_expert: the id of this rank's first expert; arrivals have ids of all ranks.
      fused_moe: another function to call, on torch tensors, with the arguments of
        ``aiter.fused_moe.fused_moe``.

    Returns:
      Of rows [C, H], ready for ``jm.combine``; of arrivals [N, H], the sum over each token's experts here.
      Rows that stand for no token are zero.

    Raises:
      ConfigError: the layer is not one that AITER computes so, or dtypes differ; so does a derivative.
      LibraryError: torch or AITER is missing.
    """
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    _check_config(cfg, params)
    if hasattr(came, "rows"):
        tokens, ids, weights, count = _of_rows(came)
    else:
        tokens, ids, weights, count = came.tokens, came.ids - first_expert, came.weights, came.count
    _check_dtypes(tokens, params)
    num_local = params.w1.shape[0]
    # One more expert, which is not here: AITER must not see an id that the mask does not have.
    ids = jnp.where((ids >= 0) & (ids < num_local), ids, num_local)
    mask = (jnp.arange(num_local + 1) < num_local).astype(jnp.int32)
    fn = _function(*_of_aiter(fused_moe, _ACTIVATIONS[cfg.activation]))
    operands = (tokens, params.w1, params.w2, weights, ids, mask, jnp.maximum(count, 0))
    out: Any = _forward_only(fn, *operands)
    # AITER leaves rows behind the last token as its allocator gave them.
    unused = jnp.where(count < 0, jnp.nan, 0).astype(out.dtype)
    return jnp.where(jnp.arange(out.shape[0])[:, None] < count, out, unused)


def _of_rows(disp: Any) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Rows as tokens of one expert each; padding has none. The count ends behind the last run."""
    padded = -(-disp.group_sizes // disp.block) * disp.block
    ends = jnp.cumsum(padded)
    row = jnp.arange(disp.rows.shape[0])
    expert = jnp.searchsorted(ends, row, side="right")
    in_run = jnp.minimum(expert, len(ends) - 1)
    real = (expert < len(ends)) & (row < (ends - padded + disp.group_sizes)[in_run])
    ids = jnp.where(real, expert, -1).astype(jnp.int32)
    count = jnp.minimum(ends[-1:], len(row)).astype(jnp.int32)
    return disp.rows, ids[:, None], disp.row_weights[:, None], count


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward_only(fn: Callable[..., Any], tokens: jax.Array, *others: jax.Array) -> jax.Array:
    return dlpack_call(fn, jax.ShapeDtypeStruct(tokens.shape, tokens.dtype))(tokens, *others)


def _refuse_gradient(fn: Callable[..., Any], *operands: jax.Array) -> Any:
    raise ConfigError(
        "aiter_experts must not be differentiated, because AITER has no backward pass; train with "
        "jm.expert_mlp, or stop the gradient with jax.lax.stop_gradient"
    )


_forward_only.defvjp(_refuse_gradient, _refuse_gradient)


@functools.cache
def _function(fused_moe: Callable[..., Any], activation: Any) -> Callable[..., None]:
    """The function of a program's custom call; the same one each time, because programs hold it by name."""

    def aiter_fused_moe(*tensors: Any) -> None:
        from_dlpack = importlib.import_module("torch").from_dlpack
        tokens, w1, w2, weights, ids, mask, count, out = map(from_dlpack, tensors)
        out[...] = fused_moe(
            tokens, w1, w2, weights, ids, expert_mask=mask, activation=activation, num_local_tokens=count
        )

    return aiter_fused_moe


def _of_aiter(fused_moe: Callable[..., Any] | None, activation: str) -> tuple[Callable[..., Any], Any]:
    """The function to call and its kind of activation. Also imports torch, so that XLA's stream is its."""
    _import("torch", "torch is not installed", "install AMD's build of it for this ROCm, beside jax's")
    if fused_moe is not None:
        return fused_moe, ActivationType[activation]
    module = _import(
        "aiter.fused_moe",
        "AITER is not installed",
        "install amd-aiter for this ROCm, or use jm.expert_mlp, whose kernels need neither",
    )
    return module.fused_moe, getattr(importlib.import_module("aiter").ActivationType, activation)


def _import(name: str, what: str, cure: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise LibraryError(f"aiter_experts needs torch and AITER, and {what} ({e}); {cure}") from e


def _check_config(cfg: MoEConfig, params: MoEParams) -> None:
    wanted = {
        "activation": (cfg.activation, tuple(_ACTIVATIONS)),
        "expert_bias": (cfg.expert_bias, (False,)),
        "expert_quant": (cfg.expert_quant, (None,)),
        "params.layout": (params.layout, ("plain",)),
    }
    for name, (value, allowed) in wanted.items():
        if value not in allowed:
            must = f"be {' or '.join(map(repr, allowed))} for aiter_experts"
            raise ConfigError(rule(name, value, must, "use jm.expert_mlp"))
    if cfg.router == "llama4":
        must = "not multiply the experts' inputs for aiter_experts"
        raise ConfigError(rule("router", cfg.router, must, "use jm.expert_mlp"))


def _check_dtypes(tokens: jax.Array, params: MoEParams) -> None:
    if str(tokens.dtype) not in ("bfloat16", "float16"):
        must = "be bfloat16 or float16 for aiter_experts"
        raise ConfigError(rule("rows.dtype", str(tokens.dtype), must, "cast x before the layer"))
    for name in ("w1", "w2"):
        dtype = getattr(params, name).dtype
        if dtype != tokens.dtype:
            must = f"be that of the rows, {tokens.dtype}, for aiter_experts, which casts nothing"
            raise ConfigError(rule(f"{name}.dtype", str(dtype), must, "cast the weights once, ahead"))
