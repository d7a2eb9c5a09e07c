"""One leaf of a tree with another length along an axis, where it lies: on the host, on devices, or traced."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jax_moriep.layout import axes_of
from jax_moriep.runtime import compat


def sharding_of(leaf: Any) -> Any:
    """Of an array or a ShapeDtypeStruct; under jit, what its type says of it; None if nothing.

    An array that is not committed lies where jax put it, and jax moves it to whatever it is used with.
    """
    if not compat.is_tracer(leaf):
        return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None
    found = jax.typeof(leaf).sharding
    return None if found.mesh.empty or all(part is None for part in found.spec) else found


def even(sharding: Any, shape: Sequence[int], axis: int, size: int) -> Any:
    """The sharding of a leaf whose experts become ``size``, which their mesh axes may not divide."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    split = [axes_of(PartitionSpec(part)) for part in sharding.spec]
    split += [()] * (len(shape) - len(split))

    def divides(names: tuple[str, ...], length: int) -> bool:
        return length % math.prod(sharding.mesh.shape[name] for name in names) == 0

    if divides(split[axis], size):
        return sharding
    moved, split[axis] = split[axis], ()
    other = next((i for i in range(axis + 1, len(shape)) if divides(split[i] + moved, shape[i])), None)
    if other is not None:
        split[other] += moved
    spec = PartitionSpec(*[names if len(names) > 1 else next(iter(names), None) for names in split])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def resized(leaf: Any, axis: int, size: int, kept: int, sharding: Any) -> Any:
    """A leaf with ``size`` along an axis, of which the first ``kept`` are its own and the rest zeros."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(*leaf.shape[:axis], size, *leaf.shape[axis + 1 :]), sharding=sharding)
    if not isinstance(leaf, jax.Array):
        host = np.asarray(leaf)
        cut = host[(slice(None),) * axis + (slice(kept),)]
        host = np.pad(cut, [(0, size - kept if i == axis else 0) for i in range(host.ndim)])
        return host if sharding is None else jax.device_put(host, sharding)
    if compat.is_tracer(leaf):
        return _resized_in_jit(leaf, axis, size, kept, sharding)
    if leaf.shape[axis] == size == kept:
        return leaf if sharding is None else jax.device_put(leaf, sharding)
    if not isinstance(sharding, NamedSharding) or leaf.sharding.device_set != sharding.device_set:
        done = _compiled(axis, size, kept, None)(leaf)
        return done if sharding is None else jax.device_put(done, sharding)
    # One program over all devices, whichever processes have them.
    return _compiled(axis, size, kept, sharding)(leaf)


def _resized_in_jit(w: jax.Array, axis: int, size: int, kept: int, sharding: Any) -> jax.Array:
    if not isinstance(sharding, NamedSharding):
        return _cut_and_filled(w, axis, size, kept)
    if not sharding.mesh.are_all_axes_explicit:
        return lax.with_sharding_constraint(_cut_and_filled(w, axis, size, kept), sharding)
    # Where shardings are part of types, jax cuts no axis unevenly.
    w = jax.sharding.reshard(w, even(jax.typeof(w).sharding, w.shape, axis, kept))
    return jax.sharding.reshard(_cut_and_filled(w, axis, size, kept), sharding)


def _cut_and_filled(w: jax.Array, axis: int, size: int, kept: int) -> jax.Array:
    cut = lax.slice_in_dim(w, 0, kept, axis=axis)
    return jnp.pad(cut, [(0, size - kept if i == axis else 0) for i in range(w.ndim)])


@functools.lru_cache(maxsize=256)
def _compiled(axis: int, size: int, kept: int, sharding: Any) -> Callable[[jax.Array], jax.Array]:
    """Cached, so that leaves of one shape are compiled once."""
    return jax.jit(lambda w: _resized_in_jit(w, axis, size, kept, sharding), out_shardings=sharding)
