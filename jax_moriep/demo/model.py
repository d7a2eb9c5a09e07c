"""The demo's model: a small decoder-only language model, each of its MLPs a mixture of experts.

Norms have no weights and there are no biases, so outside the experts a layer has two weights. They may have
one leading dimension more, a copy per rank (see train.py): every product is ``x @ w`` with x [R, ...].
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jax_moriep as jm
from jax_moriep.flax import EpMoE

_DTYPES = {"f32": jnp.dtype(jnp.float32), "bf16": jnp.dtype(jnp.bfloat16), "f16": jnp.dtype(jnp.float16)}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model."""

    num_experts: int = 8
    transport: str = "auto"
    quant: str | None = None
    dtype: str = "f32"
    vocabulary: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    top_k: int = 2
    expert_width: int = 128

    def moe(self) -> jm.MoEConfig:
        """Sigmoid scores with a selection bias: balanced without a loss of its own (DeepSeek-V3)."""
        return jm.MoEConfig(
            num_experts=self.num_experts,
            top_k=min(self.top_k, self.num_experts),
            hidden_size=self.width,
            intermediate_size=self.expert_width,
            router="sigmoid_topk",
            score_bias=True,
            transport=self.transport,
            expert_quant=self.quant,
        )

    @property
    def compute_dtype(self) -> Any:
        """Of x between the layers and of the products; routing and norms compute in float32."""
        return _DTYPES[self.dtype]


class Block(nnx.Module):
    """Attention, then experts, each on the normalised sum of all before it."""

    def __init__(self, cfg: ModelConfig, mesh: jax.sharding.Mesh, rngs: nnx.Rngs) -> None:
        self.heads = cfg.heads
        self.qkv = _weight(rngs, cfg.width, 3 * cfg.width)
        self.out = _zeros(cfg.width, cfg.width)
        self.moe = EpMoE(cfg.moe(), mesh=mesh, dtype=cfg.compute_dtype, rngs=rngs)

    def __call__(self, x: jax.Array, length: int) -> tuple[jax.Array, jm.MoEStats]:
        """x [R, T, width] of windows of ``length`` tokens -> x, and the statistics of the experts."""
        x = x + self.attention(_norm(x), length)
        y, stats = self.moe(_norm(x))
        return x + y, stats

    def attention(self, x: jax.Array, length: int) -> jax.Array:
        """Causal attention within each window."""
        x = _half_from_previous(x, length)
        heads = _product(x, self.qkv).reshape(-1, length, 3, self.heads, x.shape[-1] // self.heads)
        q, k, v = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        mixed = jax.nn.dot_product_attention(_rotate(_norm(q)), _rotate(_norm(k)), v, is_causal=True)
        return _product(mixed.reshape(x.shape), self.out)


class LanguageModel(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, cfg: ModelConfig, mesh: jax.sharding.Mesh, rngs: nnx.Rngs) -> None:
        self.vocabulary, self.dtype = cfg.vocabulary, cfg.compute_dtype
        self.embedding = _weight(rngs, cfg.vocabulary, cfg.width)
        self.blocks = nnx.List([Block(cfg, mesh, rngs) for _ in range(cfg.layers)])
        self.head = _zeros(cfg.width, cfg.vocabulary)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, list[jm.MoEStats]]:
        """Applies the model.

        Args:
          tokens: i32[R, B, S], B windows of S bytes for each rank.

        Returns:
          Logits [R, B, S, vocabulary], and the statistics of each layer.
        """
        ranks, _, length = tokens.shape
        # As a product, the lookup's gradient too stays on the rank that has the tokens.
        x = jax.nn.one_hot(tokens.reshape(ranks, -1), self.vocabulary, dtype=self.dtype)
        x = _norm(_product(x, self.embedding))
        stats = []
        for block in self.blocks:
            x, measured = block(x, length)
            stats.append(measured)
        logits = _product(_norm(x), self.head).astype(jnp.float32)
        return logits.reshape(*tokens.shape, self.vocabulary), stats


def _weight(rngs: nnx.Rngs, rows: int, columns: int) -> nnx.Param:
    return nnx.Param(jax.random.normal(rngs.params(), (rows, columns)) * rows**-0.5)


def _zeros(rows: int, columns: int) -> nnx.Param:
    """For the last product of a branch: the branch starts by adding nothing."""
    return nnx.Param(jnp.zeros((rows, columns)))


def _product(x: jax.Array, weight: nnx.Param) -> jax.Array:
    return x @ weight[...].astype(x.dtype)


def _norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _half_from_previous(x: jax.Array, length: int) -> jax.Array:
    """Half of the channels of x [R, T, width] come from the token before, as in RWKV's token shift.

    A byte says little alone; so attention matches pairs of bytes from its first layer on.
    """
    windows = x.reshape(*x.shape[:-2], -1, length, x.shape[-1])
    own, others = jnp.split(windows, 2, axis=-1)
    previous = jnp.pad(others, [(0, 0)] * (windows.ndim - 2) + [(1, 0), (0, 0)])[..., :-1, :]
    return jnp.concatenate([own, previous], axis=-1).reshape(x.shape)


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) for x [B, S, heads, D]."""
    cos, sin = (table.astype(x.dtype) for table in _angles(x.shape[1], x.shape[3] // 2))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _angles(length: int, size: int) -> tuple[jax.Array, jax.Array]:
    angle = jnp.arange(length)[:, None] * 1000.0 ** (-jnp.arange(size) / size)
    return jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
