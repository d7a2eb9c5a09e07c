"""experts="blocked": pure JAX, a loop over the used rows only, with its own backward pass.

Every expert's run of rows is cut into tiles, from large to small, and the loops' trip counts come from
``group_sizes``. So time follows the real rows, whatever the capacity is; only the zeros of the results
are as long as the capacity.

What the form of the loops answers to, all measured on XLA:CPU:
- A loop updates its carry in place, while ``lax.cond`` or ``lax.switch`` copies what a branch changes. So the
  smaller tiles at the end of a run are loops of few trips, not branches.
- One expert's weights are sliced, hence copied, once per expert and not once per block, and an update of
  dw1 and dw2 costs a pass over them. So tiles are as large as a run allows, up to ``_MAX_TILE`` rows.
- Fresh memory costs more than arithmetic on it: XLA zero-fills a loop's results, and each page of them
  faults. So pre-activations are kept for ``spec.saved_rows`` rows, not for the whole capacity.
- Operands enter a dot in the rows' dtype and sums leave it in f32, which is the fastest form for every dtype.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_moriep.config import MoEConfig
from jax_moriep.experts import rounding
from jax_moriep.experts.activation import gated
from jax_moriep.experts.spec import SAVED_NAME, ExpertSpec, ExpertWeights, Operands, Stack, read_from
from jax_moriep.plan import run_starts
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place

# Measured on one CPU, as what is said above; there is no record of the sizes that were tried.
_MAX_TILE = 512
# A smaller tile does not keep a core's matrix loop busy, so a run's last tile is rounded up to this.
_MIN_TILE = 64


def unavailable_reason(place: Place, cfg: MoEConfig | None) -> str | None:
    """None: it runs every layer on every platform."""
    del place, cfg
    return None


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    spec: ExpertSpec,
    stack: Stack | None = None,
) -> jax.Array:
    """Row r of expert e gives ``row_weights[r] * (act(rows[r] @ w1[e].T + b1[e]) @ w2[e].T + b2[e])``.

    With ``spec.weight_input`` the weight multiplies ``rows[r]`` instead. Operands may vary over different
    mesh axes; the result varies over all of them. Differentiable in all operands but ``group_sizes`` and
    quantised weights, in reverse mode, once.

    With ``spec.scheme`` the products read quantised values, as ``schemes`` has it. The derivative of rounding
    is that of the identity: the way back reads the same weights, and where ``spec.quantises_gradients``
    quantised cotangents as well, while the gradients of master weights are sums over the rows as they came.

    Args:
      rows: [C, H], f32, bf16 or f16, sorted by expert; runs start at multiples of ``spec.block``. Rows
        that are not in a run are never used, whatever they hold.
      row_weights: f32[C].
      group_sizes: i32[L], real rows of each expert; the aligned runs must fit into C.
      weights: the experts. Floating weights of another dtype than the rows' are cast.
      spec: the static side.
      stack: where the values of ``weights`` are read instead; gradients are those of ``weights`` still.

    Returns:
      [C, H] in the rows' dtype, zero in the rows that are in no run. Sums run in f32.
    """
    leaves, tree = jax.tree.flatten((rows, row_weights, group_sizes, weights))
    # Outside the custom VJP, so that JAX's transpose of the cast adds the psum that a shared operand needs.
    return _expert_mlp(spec, jax.tree.unflatten(tree, compat.union_varying(*leaves)), stack)


# A stack stays typed as it came: retyped, a scan would keep a copy of it for every layer's backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(spec: ExpertSpec, operands: Operands, stack: Stack | None) -> jax.Array:
    with spec.multiplying():
        return _forward(spec, read_from(operands, stack), saved_rows=None)[0]


def _expert_mlp_fwd(spec: ExpertSpec, operands: Operands, stack: Stack | None) -> tuple[jax.Array, Any]:
    read = read_from(operands, stack)
    with spec.multiplying():
        out, saved = _forward(spec, read, _saved_rows(spec, operands[0].shape[0]))
    own = operands[3] if stack is None else None
    return out, (operands[:3], own, stack, checkpoint_name(saved, SAVED_NAME))


def _expert_mlp_bwd(spec: ExpertSpec, residuals: Any, d_out: jax.Array) -> tuple[Any, None]:
    given, own, stack, saved = residuals
    with spec.multiplying():
        return _backward(spec, read_from((*given, own), stack), saved, d_out), None


_expert_mlp.defvjp(_expert_mlp_fwd, _expert_mlp_bwd)


def _forward(
    spec: ExpertSpec, operands: Operands, saved_rows: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """The result, and pre-activations: of all C rows, or [saved_rows + the largest tile, 2*I], or None."""
    rows, row_weights, group_sizes, weights = operands
    capacity = rows.shape[0]
    sizes = tile_sizes(spec.block, capacity)

    def run(carry: Any, xs: Any) -> tuple[Any, None]:
        start, size, index = xs
        expert = _Expert.of(spec, rows.dtype, _weights_of(index, weights), size)

        def tile(at: _Tile, carry: Any) -> Any:
            out, saved = carry
            x, weight = at.read(rows), at.read(row_weights)[:, None]
            pre = expert.pre(_scaled(x, weight) if spec.weight_input else x)
            y = expert.down(expert.activate(pre))
            if not spec.weight_input:
                y = y * weight
            if saved_rows is not None:
                # Tiles that are not kept are written to the spare rows at the end, one over the other.
                saved = _write(saved, pre, jnp.where(at.end <= saved_rows, at.first, saved_rows))
            return _write(out, at.mask(y), at.first), saved

        return _for_tiles(sizes, start, size, tile, carry), None

    out = compat.zeros_like_varying(rows.shape, rows.dtype, rows)
    saved = None
    if saved_rows is not None:
        kept = capacity if saved_rows == capacity else saved_rows + sizes[0]
        saved = compat.zeros_like_varying((kept, weights.w1.shape[1]), rows.dtype, rows)
    return lax.scan(run, (out, saved), _runs(spec, group_sizes, weights))[0]


def _runs(spec: ExpertSpec, group_sizes: jax.Array, weights: ExpertWeights) -> tuple[jax.Array, ...]:
    """First row, rows, and place among the weights, of every expert."""
    index = jnp.arange(group_sizes.size, dtype=jnp.int32)
    return (
        run_starts(group_sizes, spec.block),
        group_sizes,
        index if weights.first is None else index + weights.first,
    )


def _weights_of(index: jax.Array, weights: ExpertWeights) -> ExpertWeights:
    """Those of one expert."""
    arrays = weights._replace(first=None)
    return jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), arrays)


def _backward(spec: ExpertSpec, operands: Operands, saved: jax.Array, d_out: jax.Array) -> Any:
    """The cotangents of the operands, None for ``group_sizes``."""
    rows, row_weights, group_sizes, weights = operands
    capacity = rows.shape[0]
    sizes = tile_sizes(spec.block, capacity)
    saved_rows = _saved_rows(spec, capacity)
    # Of codes and their scales there are no gradients.
    trained = ExpertWeights(None, None, weights.b1, weights.b2) if weights.frozen else weights
    trained = trained._replace(first=None)

    def run(carry: Any, xs: Any) -> tuple[Any, Any]:
        start, size, index = xs
        expert = _Expert.of(spec, rows.dtype, _weights_of(index, weights), size)

        def tile(at: _Tile, carry: Any) -> Any:
            (d_rows, d_row_weights), d_weights = carry
            row, weight = at.read(rows), at.read(row_weights)[:, None]
            x = _scaled(row, weight) if spec.weight_input else row
            if saved_rows == capacity:
                pre = at.read(saved)
            else:
                recompute = functools.partial(lambda x: expert.pre(x).astype(x.dtype), x)
                pre = lax.cond(at.end <= saved_rows, functools.partial(at.read, saved), recompute)
            d_row, d_weight, added = _tile_backward(expert, x, row, weight, pre, at.read(d_out))
            d_weights = jax.tree.map(jnp.add, d_weights, added)
            written = _write(d_rows, d_row, at.first), _write(d_row_weights, d_weight, at.first)
            return written, d_weights

        zeros = jax.tree.map(lambda w: compat.zeros_like_varying(w.shape[1:], jnp.float32, rows), trained)
        carry, d_weights = _for_tiles(sizes, start, size, tile, (carry, zeros))
        return carry, jax.tree.map(lambda d, w: d.astype(w.dtype), d_weights, trained)

    d_rows = compat.zeros_like_varying(rows.shape, rows.dtype, rows)
    d_row_weights = compat.zeros_like_varying(row_weights.shape, row_weights.dtype, rows)
    (d_rows, d_row_weights), d_weights = lax.scan(
        run, (d_rows, d_row_weights), _runs(spec, group_sizes, weights)
    )
    return d_rows, d_row_weights, None, d_weights


def _tile_backward(
    expert: _Expert, x: jax.Array, row: jax.Array, weight: jax.Array, pre: jax.Array, d_y: jax.Array
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """Cotangents of one tile's rows and row weights, and what it adds to those of the weights, in f32.

    The gradient of an output weight needs no second product of the forward pass:
    ``<d_y, w2 h + b2> = <w2.T d_y, h> + <d_y, b2>``.
    """
    h, activate_vjp = jax.vjp(expert.activate, pre.astype(jnp.float32))
    d_h = expert.down_transposed(d_y)
    d_y = d_y.astype(jnp.float32)
    d_weight = None
    if not expert.spec.weight_input:
        d_weight = jnp.sum(d_h * expert.read_activated(h), 1)
        if expert.b2 is not None:
            d_weight += jnp.sum(d_y * expert.b2, 1)
        d_h, d_y = d_h * weight, d_y * weight
    (d_pre,) = activate_vjp(d_h)
    d_pre_low = d_pre.astype(x.dtype)
    d_row = expert.pre_transposed(d_pre)
    if d_weight is None:
        d_weight = jnp.sum(d_row * row, 1)
        d_row = d_row * weight
    dw1, dw2 = None, None
    if not expert.frozen:
        dw1 = _dot(d_pre_low, x, 0, 0)
        dw2 = _dot(d_y.astype(x.dtype), h.astype(x.dtype), 0, 0)
    db1, db2 = (None, None) if expert.b2 is None else (jnp.sum(d_pre, 0), jnp.sum(d_y, 0))
    return d_row, d_weight, ExpertWeights(dw1, dw2, db1, db2)


@dataclasses.dataclass(frozen=True)
class _Expert:
    """One expert: its weights [2*I, H], [H, I] in the dtype of the products, which is the rows' or with a
    scheme f32, its biases [2*I], [H] in f32 or None, and with a scheme the dtype of codes."""

    spec: ExpertSpec
    w1: jax.Array
    w2: jax.Array
    b1: jax.Array | None
    b2: jax.Array | None
    frozen: bool
    codes: jnp.dtype | None
    quantises_gradients: bool

    @classmethod
    def of(cls, spec: ExpertSpec, dtype: Any, weights: ExpertWeights, size: jax.Array) -> _Expert:
        b1, b2 = (None if b is None else b.astype(jnp.float32) for b in (weights.b1, weights.b2))
        codes = None
        if spec.scheme is None:
            w1, w2 = weights.w1.astype(dtype), weights.w2.astype(dtype)
        else:
            # Dequantising costs more than a product of few rows, so not for experts that have none.
            w1, w2 = lax.cond(
                size > 0,
                lambda weights: rounding.weights(weights, spec),
                lambda weights: tuple(
                    compat.zeros_like_varying(w.shape, jnp.float32, w) for w in (weights.w1, weights.w2)
                ),
                weights,
            )
            codes = spec.code_dtype(weights)
        return cls(spec, w1, w2, b1, b2, weights.frozen, codes, spec.quantises_gradients(weights))

    def pre(self, x: jax.Array) -> jax.Array:
        """Pre-activations f32[t, 2*I] of rows [t, H]."""
        if self.codes is not None:
            x = rounding.rows(x, self.spec, self.codes)
        pre = _dot(x, self.w1, 1, 1)
        return pre if self.b1 is None else pre + self.b1

    def pre_transposed(self, d_pre: jax.Array) -> jax.Array:
        """Cotangents f32[t, H] of rows, of those of pre-activations f32[t, 2*I]."""
        if self.codes is not None and self.quantises_gradients:
            d_pre = rounding.halves(d_pre, self.codes)
        return _dot(d_pre.astype(self.w1.dtype), self.w1, 1, 0)

    def activate(self, pre: jax.Array) -> jax.Array:
        return gated(pre, self.spec.activation, self.spec.activation_limit, self.spec.activation_alpha)

    def read_activated(self, h: jax.Array) -> jax.Array:
        """Activations f32[t, I] as the second product reads them."""
        return h if self.codes is None else rounding.activated(h, self.codes)

    def down(self, h: jax.Array) -> jax.Array:
        """Results f32[t, H] of activations f32[t, I]."""
        y = _dot(self.read_activated(h).astype(self.w2.dtype), self.w2, 1, 1)
        return y if self.b2 is None else y + self.b2

    def down_transposed(self, d_y: jax.Array) -> jax.Array:
        """Cotangents f32[t, I] of activations, of those of results [t, H]."""
        if self.codes is not None and self.quantises_gradients:
            d_y = rounding.activated(d_y, self.codes)
        return _dot(d_y.astype(self.w2.dtype), self.w2, 1, 0)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """``size`` rows from row ``first`` on; those from row ``stop`` on are padding."""

    first: jax.Array
    size: int
    stop: jax.Array

    @property
    def end(self) -> jax.Array:
        return self.first + self.size

    def mask(self, values: jax.Array) -> jax.Array:
        """``values`` [size, ...] with zeros in the padding; a select, so that a NaN there is gone."""
        real = self.first + jnp.arange(self.size) < self.stop
        return jnp.where(real.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    def read(self, array: jax.Array) -> jax.Array:
        return self.mask(lax.dynamic_slice_in_dim(array, self.first, self.size))


def tile_sizes(block: int, capacity: int) -> tuple[int, ...]:
    """Rows per tile, from large to small, each a multiple of the next.

    The smallest divides ``block``, so that a run rounded up to it stays inside the run's own blocks, and the
    sizes are few, because every size is one more copy of the loop's body to compile.

    Args:
      block: rows per block.
      capacity: C; no tile is larger.

    Returns:
      The sizes.
    """
    size = block
    while size % 2 == 0 and size > _MIN_TILE:
        size //= 2
    factor = 2 if size >= _MIN_TILE else 4
    sizes = [size]
    while sizes[-1] * factor <= min(_MAX_TILE, capacity):
        sizes.append(sizes[-1] * factor)
    return tuple(reversed(sizes))


def _for_tiles(
    sizes: tuple[int, ...],
    start: jax.Array,
    count: jax.Array,
    body: Callable[[_Tile, Any], Any],
    carry: Any,
) -> Any:
    """Folds ``body`` over the tiles that cover the ``count`` rows from ``start`` on, large tiles first."""
    stop = start + count
    left = -(-count // sizes[-1]) * sizes[-1]
    for size in sizes:
        trips = left // size

        def step(i: jax.Array, carry: Any, start: jax.Array = start, size: int = size) -> Any:
            return body(_Tile(start + i * size, size, stop), carry)

        carry = lax.fori_loop(0, trips, step, carry)
        start, left = start + trips * size, left - trips * size
    return carry


def _saved_rows(spec: ExpertSpec, capacity: int) -> int:
    """How many rows' pre-activations are kept; all, if the spare rows would be as long as the rest."""
    if spec.saved_rows is None or spec.saved_rows + tile_sizes(spec.block, capacity)[0] >= capacity:
        return capacity
    return spec.saved_rows


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Contracts one dimension of each, sums in f32."""
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _scaled(x: jax.Array, weight: jax.Array) -> jax.Array:
    return (x * weight).astype(x.dtype)


def _write(array: jax.Array, values: jax.Array, first: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(array, values.astype(array.dtype), first, 0)
