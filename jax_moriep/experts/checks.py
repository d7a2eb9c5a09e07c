"""What must hold between rows, weights and config before the experts run."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, rule
from jax_moriep.experts.spec import Rows
from jax_moriep.operands import ROW_DTYPES


def check_operands(given: Rows, params: MoEParams, cfg: MoEConfig) -> None:
    """Raises ConfigError unless rows, weights and config fit each other; see ``experts.expert_mlp``."""
    rows = given.rows
    if rows.ndim != 2 or rows.shape[1] != cfg.hidden_size:
        raise ConfigError(
            rule("rows.shape", rows.shape, f"be [C, H={cfg.hidden_size}]", "pass dispatch's rows")
        )
    capacity, hidden = rows.shape
    if str(rows.dtype) not in ROW_DTYPES:
        raise ConfigError(rule("rows.dtype", str(rows.dtype), "be float32, bfloat16 or float16", "cast x"))
    if given.block < 1 or capacity % given.block:
        raise ConfigError(
            rule("block", given.block, f"divide the capacity C={capacity}", "pass dispatch's block")
        )
    if given.group_sizes.dtype != jnp.int32 or given.row_weights.dtype != jnp.float32:
        raise ConfigError(
            f"group_sizes.dtype={given.group_sizes.dtype} and row_weights.dtype={given.row_weights.dtype} "
            "must be int32 and float32; pass what dispatch returned"
        )
    _check_weights(given, params, cfg)


def _check_weights(given: Rows, params: MoEParams, cfg: MoEConfig) -> None:
    (capacity, hidden), w1 = given.rows.shape, params.w1
    if w1 is None or w1.ndim != 3 or w1.shape[1] % 2 or w1.shape[2] != hidden:
        shape = None if w1 is None else w1.shape
        raise ConfigError(
            rule("w1.shape", shape, f"be [L, 2*I, H={hidden}], gate rows, then up rows", "transpose it")
        )
    num_local, inner = w1.shape[0], w1.shape[1] // 2
    if inner == 0 or cfg.intermediate_size % inner:
        raise ConfigError(
            rule(
                "w1.shape",
                w1.shape,
                f"have 2*I rows, I={cfg.intermediate_size} or a tensor-parallel part of it",
                "make weights and config agree",
            )
        )
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "group_sizes": (given.group_sizes, (num_local,)),
        "row_weights": (given.row_weights, (capacity,)),
        "w2": (params.w2, (num_local, hidden, inner)),
    }
    if params.w1_scale is not None and cfg.expert_quant is not None:
        shapes = schemes.scale_shapes(cfg.expert_quant, num_local, hidden, inner)
        wanted |= {"w1_scale": (params.w1_scale, shapes[0]), "w2_scale": (params.w2_scale, shapes[1])}
    if cfg.expert_bias:
        wanted |= {"b1": (params.b1, (num_local, 2 * inner)), "b2": (params.b2, (num_local, hidden))}
    for name, (value, shape) in wanted.items():
        got = None if value is None else tuple(value.shape)
        if got != shape:
            raise ConfigError(
                rule(
                    f"{name}.shape",
                    got,
                    f"be {shape} beside w1.shape={w1.shape}",
                    "make weights, config and rows agree",
                )
            )
    for name in ("b1", "b2"):
        if not cfg.expert_bias and getattr(params, name) is not None:
            raise ConfigError(
                rule(
                    name,
                    "an array",
                    "be None with expert_bias=False",
                    "set expert_bias=True or drop the bias",
                )
            )
    schemes.check_weights(params, cfg)
    floating = () if params.w1_scale is not None else ("w1", "w2")
    for name in (*floating, *(("b1", "b2") if cfg.expert_bias else ())):
        dtype = getattr(params, name).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ConfigError(rule(f"{name}.dtype", str(dtype), "be a float", "cast or dequantise it"))


def check_format(params: MoEParams, platform: str | None, format: str) -> None:
    """Raises ConfigError where float8 codes are not those that the platform's matrix units read."""
    if platform in (None, "cpu") or params.w1.dtype in (jnp.int8, schemes.FORMATS[format]):
        return
    raise ConfigError(
        rule(
            "params.w1.dtype",
            str(params.w1.dtype),
            f"be float8_{format} on this platform",
            "pass the weights through jm.prepare_params(params, cfg, mesh), which converts them",
        )
    )
