"""Padding of the experts in whole trees: taken away before a checkpoint is written, put back when it is read.

jax shards evenly or not at all, so E experts on R ranks are stored as ``R * ceil(E / R)``, and a state is
tied to its R. ``unpad_params`` makes of it what is the same for every R, ``pad_like`` what the run at hand
wants.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jax_moriep.config import PER_EXPERT, WEIGHT_NAMES, MoEConfig, check_type
from jax_moriep.errors import ConfigError, rule
from jax_moriep.resize import even, resized, sharding_of
from jax_moriep.runtime import compat

# Where Flax's variables and boxes keep their array.
_BOX = "value"
# What tells a layer. Codes may stand apart from the router, with their scales; the biases stay beside it.
_SIDE_BY_SIDE = (
    {"router", "w1", "w2"},
    {"w1", "w2", "w1_scale", "w2_scale"},
    {"router", "b1", "b2"},
)


def unpad_params(params: Any, cfg: MoEConfig) -> Any:
    """Takes the experts that only fill up the ranks away from a layer's weights, wherever they are in a tree.

    ``params`` may be a MoEParams, or anything that holds weights of the layer, such as the state of a model
    and its optimizer, of Flax's nnx or linen too. Weights are found by their names in MoEParams, side by
    side, and by the shapes that ``cfg`` gives them, behind leading axes of stacked layers or none; so are
    moments, which mirror them. What has some of a weight's axes only, as a factored second moment has, is
    found where the weights are in the same tree. Codes with their scales may stand apart from the router, and
    an optimizer may keep nothing for it; then the router that is nearest by its path says whose they are. A
    tree with layers of several configs takes a call for each.

    What comes out is evenly sharded. Where the mesh axes of the experts do not divide E, they move to another
    dimension that they divide, so no device gets more than its share; where there is none, each gets all.

    Args:
      params: a tree of arrays of jax or NumPy, of ``jax.ShapeDtypeStruct``, or of what ``jax.jit`` traces.
      cfg: the layer.

    Returns:
      The same tree, with E experts everywhere. Leaves that are not the experts' are the same objects.

    Raises:
      ConfigError: ``cfg`` is no config, the tree holds no weights of such a layer, or it cannot be told which
        axis of a leaf is the experts' or, without a router, how many of them are padding.

    Example::

      checkpointer.save(path, jm.unpad_params(state, cfg))
    """
    tree = _Tree.of(params, cfg)
    leaves = list(tree.leaves)
    for index, axis in tree.experts.items():
        _check_alive(leaves[index], tree.paths[index])
        if leaves[index].shape[axis] != cfg.num_experts:
            target = even(sharding_of(leaves[index]), leaves[index].shape, axis, cfg.num_experts)
            leaves[index] = resized(leaves[index], axis, cfg.num_experts, cfg.num_experts, target)
    return jax.tree.unflatten(tree.structure, leaves)


def pad_like(params: Any, like: Any, cfg: MoEConfig) -> Any:
    """Gives a tree the padding and the sharding that another one has: the inverse of ``unpad_params``.

    What it adds are zeros; the padding of weights and of moments never holds anything else.

    Args:
      params: what was restored, without padding, or with any where ``like`` has some, on devices or on the
        host.
      like: a tree of the same structure: the state of the run that is to go on, of arrays, or of
        ``jax.ShapeDtypeStruct`` with shardings.
      cfg: the layer.

    Returns:
      ``params``, the experts' leaves in the shapes and shardings of ``like``. Its other leaves are the same
      objects.

    Raises:
      ConfigError: the trees or their shapes differ otherwise, ``params`` is padded and ``like`` is not, as
        when they are swapped, or as for ``unpad_params``.

    Example::

      target = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
      restored = checkpointer.restore(path, jm.unpad_params(target, cfg))
      state = jm.pad_like(restored, fresh, cfg)
    """
    tree = _Tree.of(like, cfg, "like")
    given = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_empty)[0]
    _check_same_paths([path for path, _ in given], tree.paths)
    leaves = [leaf for _, leaf in given]
    for index, axis in tree.experts.items():
        _check_not_swapped(leaves[index], tree.leaves[index], axis, tree.paths[index], cfg)
    for index in tree.beside:
        there, here = (getattr(leaf, "shape", None) for leaf in (tree.leaves[index], leaves[index]))
        if there != here:
            name = f"params{jax.tree_util.keystr(tree.paths[index])}.shape"
            raise ConfigError(rule(name, here, f"be {there}, as in like", "pass the state of the same model"))
    for index, axis in tree.experts.items():
        wanted, leaf = tree.leaves[index], leaves[index]
        _check_alive(leaf, tree.paths[index])
        shape = getattr(leaf, "shape", ())
        rest = (*wanted.shape[:axis], *wanted.shape[axis + 1 :])
        if (*shape[:axis], *shape[axis + 1 :]) != rest or shape[axis] < cfg.num_experts:
            name = f"params{jax.tree_util.keystr(tree.paths[index])}.shape"
            must = f"be {wanted.shape}, with {cfg.num_experts} or more along axis {axis}"
            raise ConfigError(rule(name, shape, must, "pass what jm.unpad_params(like, cfg) describes"))
        leaves[index] = resized(leaf, axis, wanted.shape[axis], cfg.num_experts, sharding_of(wanted))
    return jax.tree.unflatten(tree.structure, leaves)


class _Place(NamedTuple):
    """The shape of an experts' weight, and which of its axes is theirs."""

    shape: tuple[int, ...]
    axis: int


@dataclasses.dataclass(frozen=True)
class _Tree:
    """A flattened tree, the experts' axis of each leaf that has one, and the layer's leaves beside them."""

    paths: list[Any]
    leaves: list[Any]
    structure: Any
    experts: dict[int, int]
    beside: list[int]

    @classmethod
    def of(cls, tree: Any, cfg: MoEConfig, argument: str = "params") -> _Tree:
        check_type("cfg", cfg, MoEConfig, "pass the layer's config")
        # What is empty, as optax has it where a mask leaves a weight out, stays: its name is there.
        flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_empty)
        paths, leaves = [path for path, _ in flat], [leaf for _, leaf in flat]
        names = [f"{argument}{jax.tree_util.keystr(path)}" for path in paths]
        groups = _groups(paths, leaves, cfg)
        experts: dict[int, int] = {}
        whole: dict[str, set[_Place]] = {}
        routers: set[tuple[int, ...]] = set()
        for group in groups:
            for name, index, axis in _experts_of(group, leaves, names, cfg):
                experts[index] = axis
                whole.setdefault(name, set()).add(_Place(tuple(leaves[index].shape), axis))
            if experts.keys() & group.indices:
                routers |= group.router_shapes
        if not experts:
            raise ConfigError(
                f"{argument} must hold weights of a layer of this cfg: router, w1 and w2 side by side, w1 of "
                f"shape [..., {cfg.num_experts} or more, {2 * cfg.intermediate_size}, {cfg.hidden_size}]; "
                "pass the layer's own cfg, and the state with its weights"
            )
        for group in groups:
            of_layer = {name: [place.shape for place in whole.get(name, ())] for name in group.leading}
            # A layer of another config has a router of its own, whatever its padded experts look like.
            of_layer |= {"router": list(routers)} if "router" in group.named else {}
            of_other = group.is_apart and group.routers and not group.router_shapes & routers
            if (
                experts.keys() & group.indices
                or of_other
                or not all(_is_reduced(leaves[group.named[n]], shapes) for n, shapes in of_layer.items())
            ):
                continue
            for name, index in group.named.items():
                axis = _axis_of_reduced(leaves[index], whole.get(name, ()), cfg, names[index])
                if axis is not None:
                    experts[index] = axis
        of_layers = [{*group.indices, *group.routers} for group in groups if experts.keys() & group.indices]
        beside = sorted(set().union(*of_layers) - experts.keys())
        return cls(paths, leaves, structure, experts, beside)


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Leaves with names of MoEParams that stand side by side."""

    named: dict[str, int]
    """Name to index."""
    routers: dict[int, tuple[int, ...]]
    """Index and shape of the router among them; else of the routers that are nearest to them."""
    is_apart: bool
    """Whether no router with a shape is among them."""

    @property
    def indices(self) -> set[int]:
        return set(self.named.values())

    @property
    def router_shapes(self) -> set[tuple[int, ...]]:
        return set(self.routers.values())

    @property
    def leading(self) -> tuple[str, ...]:
        """The names that tell how many experts there are; where codes stand apart, biases do."""
        names = ("w1", "w2") if "w1" in self.named else ("b1", "b2")
        return tuple(name for name in names if name in self.named)


def _groups(paths: Sequence[Any], leaves: Sequence[Any], cfg: MoEConfig) -> list[_Group]:
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for index, path in enumerate(paths):
        keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        if keys and keys[-1] == _BOX:
            keys.pop()
        if keys and keys[-1] in WEIGHT_NAMES:
            found.setdefault(tuple(keys[:-1]), {})[keys[-1]] = index
    own: dict[tuple[str, ...], dict[int, tuple[int, ...]]] = {}
    for where, named in found.items():
        if "router" in named and (shape := getattr(leaves[named["router"]], "shape", None)) is not None:
            own[where] = {named["router"]: tuple(shape)}
    # Not those that an optimizer has reduced.
    whole = {
        where: router
        for where, router in own.items()
        if all(shape[-2:-1] == (cfg.hidden_size,) for shape in router.values())
    }
    groups = []
    for where, named in found.items():
        if not any(of_layer <= named.keys() for of_layer in _SIDE_BY_SIDE):
            continue
        if where in own:
            groups.append(_Group(named, own[where], is_apart=False))
            continue
        # Codes have a router without experts; where an optimizer keeps nothing for one, it may be any.
        other = {at: router for at, router in whole.items() if "router" in named or "w1" not in found[at]}
        groups.append(_Group(named, _nearest(where, other), is_apart=True))
    return groups


def _nearest(
    where: tuple[str, ...], routers: dict[tuple[str, ...], dict[int, tuple[int, ...]]]
) -> dict[int, tuple[int, ...]]:
    """The routers whose paths end as this one does as far as any, and of those begin so."""

    def nearness(at: tuple[str, ...]) -> tuple[int, int]:
        return _num_alike(at[::-1], where[::-1]), _num_alike(at, where)

    most = max(map(nearness, routers), default=None)
    return {index: shape for at in routers if nearness(at) == most for index, shape in routers[at].items()}


def _num_alike(one: Sequence[str], other: Sequence[str]) -> int:
    """How many keys are the same before the first that differs."""
    alike = (a == b for a, b in zip(one, other, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def _experts_of(
    group: _Group, leaves: Sequence[Any], names: Sequence[str], cfg: MoEConfig
) -> Iterator[tuple[str, int, int]]:
    """(name, index, axis) of the experts' leaves, if these are weights of the layer, or mirror them."""
    experts, hidden, inner = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    ends = {"w1": (2 * inner, hidden), "w2": (hidden, inner), "b1": (2 * inner,), "b2": (hidden,)}
    shapes = {name: getattr(leaves[index], "shape", None) for name, index in group.named.items()}
    leads, counts = set(), {}
    for name in group.leading:
        shape, axis = shapes[name], -len(ends[name]) - 1
        if shape is None:
            continue
        if len(shape) < -axis or tuple(shape[axis + 1 :]) != ends[name] or shape[axis] < experts:
            return
        leads.add(tuple(shape[:axis]))
        counts[name] = shape[axis]
    if not counts or len(leads) != 1:
        return
    (lead,) = leads
    axis, (first, count) = len(lead), next(iter(counts.items()))
    if group.routers and (*lead, hidden, experts) not in group.router_shapes:
        return
    if count > experts and len(group.router_shapes) != 1:
        where = group.named[first]
        must = f"not leave open how many of its {count} experts are padding, for no router is beside it"
        cure = "pass the whole state, with the router of the same layer"
        raise ConfigError(rule(f"{names[where]}.shape", tuple(leaves[where].shape), must, cure))
    for name in PER_EXPERT:
        shape = shapes.get(name)
        if shape is None:
            continue
        if tuple(shape[: axis + 1]) != (*lead, count):
            must = f"have {count} experts along axis {axis}, as {first} beside it"
            raise ConfigError(rule(f"{names[group.named[name]]}.shape", tuple(shape), must, "pad them alike"))
        yield name, group.named[name], axis


def _is_reduced(leaf: Any, whole: Iterable[tuple[int, ...]]) -> bool:
    """Whether it has axes of one of these weights only, or stands where an optimizer keeps nothing."""
    shape = tuple(getattr(leaf, "shape", ()))
    return math.prod(shape) <= 1 or any(_is_subsequence(shape, of_weight) for of_weight in whole)


def _axis_of_reduced(leaf: Any, whole: Iterable[_Place], cfg: MoEConfig, leaf_name: str) -> int | None:
    """The experts' axis of what has some or all axes of a padded weight; None if it has none."""
    shape = tuple(getattr(leaf, "shape", ()))
    for place in whole:
        count = place.shape[place.axis]
        if count == cfg.num_experts or not _is_subsequence(shape, place.shape):
            continue
        if shape == place.shape:
            return place.axis
        axes = [i for i, size in enumerate(shape) if size == count]
        if axes and place.shape.count(count) > 1:
            raise ConfigError(
                rule(
                    f"{leaf_name}.shape",
                    shape,
                    f"not leave open which axis is that of {count} padded experts in weights {place.shape}",
                    "leave it out of the checkpoint, or choose a number of ranks that divides E",
                )
            )
        if axes:
            return axes[0]
    return None


def _is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(size in rest for size in part)


def _check_same_paths(given: Sequence[Any], wanted: Sequence[Any]) -> None:
    for mine, theirs in zip([*given, None], [*wanted, None], strict=False):
        if mine != theirs:
            here, there = (
                "nothing more" if path is None else jax.tree_util.keystr(path) for path in (mine, theirs)
            )
            raise ConfigError(
                f"params has {here} where like has {there}, and must have the same structure; restore into "
                "jm.unpad_params(like, cfg)"
            )


def _check_not_swapped(leaf: Any, wanted: Any, axis: int, path: Any, cfg: MoEConfig) -> None:
    """Refuses to take padding away: what has it may be the state that runs, not what was restored."""
    shape = tuple(getattr(leaf, "shape", ()))
    rest = (*shape[:axis], cfg.num_experts, *shape[axis + 1 :])
    if len(shape) > axis and shape[axis] > cfg.num_experts and rest == tuple(wanted.shape):
        name = f"params{jax.tree_util.keystr(path)}.shape"
        must = f"be {rest}, for like has no padding"
        cure = "swap params and like if params is the fresh state, else pass jm.unpad_params(params, cfg)"
        raise ConfigError(rule(name, shape, must, cure))


def _check_alive(leaf: Any, path: Any) -> None:
    """Refuses an array that was donated, before it gets into a program: it holds nothing any more."""
    if isinstance(leaf, jax.Array) and not compat.is_tracer(leaf) and leaf.is_deleted():
        where = f"params{jax.tree_util.keystr(path)}"
        raise ConfigError(f"{where} was donated to a program and is deleted; pass the state that it returned")
