"""The part of a model's MoE weights that this process holds: its arrays, filled layer by layer."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_moriep import params as parameters
from jax_moriep import schemes
from jax_moriep.config import PER_EXPERT, WEIGHT_NAMES, MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.plan import experts_per_rank

_PAGES = 1 << 20
"""Bytes from which an array gets pages of its own."""
_ALWAYS_F32 = ("score_bias", "w1_scale", "w2_scale")

Index = tuple[tuple[int, int], ...]
"""From where to where a part goes in each dimension of a weight."""


@dataclasses.dataclass
class _Part:
    """A part of a weight: the devices that hold it, None for the host, and its values of all layers."""

    devices: list[Any]
    values: np.ndarray | None = None


class Shards:
    """What this process holds of the weights of some layers.

    Args:
      cfg: the layer.
      layers: how many.
      mesh: where the weights go; None for the host, which holds all.
      ep_axis: its axis of experts, which are padded with zeros to a multiple of its size.
      tp_axis: the axis that splits matrices, if any.
      dtype: of floating weights; None leaves each as it is stored.

    Raises:
      ShardingError: ``tp_axis`` does not divide what it splits.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        layers: int,
        mesh: Mesh | None,
        ep_axis: str,
        tp_axis: str | None,
        dtype: np.dtype | None,
    ) -> None:
        self._cfg = cfg
        self._layers = layers
        self._mesh = mesh
        self._dtype = dtype
        ranks = 1 if mesh is None else mesh.shape[ep_axis]
        self._padded = ranks * experts_per_rank(cfg.num_experts, ranks)
        absent: Any = None
        scale: Any = 0  # stands for one
        with_scales = MoEParams(absent, absent, absent, w1_scale=scale) if cfg.expert_quant else None
        self._specs = parameters.param_specs(cfg, ep_axis, tp_axis, params=with_scales)
        self._shapes = parameters.param_shapes(cfg, quantised=True)
        self._parts = {name: self._parts_of(name) for name in WEIGHT_NAMES if self._shapes[name] is not None}

    def shares(self) -> Iterator[range]:
        """The experts that lie together somewhere here, padding included; each share once."""
        yield from sorted({self._share(index) for index in self._parts["w1"]}, key=lambda share: share.start)

    def room(
        self, layer: int, share: range, field: str, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray | None:
        """Where a layer's experts of a share are wanted as they are; None if no array is just them."""
        if self._wanted(field, dtype) != dtype:
            return None
        found = [index for index in self._parts.get(field, ()) if self._share(index) == share]
        if len(found) != 1 or self._shape(found[0])[1:] != shape[1:]:
            return None
        return self._values(field, found[0], dtype)[layer][: shape[0]]

    def put(self, layer: int, share: range, read: MoEParams, real: int) -> None:
        """Takes the weights of one layer, of which some are in their room already.

        Args:
          layer: which, counted from 0.
          share: which experts, with padding.
          read: of NumPy.
          real: how many of the share's experts are to be taken; the others are padding.
        """
        for field, parts in self._parts.items():
            value = getattr(read, field)
            if value is None:
                continue
            for index in parts:
                if field not in PER_EXPERT:
                    source = value[tuple(slice(*ends) for ends in index)]
                elif self._share(index) == share:
                    source = value[(slice(real), *(slice(*ends) for ends in index[1:]))]
                else:
                    continue
                target = self._values(field, index, value.dtype)[layer]
                target = target[:real] if field in PER_EXPERT else target
                if not np.may_share_memory(source, target):
                    target[...] = source

    def params(self, stacked: bool) -> MoEParams:
        """The weights: on the mesh, or NumPy arrays; with a first dimension of layers if they are stacked."""
        there = [field for field, parts in self._parts.items() if self._filled(parts)]
        return MoEParams(**{field: self._whole(field, stacked) for field in there})

    def _whole(self, field: str, stacked: bool) -> Any:
        """All that is here of a weight; its arrays are given up."""
        spec = getattr(self._specs, field)
        shape = self._shape_of(field)
        if stacked:
            spec, shape = PartitionSpec(None, *spec), (self._layers, *shape)
        placed = []
        whole: Any = None
        for part in self._parts[field].values():
            whole, part.values = part.values, None
            if whole is not None and not stacked:
                whole = whole[0]
            # A CPU's device takes the array as it is, for it begins at a page; others get a copy.
            placed += [jax.device_put(whole, device) for device in part.devices if device is not None]
        if self._mesh is None:
            return whole
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(self._mesh, spec), placed)

    def _shape_of(self, field: str) -> tuple[int, ...]:
        shape = self._shapes[field]
        assert shape is not None
        return (self._padded, *shape[1:]) if field in PER_EXPERT else shape

    def _parts_of(self, field: str) -> dict[Index, _Part]:
        """Each part of a weight that a device of this process holds, once."""
        shape = self._shape_of(field)
        if self._mesh is None:
            return {tuple((0, size) for size in shape): _Part([None])}
        sharding = NamedSharding(self._mesh, getattr(self._specs, field))
        try:
            indices = sharding.addressable_devices_indices_map(shape)
        except ValueError:
            spec = getattr(self._specs, field)
            must = f"divide params.{field} of shape {shape}, which is sharded as {spec}"
            cure = "choose another mesh, or leave tp_axis out"
            raise ShardingError(rule("mesh", dict(self._mesh.shape), must, cure)) from None
        found: dict[Index, _Part] = {}
        for device, index in indices.items():
            ends = tuple(s.indices(size)[:2] for s, size in zip(index or (), shape, strict=True))
            found.setdefault(ends, _Part([])).devices.append(device)
        return found

    def _wanted(self, field: str, dtype: np.dtype) -> np.dtype:
        """The dtype that a weight gets."""
        if field in _ALWAYS_F32 or self._dtype is None or schemes.is_codes(dtype):
            return dtype
        return self._dtype

    def _values(self, field: str, index: Index, dtype: np.dtype) -> np.ndarray:
        """The array of a part for all layers, made when the first of them comes."""
        part, wanted = self._parts[field][index], self._wanted(field, dtype)
        if self._mesh is not None and jax.dtypes.canonicalize_dtype(wanted) != wanted:
            must = "be one that jax has on a mesh as it is set"
            cure = "pass dtype=jnp.float32, or switch jax_enable_x64 on before"
            raise ConfigError(rule(f"params.{field}.dtype", wanted.name, must, cure))
        if part.values is None:
            part.values = _zeros((self._layers, *self._shape(index)), wanted)
        elif part.values.dtype != wanted:
            raise ConfigError(
                f"layers have {field} in {part.values.dtype} and in {wanted}, and one array has them all; "
                "load them apart with layers=, or pass dtype= or dequantize=True"
            )
        return part.values

    @staticmethod
    def _share(index: Index) -> range:
        return range(*index[0])

    @staticmethod
    def _shape(index: Index) -> tuple[int, ...]:
        return tuple(end - first for first, end in index)

    @staticmethod
    def _filled(parts: dict[Index, _Part]) -> bool:
        return any(part.values is not None for part in parts.values())


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros; large arrays begin at a page, and what is never written takes no memory."""
    count = int(np.prod(shape)) * dtype.itemsize
    if count < _PAGES:
        return np.zeros(shape, dtype)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)
