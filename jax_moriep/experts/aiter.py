"""experts="aiter": AITER's fused fp8 and int8 kernels on the MI300 series, from the installed amd-aiter.

One custom call makes codes of the rows, the lists of (row, expert) that the kernels work along, and launches
a kernel that computes both products, the activation between them and the row weights, and adds bfloat16 to
zeros. It quantises activated rows by itself: one scale for each row and each of the kernel's tiles, in which
the largest becomes the format's largest, while the other implementations have one for 128 columns. Parts of
a row are added by atomics, in any order, so that results repeat up to the rounding of bfloat16 only.

Weights are codes in AITER's layout (``jm.prepare_params``). The backward pass is that of the Triton kernels,
with dequantised weights and rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.aiter import kernels, wheel
from jax_moriep.aiter.layout import shuffled, unshuffled
from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, MoriepError, rule
from jax_moriep.experts import pallas
from jax_moriep.experts.spec import (
    INPUT_WEIGHT_ROUTERS,
    ExpertSpec,
    ExpertWeights,
    Stack,
    TokenExperts,
    dequantised,
)
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime import compat, targets
from jax_moriep.runtime.place import Place
from jax_moriep.transports import arrivals

ARCHITECTURE = "gfx942"
_CURE = "use experts='triton' or 'blocked'"
_BLOCK_ROWS = 32
"""Pairs of a row and an expert that a work-group of AITER's kernels takes; csrc/aiter has it too."""


def unavailable_reason(place: Place, cfg: MoEConfig | None) -> str | None:
    """Why it cannot run a layer at a place, with the cure; None if it can. cfg None asks about the place."""
    if place.backend != "rocm":
        return f"it needs AMD's GPUs; {_CURE}"
    if not place.architecture.startswith(ARCHITECTURE):
        return f"its kernels are for the MI300 series (gfx942), and this is {place.architecture}; {_CURE}"
    why = None if cfg is None else _unsuited(cfg)
    if why is not None:
        return f"{why}; {_CURE}"
    try:
        targets.register_aiter("rocm")
        wheel.find()
        if cfg is not None:
            kernels.read(_kernel_of(cfg))
    except MoriepError as e:
        return str(e)
    return None


def open(cfg: MoEConfig, backend: str | None) -> None:  # noqa: A001 - the contract's name
    """See ``experts.Opens.open``.

    Raises:
      LibraryError: a library or a kernel is missing.
    """
    kernel = _kernel_of(cfg)
    _load(kernel)
    if backend is not None:
        kernels.load(backend, kernel)


def describe(place: Place, cfg: MoEConfig | None, shape: ExchangeShape | None, dtype: str) -> str | None:
    """See ``experts.Describes.describe``: the kernel, and what is known to be wrong with it."""
    del shape, dtype
    if cfg is None or unavailable_reason(place, cfg) is not None:
        return None
    kernel = _kernel_of(cfg)
    lines = [f"{kernel.name}, {kernel.tile} columns of the intermediate size at once"]
    if kernel.races:
        lines.append(
            "a barrier is missing in this kernel: results are right as long as a work-group's waves keep in "
            "step, which hardware makes likely and nothing guarantees"
        )
    return "\n".join(lines)


def lay_out(params: MoEParams, cfg: MoEConfig) -> MoEParams:
    """See ``experts.LaysOut.lay_out``.

    Raises:
      ConfigError: there is no kernel for the weights' sizes.
    """
    if (why := _unsuited(cfg)) is not None:
        raise ConfigError(f"experts='aiter' cannot run this layer: {why}; {_CURE}")
    scale = params.w2_scale
    if cfg.expert_quant == "int8_token" and params.w1_scale is not None and scale is not None:
        # These kernels would make zeros of activations that are NaN for a scale of w1 that is.
        scale = jnp.where(jnp.isnan(params.w1_scale).any(-1, keepdims=True), jnp.nan, scale)
    codes = {"w1": shuffled(params.w1), "w2": shuffled(params.w2)}
    return dataclasses.replace(params, **codes, w2_scale=scale, layout="aiter")


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    spec: ExpertSpec,
    stack: Stack | None = None,
) -> jax.Array:
    """See ``blocked.expert_mlp``; rows and results are bfloat16 to the kernels, and the sums' parts too."""
    del stack  # It lies in the plain layout, which AITER's kernels do not read.
    if not weights.frozen:
        raise ConfigError(
            "experts='aiter' must have quantised w1 and w2, and these are floating; pass the weights through "
            "jm.prepare_params(params, cfg, mesh)"
        )
    call = _Call.of(rows.shape, weights, spec)
    if compat.gpu_backend() == "rocm":
        # Elsewhere the program is only lowered.
        _load(call.kernel)
    operands = compat.union_varying(rows.astype(jnp.bfloat16), row_weights, group_sizes, *_coded(weights))
    out: jax.Array = _expert_mlp(call, *operands)
    return out.astype(rows.dtype)


def expert_tokens(
    weights: ExpertWeights, spec: ExpertSpec, shape: ExchangeShape, *, backend: str, fp8_wire: bool
) -> TokenExperts:
    """See ``experts.RunsOnTokens.expert_tokens``."""
    assert spec.scheme is not None
    num_rows, hidden = shape.num_ranks * shape.num_tokens, shape.hidden_size
    kernel = _Call.of((num_rows, hidden), weights, spec).kernel
    if compat.gpu_backend() == "rocm":
        kernels.load(backend, kernel)
    as_they_come = fp8_wire and spec.scheme == "fp8_block"
    return TokenExperts(
        _coded(weights),
        _attributes(spec.scheme, kernel),
        code_rows=0 if as_they_come else num_rows,
        row_scales=_row_scales(spec.scheme, num_rows, hidden),
        words=_arrival_words(shape),
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static side of a custom call."""

    kernel: kernels.Kernel
    spec: ExpertSpec

    @classmethod
    def of(cls, rows: tuple[int, ...], weights: ExpertWeights, spec: ExpertSpec) -> _Call:
        """Chooses the kernel; refuses sizes that kernels count wrong."""
        assert spec.scheme is not None
        num_experts, hidden, inner = weights.w2.shape
        kernel = kernels.choose(spec.scheme, hidden, inner)
        if isinstance(kernel, str):
            raise ConfigError(f"experts='aiter' cannot run this layer: {kernel}; {_CURE}")
        if num_experts * 2 * inner * hidden >= kernels.MAX_BYTES:
            must = "be smaller than 4 GiB on a rank, whose bytes AITER's kernels count in 32 bits"
            raise ConfigError(
                rule("w1.shape", weights.w1.shape, must, f"spread experts over ranks, or {_CURE}")
            )
        if rows[0] >= kernels.MAX_ROWS or 2 * math.prod(rows) >= kernels.MAX_BYTES:
            must = "be fewer than 2**24 rows and 4 GiB, which AITER's kernels count in 24 and 32 bits"
            raise ConfigError(rule("rows.shape", rows, must, "lower capacity_factor or T"))
        return cls(kernel, spec)


def _load(kernel: kernels.Kernel) -> None:
    targets.register_aiter("rocm")
    kernels.load("rocm", kernel)


def _coded(weights: ExpertWeights) -> tuple[jax.Array, ...]:
    return weights.w1, weights.w2, weights.w1_scale, weights.w2_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(
    call: _Call, rows: jax.Array, row_weights: jax.Array, group_sizes: jax.Array, *coded: jax.Array
) -> jax.Array:
    (capacity, hidden), num_experts = rows.shape, group_sizes.shape[0]
    scheme, kernel = call.spec.scheme, call.kernel
    assert scheme is not None
    results = (
        compat.result_type(rows, (capacity, hidden), jnp.bfloat16),
        # Memory for as long as the call runs; nobody asks for it.
        compat.result_type(rows, (capacity, hidden), jnp.uint8),
        compat.result_type(rows, (_row_scales(scheme, capacity, hidden),), jnp.float32),
        compat.result_type(rows, (_list_words(capacity, num_experts),), jnp.int32),
    )
    out, *_ = targets.call(
        targets.AITER_EXPERTS,
        results,
        *(rows, row_weights, group_sizes, *coded),
        attributes=(*_attributes(scheme, kernel), ("block", call.spec.block)),
    )
    return out


def _expert_mlp_fwd(call: _Call, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _expert_mlp(call, *operands), operands


def _expert_mlp_bwd(call: _Call, operands: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[Any, ...]:
    rows, row_weights, group_sizes, w1, w2, w1_scale, w2_scale = operands
    spec = dataclasses.replace(call.spec, scheme=None)
    assert call.spec.scheme is not None
    coded = ExpertWeights(unshuffled(w1), unshuffled(w2), w1_scale=w1_scale, w2_scale=w2_scale)
    plain = ExpertWeights(*(w.astype(rows.dtype) for w in dequantised(coded, call.spec.scheme)))
    # The gradient is taken where the forward pass was, and passes the rows' quantisation straight through.
    seen = schemes.dequantise_rows(schemes.quantise_rows(rows, call.spec.scheme, w1.dtype))

    def run(rows: jax.Array, row_weights: jax.Array) -> jax.Array:
        return pallas.expert_mlp(rows, row_weights, group_sizes, plain, spec)

    _, pull = jax.vjp(run, seen.astype(rows.dtype), row_weights)
    return *pull(d_out), None, None, None, None, None


_expert_mlp.defvjp(_expert_mlp_fwd, _expert_mlp_bwd)


def _attributes(scheme: str, kernel: kernels.Kernel) -> tuple[tuple[str, int | str], ...]:
    return (("scheme", scheme), ("kernel", kernel.name), ("tile", kernel.tile))


def _row_scales(scheme: str, num_rows: int, hidden: int) -> int:
    """f32s of the scales of rows; this and the following are also in csrc/aiter/experts.cc."""
    return num_rows * (hidden // schemes.BLOCK) if scheme == "fp8_block" else num_rows


def _list_words(num_pairs: int, num_experts: int) -> int:
    """i32s of the lists: two for a pair, one for a block, and two."""
    return _list_blocks(num_pairs, num_experts) * (2 * _BLOCK_ROWS + 1) + 2


def _list_blocks(num_pairs: int, num_experts: int) -> int:
    return (num_pairs + (_BLOCK_ROWS - 1) * num_experts) // _BLOCK_ROWS


def _arrival_words(shape: ExchangeShape) -> int:
    """i32s for arrivals: lists, routes, group sizes, and those of the sort, whose rows are pairs."""
    num_rows, local = shape.num_ranks * shape.num_tokens, shape.num_local_experts
    blocks = max(_list_blocks(num_rows * min(shape.top_k, local), local), 1)
    listed = dataclasses.replace(shape, block=_BLOCK_ROWS, capacity=blocks * _BLOCK_ROWS)
    lists = blocks * (2 * _BLOCK_ROWS + 1) + 2
    return lists + num_rows * shape.top_k + local + arrivals.expand_words(listed)


def _unsuited(cfg: MoEConfig) -> str | None:
    """What of a layer the kernels do not do."""
    if cfg.expert_quant is None:
        return "its kernels have quantised weights, and expert_quant is None"
    if cfg.activation != "silu":
        return f"its kernels have activation='silu' only, not {cfg.activation!r}"
    if cfg.expert_bias:
        return "its kernels have no biases, and expert_bias is True"
    if cfg.router in INPUT_WEIGHT_ROUTERS:
        return f"its kernels weight the experts' outputs, and router={cfg.router!r} weights their inputs"
    kernel = kernels.choose(cfg.expert_quant, cfg.hidden_size, cfg.intermediate_size)
    return kernel if isinstance(kernel, str) else None


def _kernel_of(cfg: MoEConfig) -> kernels.Kernel:
    """The kernel of a layer that ``_unsuited`` has nothing against."""
    assert cfg.expert_quant is not None
    kernel = kernels.choose(cfg.expert_quant, cfg.hidden_size, cfg.intermediate_size)
    assert isinstance(kernel, kernels.Kernel)
    return kernel
