"""ExpertWeights, Stack and ExpertSpec: what an implementation of the experts gets beside the rows."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep import schemes
from jax_moriep.config import MoEConfig
from jax_moriep.runtime import compat

INPUT_WEIGHT_ROUTERS = ("llama4",)
"""Routers whose weights multiply the experts' inputs."""

_TF32 = (None, "default", "high", "bfloat16", "tensorfloat32", "TF32_TF32_F32")
"""Values of ``jax.default_matmul_precision`` with which JAX multiplies f32 in TF32 on NVIDIA's GPUs."""


SAVED_NAME = "moriep_experts"
"""What ``jax.checkpoint``'s policies know the experts' pre-activations by."""


class Rows(NamedTuple):
    """What experts run on, on one rank: ``plan.Dispatched`` without its plan."""

    rows: Any
    """[C, H]."""
    row_weights: Any
    """f32[C]."""
    group_sizes: Any
    """i32[L]."""
    block: int
    """Every expert's run starts at a multiple of it."""


class ExpertWeights(NamedTuple):
    """One rank's experts: floating weights, or codes and scales as ``MoEParams`` has them."""

    w1: Any
    """[L, 2*I, H], gate rows, then up rows."""
    w2: Any
    """[L, H, I]."""
    b1: Any = None
    """[L, 2*I] or None."""
    b2: Any = None
    """[L, H] or None; both biases or neither."""
    w1_scale: Any = None
    """f32 or None; both scales or neither."""
    w2_scale: Any = None
    """f32 or None."""
    first: Any = None
    """i32[] or None. Of a stack, in which the experts of all layers lie one behind the other: the first one
    of the layer that runs. The L above are then those of all layers."""

    @property
    def frozen(self) -> bool:
        """Whether the weights are codes, which have no gradient."""
        return self.w1_scale is not None

    def alone(self, num_experts: int) -> ExpertWeights:
        """The weights of one layer: as they are, or cut out of a stack, which is a copy of them."""
        if self.first is None:
            return self
        arrays = self._replace(first=None)
        return jax.tree.map(lambda w: lax.dynamic_slice_in_dim(w, self.first, num_experts), arrays)


class Stack(NamedTuple):
    """The experts of all layers, of which an implementation may read one layer's where they lie."""

    weights: ExpertWeights
    """As of one layer, with the layers before the experts: w1 [N, L, 2*I, H]."""
    layer: Any
    """i32[], at least 0 and below N."""

    def joined(self) -> ExpertWeights:
        """All layers' experts one behind the other, as ``ExpertWeights.first`` has them; moves no data."""
        num_experts = self.weights.w1.shape[1]
        joined = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), self.weights)
        return joined._replace(first=self.layer * num_experts)


Operands = tuple[jax.Array, jax.Array, jax.Array, ExpertWeights]
"""Rows, their weights, group sizes and experts, as ``blocked.expert_mlp`` takes them."""


def read_from(operands: Operands, stack: Stack | None) -> Operands:
    """The operands whose values are read: the experts of a stack, if there is one."""
    return operands if stack is None else (*operands[:3], stack.joined())


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
      scheme: how weights and rows are quantised, a name in ``config.SCHEMES``; None: not at all.
      format: the float8 of the platform, for rows and for master weights.
      precision: how f32 values are multiplied, a value of ``jax.default_matmul_precision``; None: as the
        platform does it.
    """

    activation: str
    activation_limit: float
    activation_alpha: float
    weight_input: bool
    block: int
    saved_rows: int | None = None
    scheme: str | None = None
    format: str = "e4m3fn"
    precision: str | None = None

    @classmethod
    def of(
        cls, cfg: MoEConfig, *, block: int, architecture: str, saved_rows: int | None = None
    ) -> ExpertSpec:
        """Of a layer on GPUs of an architecture ("gfx942", "sm_90"; "" for other devices).

        ``precision`` is what the caller's ``jax.default_matmul_precision`` is now.
        """
        return cls(
            activation=cfg.activation,
            activation_limit=cfg.activation_limit,
            activation_alpha=cfg.activation_alpha,
            weight_input=cfg.router in INPUT_WEIGHT_ROUTERS,
            block=block,
            saved_rows=saved_rows,
            scheme=cfg.expert_quant,
            format=schemes.format_name(architecture),
            precision=compat.matmul_precision(),
        )

    def mean_run(self, capacity: int, num_experts: int) -> float:
        """Rows of an expert, in the mean, where the routing is balanced.

        ``saved_rows`` is twice a balanced routing's rows and a block for each expert. Without it, all of the
        capacity is taken to be used.
        """
        if self.saved_rows is None:
            return max(0.0, capacity / num_experts - (self.block - 1))
        return max(0.0, self.saved_rows / num_experts - self.block) / 2

    @property
    def tf32(self) -> bool:
        """Whether NVIDIA's GPUs multiply f32 in TF32."""
        return self.precision in _TF32

    def multiplying(self) -> contextlib.AbstractContextManager[None]:
        """Where products that say no precision have this one.

        JAX traces a derivative rule when it differentiates, outside the ``jax.default_matmul_precision`` that
        the layer was called in.
        """
        return jax.default_matmul_precision(self.precision)

    def code_dtype(self, weights: ExpertWeights) -> jnp.dtype:
        """Of the codes of rows and weights: that of the weights, if they are codes."""
        assert self.scheme is not None
        if weights.frozen:
            return jnp.dtype(weights.w1.dtype)
        return schemes.code_dtype(self.scheme, schemes.FORMATS[self.format])

    def quantises_gradients(self, weights: ExpertWeights) -> bool:
        """Whether cotangents are quantised before they meet weights: those of fp8_block's master weights,
        whose blocks are the same when transposed."""
        return self.scheme == "fp8_block" and not weights.frozen


class TokenExperts(NamedTuple):
    """What a transport's own call runs experts with, on tokens where they have come.

    Besides weights and what names the kernel, the sizes of memory that the call needs for as long as it runs.
    """

    operands: tuple[Any, ...]
    """w1, w2 and their scales."""
    attributes: tuple[tuple[str, int | str], ...]
    code_rows: int
    """Rows that are quantised anew: N, or 0 where the wire brings what the kernel multiplies."""
    row_scales: int
    """f32s."""
    words: int
    """i32s."""


def dequantised(weights: ExpertWeights, scheme: str) -> tuple[jax.Array, jax.Array]:
    """w1 and w2 in f32 of experts that are codes."""
    w1 = schemes.dequantise_weights(weights.w1, weights.w1_scale, scheme, parts=2)
    return w1, schemes.dequantise_weights(weights.w2, weights.w2_scale, scheme, parts=1)
