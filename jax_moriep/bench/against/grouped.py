"""The experts' MLP by grouped products of others, on rows without padding: what each of them has to give.

Each has the weights in the layout that it takes without a copy, and sizes of its tiles that suit it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import on_device
from jax_moriep.bench.problem.shares import Compact, Data

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(rows, weights, group sizes) -> rows; it has a derivative."""


class Unavailable(Exception):
    """A baseline cannot run here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A baseline that can run.

    Attributes:
      run: by whether with gradients: does the work once; ``jax.block_until_ready`` waits for what it gives.
      results: of what ``run`` gave: the result and gradients in this package's layout.
      repeated: by whether with gradients and how many times: a call that does the work so often, to its end.
      settings: what was chosen for it.
    """

    run: Callable[[bool], Any]
    results: Callable[[Any], tuple[jax.Array, ...]]
    repeated: Callable[[bool, int], Callable[[], Any]]
    settings: dict[str, Any]


def mlp(product: Product) -> Callable[..., jax.Array]:
    """fn(rows, factors, sizes, w1, w2); what is between the products XLA fuses into one pass."""

    def forward(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any) -> jax.Array:
        gate, up = jnp.split(product(rows, w1, sizes).astype(jnp.float32), 2, axis=1)
        act = (jax.nn.silu(gate) * up * factors[:, None]).astype(rows.dtype)
        return product(act, w2, sizes)

    return forward


def with_gradients(forward: Callable[..., jax.Array], backward: bool) -> Callable[..., tuple[jax.Array, ...]]:
    """fn(d_out, rows, factors, sizes, *weights): what ``forward`` gives, with ``backward`` its gradients."""

    def both(d_out: Any, rows: Any, factors: Any, sizes: Any, *weights: Any) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda r, f, *ws: forward(r, f, sizes, *ws), rows, factors, *weights)
        return out, *pull(d_out)

    return both if backward else lambda d_out, *operands: (forward(*operands),)


def of_jax(
    key: Any,
    product: Product,
    operands: tuple[jax.Array, ...],
    pool: Pool,
    settings: dict[str, Any],
    *,
    alone: bool = False,
    swapped: bool = False,
) -> Ready:
    """Begins to compile the MLP of a product.

    Args:
      key: of the programs in the pool.
      product: of rows and weights.
      operands: as ``operands_of`` gives them.
      pool: that compiles.
      settings: what was chosen.
      alone: see ``Program``.
      swapped: the weights are [L, in, out].
    """
    fns = {backward: with_gradients(mlp(product), backward) for backward in (False, True)}

    def started(backward: bool, times: int = 1) -> Any:
        whole = (key, backward, times)
        pool.start(whole, on_device(fns[backward], operands, times, alone=alone))
        return whole

    def results(raw: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (*raw[:3], *(jnp.swapaxes(x, 1, 2) if swapped else x for x in raw[3:]))

    started(False)
    return Ready(
        lambda backward: pool.get(started(backward)).begin(*operands),
        results,
        # Once is what was compiled for the check.
        lambda backward, times: functools.partial(pool.get(started(backward, times)), *operands),
        settings,
    )


def operands_of(data: Data, compact: Compact) -> tuple[jax.Array, ...]:
    """(d_out, rows, factors, group sizes, w1, w2), the rows without padding."""
    return (compact.d_out, compact.rows, compact.factors, *data.operands[2:])
