"""One program that does its work many times, so that the host's part of a call is paid once for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_moriep.runtime import compat

_MOST_COPIED = 1 << 20
"""Bytes of an operand that may be copied in every run of a repeated program."""
_NEVER = -1.2345e37
"""No result is this number, but XLA cannot know."""


def repeated(fn: Callable[..., Any], times: int) -> Callable[..., jax.Array]:
    """fn(*operands) many times in one program, so that the host's part of a call is paid once for all.

    Each run takes its operands behind the one before, and a value of each of its results is read. An element
    of a small operand also takes its value from a choice that the run before decides, always the same way. So
    XLA can neither merge, move nor leave out a run. Choosing and reading are a few small kernels a run, and
    part of its time. XLA may copy the operand that is changed, so a large one is left as it is wherever a
    barrier alone is enough.

    Args:
      fn: of arrays, gives arrays; inside ``shard_map`` it sees one rank's.
      times: how often.

    Returns:
      run(*operands) -> f32[1], a number that means nothing.
    """

    def run(*operands: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(operands)
        axes = frozenset().union(*(compat.varying_axes(leaf) for leaf in leaves))
        place = _smallest(leaves, axes)

        def once(_: jax.Array, carry: tuple[jax.Array, jax.Array | None]) -> tuple[Any, Any]:
            seen, chosen = carry
            now = list(leaves)
            if chosen is not None and place is not None:
                now[place] = chosen = nudged(chosen, seen)
            held, before = lax.optimization_barrier((jax.tree.unflatten(tree, now), seen))
            results = jax.tree.leaves(lax.optimization_barrier(fn(*held)))
            read = [leaf.reshape(-1)[:1].astype(jnp.float32) for leaf in results if leaf.size]
            return behind(before, compat.pcast_varying(sum(read, jnp.zeros(1, jnp.float32)), axes)), chosen

        start = compat.pcast_varying(jnp.zeros(1, jnp.float32), axes)
        chosen = None if place is None else leaves[place]
        return lax.fori_loop(0, times, once, (start, chosen))[0]

    return run


def repeated_over(
    fn: Callable[..., Any], times: int, mesh: Mesh, axis: str, out_specs: Any
) -> Callable[..., jax.Array]:
    """``repeated`` for a function of whole arrays, one that opens a ``shard_map`` of its own.

    Args:
      fn: of arrays over the mesh, the first of which is split along ``axis``.
      times: how often.
      mesh: of one axis.
      axis: of the mesh.
      out_specs: of the results of ``fn``, as a prefix.

    Returns:
      run(*operands) -> f32[R], numbers without a meaning.
    """

    def peek(results: Any) -> jax.Array:
        # Each rank reads of its own part, so that the reading moves nothing between ranks.
        first = [leaf.reshape(-1)[:1].astype(jnp.float32) for leaf in jax.tree.leaves(results) if leaf.size]
        return compat.pcast_varying(sum(first, jnp.zeros(1, jnp.float32)), frozenset({axis}))

    split = PartitionSpec(axis)
    look = jax.shard_map(peek, mesh=mesh, in_specs=(out_specs,), out_specs=split)

    follow = jax.shard_map(nudged, mesh=mesh, in_specs=(split, split), out_specs=split)

    def run(*operands: Any) -> jax.Array:
        def once(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            seen, x = carry
            x = x if barriers_hold() else follow(x, seen)
            held, before = lax.optimization_barrier(((x, *operands[1:]), seen))
            return behind(before, look(lax.optimization_barrier(fn(*held)))), x

        start = jnp.zeros(mesh.size, jnp.float32)
        start = lax.with_sharding_constraint(start, NamedSharding(mesh, split))
        return lax.fori_loop(0, times, once, (start, operands[0]))[0]

    return run


def barriers_hold() -> bool:
    """Whether XLA keeps optimization barriers; on CPUs it drops them, and moves what does not change."""
    return jax.default_backend() != "cpu"


def nudged(x: jax.Array, seen: jax.Array) -> jax.Array:
    """x, but XLA must take it for another one whenever ``seen`` is."""
    first = (0,) * x.ndim
    return x.at[first].set(jnp.where(seen[0] == _NEVER, jnp.zeros_like(x[first]), x[first]))


def behind(before: jax.Array, read: jax.Array) -> jax.Array:
    """``read``; that it needs ``before`` as well keeps the barrier from which that comes."""
    return jnp.where(before == _NEVER, before, read)


def _smallest(leaves: Sequence[Any], axes: frozenset[str]) -> int | None:
    """The place of the smallest array of numbers that varies over all axes; None if none may change."""
    fit = [
        (leaf.size * leaf.dtype.itemsize, i)
        for i, leaf in enumerate(leaves)
        if leaf.size and compat.varying_axes(leaf) == axes and jnp.issubdtype(leaf.dtype, jnp.number)
    ]
    if not fit:
        return None
    num_bytes, place = min(fit)
    return None if barriers_hold() and num_bytes > _MOST_COPIED else place
