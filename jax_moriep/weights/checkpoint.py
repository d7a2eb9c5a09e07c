"""load: the MoE weights of a whole checkpoint, each process's part only, layers stacked."""

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_moriep import hf_config
from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.runtime import compat
from jax_moriep.runtime.mesh import check_axis
from jax_moriep.weights.block import Block
from jax_moriep.weights.families import FAMILIES, Family, check_config, family_of
from jax_moriep.weights.files import Checkpoint, Tensor
from jax_moriep.weights.reader import prefixes_of, with_experts, with_router
from jax_moriep.weights.shards import Shards

_OF_EXPERTS = ("experts.", "input_linear.", "output_linear.")


def load(
    folder: str | os.PathLike[str],
    cfg: MoEConfig | None = None,
    *,
    layers: int | Iterable[int] | None = None,
    mesh: Mesh | None = None,
    ep_axis: str = "ep",
    tp_axis: str | None = None,
    dtype: Any = None,
    dequantize: bool = False,
    family: str | None = None,
) -> MoEParams:
    """Loads the MoE blocks of a model from a safetensors checkpoint of Hugging Face, as it is on disk.

    Every process calls it. It reads the bytes of the experts that its devices hold, of routers and of shared
    experts, and nothing else, straight to where they shall be. What is quantised stays so or becomes bfloat16
    as ``jm.weights.from_hf`` says.

    Args:
      folder: with config.json, and one safetensors file or several and their index.
      cfg: the layer; None for ``jm.MoEConfig.from_hf(folder)``.
      layers: numbers of decoder layers in the model, in the wanted order; one number gives that layer without
        a dimension of layers. None: all with a MoE block, see ``jm.weights.moe_layers``.
      mesh: where the weights go, sharded as ``jm.param_specs(cfg, ep_axis, tp_axis)`` says, with experts
        padded to its ranks as by ``jm.pad_params``. None: NumPy arrays on the host, with all experts.
      ep_axis: the mesh's expert-parallel axis.
      tp_axis: its tensor-parallel axis, if any.
      dtype: of weights that are floating; None keeps each as it is stored. score_bias and scales are float32.
        float64 goes to a mesh under ``jax_enable_x64`` only.
      dequantize: give experts that are stored in float8 or int8 in bfloat16 (or ``dtype``).
      family: of ``jm.weights.from_hf``, for a config.json of a model_type that the package does not know.

    Returns:
      MoEParams. Unless ``layers`` is one number, every weight has a first dimension of layers, for
      ``jax.lax.scan``.

    Raises:
      ConfigError: the folder holds no such checkpoint, a file of it is damaged, it does not fit cfg, a layer
        has no MoE block, or jax has no such dtype; or all layers are asked for, and one is lost or has half
        a block.
      ShardingError: the mesh is none, lacks an axis, or ``tp_axis`` does not divide the sizes.

    Example:
      >>> cfg = jm.MoEConfig.from_hf(folder)
      >>> params = jm.weights.load(folder, cfg, mesh=mesh)
      >>> layers = jnp.arange(len(params.router))
      >>> y, stats = jax.lax.scan(lambda x, i: jm.ep_moe(x, params, cfg, mesh=mesh, layer=i), x, layers)
    """
    described = None if cfg is not None and family is not None else hf_config.describe(folder)
    if cfg is None:
        assert described is not None
        cfg = MoEConfig(**described.fields)
    check_type("cfg", cfg, MoEConfig, "pass the layer's config, or None for the checkpoint's own")
    name = described.family if family is None and described is not None else family
    layout = family_of(name)
    check_config(str(name), cfg)
    if mesh is not None:
        if not isinstance(mesh, Mesh):
            cure = "pass the mesh itself"
            raise ShardingError(rule("mesh", type(mesh).__name__, "be a jax.sharding.Mesh", cure))
        for argument, axis in (("ep_axis", ep_axis), ("tp_axis", tp_axis)):
            if axis is not None:
                check_axis(mesh, axis, argument)
        if tp_axis == ep_axis:
            raise ShardingError(rule("tp_axis", tp_axis, "differ from ep_axis", "use two mesh axes"))
        if not mesh.local_devices:
            cure = "call load in the processes whose devices are in the mesh"
            raise ShardingError(rule("mesh", dict(mesh.shape), "have a device of this process", cure))
        if compat.is_tracer(jnp.zeros(())):
            cure = "call load outside of jax.jit and jax.eval_shape, or without a mesh"
            raise ConfigError(f"load must not be traced, for what it puts on a mesh are arrays; {cure}")
    with Checkpoint(folder) as files:
        blocks = _blocks(files, layout, folder)
        wanted = _run_by_the_model(files, layout, blocks, folder) if layers is None else layers
        prefixes = _chosen(blocks, wanted)
        shards = Shards(cfg, len(prefixes), mesh, ep_axis, tp_axis, _floating(dtype))
        names = _names_below(files, prefixes)
        for i, prefix in enumerate(prefixes):
            try:
                _read_layer(i, _Layer(files, prefix, names[prefix]), str(name), cfg, dequantize, shards)
            except ConfigError as e:
                raise ConfigError(f"below {prefix!r}: {e}") from None
    return shards.params(stacked=_number(layers) is None)


def moe_layers(folder: str | os.PathLike[str], *, family: str | None = None) -> tuple[int, ...]:
    """The numbers of a checkpoint's decoder layers that have a MoE block: what ``load`` takes by itself.

    Dense layers are none of them, nor are layers behind those that the model runs, such as DeepSeek-V3's
    layer 61 for predicting further tokens; ``load(..., layers=61)`` reads that one.

    Args:
      folder: as for ``load``.
      family: as for ``load``.

    Raises:
      ConfigError: the folder holds no checkpoint of a known model, or a part of one only.
    """
    layout = family_of(hf_config.describe(folder).family if family is None else family)
    with Checkpoint(folder) as files:
        return tuple(_run_by_the_model(files, layout, _blocks(files, layout, folder), folder))


class _Layer(Mapping[str, Any]):
    """The tensors of one block by their names below it. What all shares need is read once."""

    def __init__(self, files: Checkpoint, prefix: str, names: list[str]) -> None:
        self._files = files
        self._prefix = prefix
        self._names = dict.fromkeys(names)
        self._read: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray | Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._read:
            return self._read[name]
        found = self._files[self._prefix + name]
        if name.startswith(_OF_EXPERTS):
            return found
        self._read[name] = np.asarray(found)
        return self._read[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def without_others(self, share: range, num_experts: int) -> Mapping[str, Any]:
        """The same but for the tensors of experts that are no part of a share."""
        others = {str(i) for i in range(num_experts) if i not in share}
        names = [
            name for name in self._names if not (name.startswith("experts.") and name.split(".")[1] in others)
        ]
        left = _Layer(self._files, self._prefix, names)
        left._read = self._read
        return left


def _read_layer(
    number: int, layer: _Layer, family: str, cfg: MoEConfig, dequantize: bool, shards: Shards
) -> None:
    """Reads one layer's block to where it shall be."""
    for share in shards.shares():
        real = range(share.start, min(share.stop, cfg.num_experts))
        # A share of padding alone has the shapes and dtypes of the first expert, and nothing of its values.
        wanted = real if len(real) else range(1)
        room = functools.partial(shards.room, number, share) if len(real) else None
        block = Block(layer.without_others(wanted, cfg.num_experts), family, cfg, dequantize, wanted, room)
        read = FAMILIES[family].read(block)
        block.check_all_read(read)
        shards.put(number, share, read, len(real))


def _blocks(files: Checkpoint, layout: Family, folder: str | os.PathLike[str]) -> dict[int, str]:
    """The prefix of the MoE block of each layer that has one, by the layer's number."""
    found: dict[int, str] = {}
    for prefix in prefixes_of(files, layout.router_names):
        number = re.search(r"\.(\d+)\.[^.]+\.$", prefix)
        if number is None:
            continue
        before = found.setdefault(int(number[1]), prefix)
        if before != prefix:
            raise ConfigError(
                f"folder {os.fspath(folder)!r} has MoE blocks below {before!r} and below {prefix!r}, and one "
                "model has one of them; load the blocks with jm.weights.from_hf"
            )
    if not found:
        example = f"model.layers.0.{layout.blocks[-1]}.{layout.router_names[-1]}"
        raise ConfigError(
            f"folder {os.fspath(folder)!r} has no layer with a router such as {example!r} and experts beside "
            "it; pass a checkpoint with MoE blocks, and the family that it is of"
        )
    return dict(sorted(found.items()))


def _num_layers(folder: str | os.PathLike[str]) -> int | None:
    """How many layers the model runs, if it has a config.json that can tell."""
    return hf_config.num_layers(folder) if os.path.exists(os.path.join(folder, hf_config.FILE)) else None


def _run_by_the_model(
    files: Checkpoint, layout: Family, blocks: dict[int, str], folder: str | os.PathLike[str]
) -> list[int]:
    """The layers with a MoE block that the model runs, of which none may be there in part only."""
    num_layers = _num_layers(folder)
    _check_whole(files, layout, blocks, folder, num_layers)
    return [number for number in blocks if num_layers is None or number < num_layers]


def _check_whole(
    files: Checkpoint,
    layout: Family,
    blocks: dict[int, str],
    folder: str | os.PathLike[str],
    num_layers: int | None,
) -> None:
    """Refuses a checkpoint that lacks a layer or half of its block, for it would be left out without a word.

    Where no layer has a tensor outside its MoE block, the folder is one of MoE blocks alone; then a layer
    that has none cannot be told from a lost one.
    """
    roots = {prefix.rsplit(".", 3)[0] + "." for prefix in blocks.values()}
    names_of_blocks = {prefix.split(".")[-2] for prefix in blocks.values()}
    cure = "download it again, or load the layers that are whole with layers="

    def number_in(name: str) -> int | None:
        """The decoder layer that a name is of."""
        found = [name.removeprefix(root).partition(".")[0] for root in roots if name.startswith(root)]
        return next((int(part) for part in found if part.isdigit()), None)

    experts, routers = with_experts(files), with_router(files, layout.router_names)
    for prefix in sorted(experts ^ routers):
        number, block = number_in(prefix), prefix.split(".")[-2:]
        # What else has the name of a router, such as an attention's gate, is of another part of the layer.
        known = prefix in experts or block[0] in names_of_blocks
        of_block = block[1:] == [""] and prefix.count(".") in {p.count(".") for p in blocks.values()}
        if number is None or not of_block or not known or (num_layers is not None and number >= num_layers):
            continue
        has, lacks = ("experts", "a router") if prefix in experts else ("a router", "experts")
        raise ConfigError(
            rule("folder", os.fspath(folder), f"have {lacks} below {prefix!r}, where it has {has}", cure)
        )
    numbers = {name: number for name in files if (number := number_in(name)) is not None}
    if all(number in blocks and name.startswith(blocks[number]) for name, number in numbers.items()):
        return
    there = set(numbers.values())
    lost = next((number for number in range(num_layers or 0) if number not in there), None)
    if lost is not None:
        must = f"have tensors of layer {lost}, for its {hf_config.FILE} has num_hidden_layers={num_layers}"
        raise ConfigError(rule("folder", os.fspath(folder), must, cure))


def _chosen(blocks: dict[int, str], layers: int | Iterable[int]) -> list[str]:
    """The prefixes of the layers that are asked for."""
    # An array of one number without a dimension is an Iterable, too, by its type.
    wanted = list(layers) if isinstance(layers, Iterable) and getattr(layers, "ndim", 1) else [layers]
    there = f"{min(blocks)} to {max(blocks)}"
    if list(blocks) != list(range(min(blocks), max(blocks) + 1)):
        there = ", ".join(map(str, blocks))
    if not wanted:
        raise ConfigError(rule("layers", wanted, f"name at least one of {there}", "pass None for all"))
    found = []
    for given in wanted:
        number = _number(given)
        if number is None or number not in blocks:
            must = f"be of layers with a MoE block, which are {there} here"
            if number is None:
                must = "be an integer or several"
            raise ConfigError(rule("layers", given, must, "leave out dense layers, or pass None for all"))
        found.append(blocks[number])
    return found


def _number(value: Any) -> int | None:
    """An integer of any kind, also as an array of one, or None for what is none."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _names_below(files: Checkpoint, prefixes: list[str]) -> dict[str, list[str]]:
    """For each prefix the names below it, without it."""
    found: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    depth = {prefix.count(".") for prefix in prefixes}
    for name in files:
        parts = name.split(".")
        for count in depth:
            prefix = ".".join(parts[:count]) + "."
            if prefix in found:
                found[prefix].append(name.removeprefix(prefix))
    return found


def _floating(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.itemsize == 1 or not jnp.issubdtype(found, jnp.floating):
        cure = "pass jnp.bfloat16, or None to keep what is stored"
        raise ConfigError(rule("dtype", dtype, "be a floating dtype of 16 bits or more", cure))
    return found
