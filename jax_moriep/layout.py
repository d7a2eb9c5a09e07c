"""Layout: which axis of the mesh does what in a layer, and how its tokens are split. All static."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_moriep.errors import ShardingError, rule
from jax_moriep.runtime import compat, order
from jax_moriep.runtime.mesh import check_axis


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which mesh axes do what; all static.

    Attributes:
      mesh_shape: the size of each axis.
      explicit: all axes are Explicit, so that shardings are part of types.
      ep_axis: its devices are the ranks.
      tp_axis: splits each expert's intermediate dimension; None if nothing does.
      token_axes: those over which tokens are split.
      token_spec: which of x's leading dimensions each of them splits; None: the first.
    """

    mesh_shape: dict[str, int] = dataclasses.field(hash=False)
    explicit: bool
    ep_axis: str
    tp_axis: str | None
    token_axes: tuple[str, ...]
    token_spec: PartitionSpec | None

    @classmethod
    def of(cls, mesh: Any, ep_axis: str, token_axes: Any, tp_axis: str | None) -> Layout:
        """The layout that a caller's axes mean; see ``layer.ep_moe``.

        Raises:
          ShardingError: the mesh lacks an axis, or the axes exclude each other.
        """
        check_axis(mesh, ep_axis, "ep_axis")
        if tp_axis is not None:
            check_axis(mesh, tp_axis, "tp_axis")
            if tp_axis == ep_axis:
                raise ShardingError(rule("tp_axis", tp_axis, "differ from ep_axis", "use two mesh axes"))
        spec = token_axes if isinstance(token_axes, PartitionSpec) else None
        if token_axes is None:
            names = tuple(axis for axis in mesh.axis_names if axis != tp_axis)
        elif isinstance(token_axes, str):
            names = (token_axes,)
        elif spec is not None:
            names = axes_of(spec)
        elif isinstance(token_axes, Iterable):
            names = tuple(token_axes)
        else:
            must, cure = "be names of axes or a PartitionSpec", "name one, or several in a tuple"
            raise ShardingError(rule("token_axes", token_axes, must, cure))
        for axis in names:
            check_axis(mesh, axis, "token_axes")
        if len(set(names)) < len(names):
            raise ShardingError(rule("token_axes", names, "name no axis twice", "drop one"))
        if ep_axis not in names:
            raise ShardingError(
                rule("token_axes", names, f"contain ep_axis={ep_axis!r}", "tokens are split over the ranks")
            )
        if tp_axis in names:
            raise ShardingError(
                rule(
                    "token_axes",
                    names,
                    f"not contain tp_axis={tp_axis!r}",
                    "tokens are the same on all tp ranks",
                )
            )
        kinds = {t for t in mesh.axis_types if t != AxisType.Manual}
        return cls(dict(mesh.shape), kinds == {AxisType.Explicit}, ep_axis, tp_axis, names, spec)

    @property
    def num_ranks(self) -> int:
        """R."""
        return self.mesh_shape[self.ep_axis]

    @property
    def num_shards(self) -> int:
        """Into how many parts the tokens are split."""
        return math.prod(self.mesh_shape[axis] for axis in self.token_axes)

    @property
    def order_axes(self) -> tuple[str, ...]:
        """The axes over which the order varies: each tensor-parallel rank has exchanges of its own."""
        return self.token_axes if self.tp_axis is None else (*self.token_axes, self.tp_axis)

    @property
    def order_spec(self) -> PartitionSpec:
        """How the order lies outside the layer's ``shard_map``."""
        return PartitionSpec(self.order_axes)

    def chain_key(self, mesh: Any) -> tuple[Any, ...]:
        """See ``order.chained``."""
        return ("ep_moe", mesh, self.ep_axis, self.order_axes)

    def vary_over_tp(self, array: jax.Array) -> jax.Array:
        """The array, typed as varying over ``tp_axis`` where there is one; inside ``shard_map``."""
        return array if self.tp_axis is None else compat.pcast_varying(array, frozenset({self.tp_axis}))

    def first_order(self, mesh: Any, router: jax.Array) -> jax.Array:
        """The order that a chain of layers begins with, one value per device."""
        size = math.prod(self.mesh_shape[axis] for axis in self.order_axes)
        first = jnp.broadcast_to(order.start(router), (size,))
        return jax.sharding.reshard(first, NamedSharding(mesh, self.order_spec)) if self.explicit else first

    def place_tokens(
        self, mesh: Any, x: jax.Array, token_mask: jax.Array | None, route: Any
    ) -> tuple[jax.Array, jax.Array | None, Any, PartitionSpec]:
        """Tokens as the devices can divide them, with what goes beside them, and how they are split.

        Where they cannot be divided as they are, they are flattened to [N, H], and masked ones fill the last
        shard, so that nothing sees them.
        """
        spec, divides = self.spec_of_tokens(x)
        if not divides:
            x, token_mask, route = _filled(x, token_mask, route, self.num_shards)
            spec = PartitionSpec(self.token_axes)
        if self.explicit:
            sharding = NamedSharding(mesh, spec)
            x, token_mask, route = jax.tree.map(
                lambda a: jax.sharding.reshard(a, sharding), (x, token_mask, route)
            )
        return x, token_mask, route, spec

    def as_given(self, y: jax.Array, lead: tuple[int, ...]) -> jax.Array:
        """y without the tokens that were added, in the leading dimensions that the caller's x has."""
        if y.shape[:-1] == lead:
            return y
        return y[: math.prod(lead)].reshape(*lead, y.shape[-1])

    def spec_of_tokens(self, x: jax.Array) -> tuple[PartitionSpec, bool]:
        """How x is split, and whether its sizes allow it."""
        if self.explicit:
            return self._spec_on_explicit_mesh(x), True
        spec = self.token_spec or PartitionSpec(self.token_axes)
        if len(spec) > x.ndim - 1:
            if self.token_spec is not None:
                raise ShardingError(
                    rule(
                        "token_axes",
                        spec,
                        f"name at most the {x.ndim - 1} leading dimensions of x",
                        "shorten it",
                    )
                )
            return spec, False
        sizes = [math.prod(self.mesh_shape[a] for a in axes_of(PartitionSpec(part))) for part in spec]
        divides = all(x.shape[i] % size == 0 for i, size in enumerate(sizes))
        return spec, divides

    def _spec_on_explicit_mesh(self, x: jax.Array) -> PartitionSpec:
        spec = jax.typeof(x).sharding.spec
        last = spec[x.ndim - 1] if len(spec) == x.ndim else None
        if (
            self._splitting(axes_of(spec)) != self._splitting(self.token_axes)
            or last is not None
            or x.ndim < 2
        ):
            want = PartitionSpec(self.token_axes, *[None] * (x.ndim - 1))
            cure = f"use jax.sharding.reshard(x, {want})"
            if x.ndim == 1 or x.shape[0] % self.num_shards:
                cure = (
                    f"pad x so that the {self.num_shards} shards divide its first dimension, reshard it by "
                    f"{want} and mask the added tokens by token_mask, or use a mesh with AxisType.Auto, "
                    "where ep_moe does so"
                )
            raise ShardingError(
                rule(
                    "x.sharding",
                    spec,
                    f"split the leading dimensions over token_axes={self.token_axes} and leave H whole",
                    cure,
                )
            )
        lead: list[Any] = [*spec, *[None] * x.ndim][: x.ndim - 1]
        alone = tuple(axis for axis in self.token_axes if axis not in axes_of(spec))
        if alone:
            lead[0] = (*axes_of(PartitionSpec(lead[0])), *alone)
        return PartitionSpec(*lead)

    def _splitting(self, axes: tuple[str, ...]) -> set[str]:
        """Those of more than one device."""
        return {axis for axis in axes if self.mesh_shape[axis] > 1}


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec names, in order."""
    axes: list[str] = []
    for part in spec:
        if part is not None:
            axes.extend(part if isinstance(part, tuple) else (part,))
    return tuple(axes)


def _filled(
    x: jax.Array, token_mask: jax.Array | None, route: Any, num_shards: int
) -> tuple[jax.Array, jax.Array, Any]:
    """Flattens x to [N, H] and pads N to a multiple of the shards; the added tokens are masked."""
    count = math.prod(x.shape[:-1])
    added = -count % num_shards
    mask = jnp.ones(count, jnp.bool_) if token_mask is None else token_mask.reshape(-1)

    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array.reshape(count, array.shape[-1]), ((0, added), (0, 0)))

    return padded(x), jnp.pad(mask, (0, added)), jax.tree.map(padded, route)
