"""One layer's MoE block of a state dict: its tensors by their names, checked, and put together to experts.

A tensor may be in a file still (``files.Tensor``): then it is read when it is needed, and experts are read to
where they shall be, without a copy between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, rule
from jax_moriep.weights import codes
from jax_moriep.weights.files import Tensor

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

Room = Callable[[str, tuple[int, ...], np.dtype], np.ndarray | None]
"""(field, shape, dtype) to an array in which that field of the experts is wanted, or None for any."""


class Block:
    """A state dict that checks the shape of what is read and remembers what has been.

    Args:
      state_dict: arrays by their name below the block.
      family: for errors.
      cfg: the layer.
      dequantize: give quantised experts in bfloat16.
      share: the experts that are wanted, without a gap; None for all.
      room: where to put experts that are read from files.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Any],
        family: str,
        cfg: MoEConfig,
        dequantize: bool = False,
        share: range | None = None,
        room: Room | None = None,
    ) -> None:
        self.cfg = cfg
        self.share = range(cfg.num_experts) if share is None else share
        self._room = room
        self._dequantize = dequantize
        self._tensors = state_dict
        self._family = family
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str, *shape: int) -> np.ndarray:
        """The tensor of that name as NumPy, of exactly that shape; floating, also where it is quantised."""
        return np.asarray(codes.dequantised(self._stored(name, shape)))

    def of_experts(self, name: str, *shape: int) -> np.ndarray:
        """The wanted experts of a tensor [E, *shape], in a form that no scheme has: codes are refused unless
        they are dequantised."""
        dtypes = (*codes.FLOATS, *codes.CODES) if self._dequantize else codes.FLOATS
        stored = self._stored(name, (self.cfg.num_experts, *shape), self.share, dtypes=dtypes)
        return np.asarray(codes.dequantised(stored))

    def _stored(
        self,
        name: str,
        shape: tuple[int, ...],
        share: range | None = None,
        halves: int = 1,
        dtypes: tuple[str, ...] = (*codes.FLOATS, *codes.CODES),
    ) -> codes.Stored:
        """The tensor as it is, with its scales where it has any.

        Args:
          name: of the tensor.
          shape: which the tensor must have.
          share: the wanted part of its first dimension; None for all.
          halves: see ``codes.with_scales``.
          dtypes: which it may have.
        """
        value = self._take(name, shape, dtypes, share)
        dtype = codes.dtype_name(value)
        if dtype not in codes.CODES:
            return codes.Stored(value)
        scale_name = next((n for n in codes.scale_names(name) if n in self), None)
        if scale_name is None or value.ndim < 2:
            must = f"come with its scales, {' or '.join(map(repr, codes.scale_names(name)))}"
            raise ConfigError(rule(f"state_dict[{name!r}].dtype", dtype, must, "pass that tensor, too"))
        self._read.update({scale_name, *(n for n in codes.static_names(name) if n in self)})
        scales = self._tensors[scale_name]
        if share is not None and tuple(scales.shape[:1]) == shape[:1]:
            scales = scales[share.start : share.stop]
        stored = codes.with_scales(name, value, scale_name, scales, halves, self.cfg.expert_quant)
        return codes.Stored(codes.dequantised(stored, halves)) if self._dequantize else stored

    def transposed(self, name: str, rows: int, columns: int) -> np.ndarray:
        """[experts, rows, columns] of the tensor [E, columns, rows], or of its MXFP4 as on disk."""
        if name in self or f"{name}_blocks" not in self:
            return self.of_experts(name, columns, rows).swapaxes(1, 2)
        groups = columns // codes.MXFP4_GROUP
        if columns % codes.MXFP4_GROUP:
            raise ConfigError(
                f"state_dict has {name + '_blocks'!r}, which must have a multiple of {codes.MXFP4_GROUP} "
                f"columns, not {columns}; pass the model's own config"
            )
        shape = (self.cfg.num_experts, rows, groups)
        blocks = self._take(f"{name}_blocks", (*shape, codes.MXFP4_GROUP // 2), ("uint8",), self.share)
        scales = self._take(f"{name}_scales", shape, ("uint8",), self.share)
        return codes.mxfp4(np.asarray(blocks), np.asarray(scales))

    def _take(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], share: range | None = None
    ) -> np.ndarray | Tensor:
        """The tensor of that name, if it is what it must be, or a share of its first dimension."""
        if name not in self._tensors:
            raise ConfigError(
                f"state_dict lacks {name!r} of shape {shape}, which family={self._family!r} with this config "
                "needs; pass the names below one layer's MoE block, and a config that fits the model"
            )
        self._read.add(name)
        dtype = codes.dtype_name(self._tensors[name])
        if dtype not in dtypes:
            must = f"be {', '.join(dtypes[:-1])} or {dtypes[-1]}" if dtypes[1:] else f"be {dtypes[0]}"
            raise ConfigError(
                rule(f"state_dict[{name!r}].dtype", dtype, must, "dequantise the checkpoint first")
            )
        codes.check_has_values(f"state_dict[{name!r}]", self._tensors[name])
        value = codes.to_numpy(self._tensors[name])
        if value.shape != shape:
            raise ConfigError(
                rule(f"state_dict[{name!r}].shape", value.shape, f"be {shape}", "pass the model's own config")
            )
        return value if share is None else value[share.start : share.stop]

    def check_all_read(self, params: MoEParams) -> None:
        """Nothing may be left over, in the state dict or in the config's wishes."""
        left = sorted(set(self._tensors) - self._read)
        if left:
            raise ConfigError(
                f"state_dict has {left[:4]} ({len(left)} in all), which family={self._family!r} with this "
                "config does not read; pick the right family, set the config's biases and shared expert as "
                "the model has them, and drop what is not part of the block"
            )
        present = {
            "router_bias": (self.cfg.router_bias, params.router_bias),
            "score_bias": (self.cfg.score_bias, params.score_bias),
            "expert_bias": (self.cfg.expert_bias, params.b1),
            "shared_intermediate_size": (self.cfg.shared_intermediate_size, params.shared_w1),
            "shared_gate": (self.cfg.shared_gate, params.shared_gate),
        }
        for name, (wish, array) in present.items():
            if bool(wish) != (array is not None):
                must, cure = ("be unset", "drop it") if wish else ("be set", "set it in MoEConfig")
                raise ConfigError(rule(name, wish, f"{must} for family={self._family!r}", cure))

    def router(self, name: str) -> np.ndarray:
        return self.array(name, self.cfg.num_experts, self.cfg.hidden_size).T

    def experts(self, names: tuple[str, str, str] = GATE_UP_DOWN) -> dict[str, Any]:
        """w1 and w2, from the fused tensors or from ``experts.<i>.<name>.weight``: gate, up and down."""
        experts, hidden, inter = self.cfg.num_experts, self.cfg.hidden_size, self.cfg.intermediate_size
        if "experts.gate_up_proj" in self:
            w1 = self._stored("experts.gate_up_proj", (experts, 2 * inter, hidden), self.share, halves=2)
            w2 = self._stored("experts.down_proj", (experts, hidden, inter), self.share)
            return self._in_scheme(self._placed("w1", w1), self._placed("w2", w2))
        gate, up, down = names
        names1 = [[f"experts.{i}.{half}.weight" for half in (gate, up)] for i in self.share]
        names2 = [[f"experts.{i}.{down}.weight"] for i in self.share]
        w1 = self._joined(
            "w1", [[(name, self._stored(name, (inter, hidden))) for name in of] for of in names1]
        )
        w2 = self._joined(
            "w2", [[(name, self._stored(name, (hidden, inter))) for name in of] for of in names2]
        )
        return self._in_scheme(w1, w2)

    def _placed(self, field: str, stored: codes.Stored) -> codes.Stored:
        """The same in memory, read to where it is wanted if it is in a file."""
        if not isinstance(stored.values, Tensor):
            return stored
        result = self._new(field, stored.values.shape, stored.values.dtype)
        stored.values.read_into(result)
        return stored._replace(values=result)

    def _joined(self, field: str, parts: list[list[tuple[str, codes.Stored]]]) -> codes.Stored:
        """All experts' matrices, each of named parts, one below the other."""
        (first_name, first), *others = [part for of_expert in parts for part in of_expert]
        for name, part in others:
            if part.kind != first.kind:
                raise ConfigError(
                    f"state_dict has {_in_words(first)} in {first_name!r} and {_in_words(part)} in {name!r}, "
                    "and experts must be quantised alike; pass dequantize=True"
                )
        values = self._filled(field, [[part.values for _, part in of_expert] for of_expert in parts])
        if first.scales is None:
            return codes.Stored(values)
        scales = [[part.scales for _, part in of_expert if part.scales is not None] for of_expert in parts]
        return codes.Stored(values, self._filled(f"{field}_scale", scales), first.kind)

    def _filled(self, field: str, parts: list[list[Any]]) -> np.ndarray:
        """By hand, because a layer may take gigabytes, and np.stack of np.concatenate has it twice."""
        rows = sum(len(part) for part in parts[0])
        dtype = np.result_type(*{part.dtype for of_expert in parts for part in of_expert})
        result = self._new(field, (len(parts), rows, *parts[0][0].shape[1:]), dtype)
        for of_expert, target in zip(parts, result, strict=True):
            first = 0
            for part in of_expert:
                _copy(part, target[first : first + len(part)])
                first += len(part)
        return result

    def _new(self, field: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        room = None if self._room is None else self._room(field, shape, dtype)
        return np.empty(shape, dtype) if room is None else room

    def _in_scheme(self, w1: codes.Stored, w2: codes.Stored) -> dict[str, Any]:
        """The experts' fields of MoEParams; refuses codes that are not of the config's scheme."""
        if w1.kind != w2.kind:
            raise ConfigError(
                f"state_dict has {_in_words(w1)} for gate and up and {_in_words(w2)} for down, and experts "
                "must be quantised alike; pass dequantize=True"
            )
        if w1.scales is None or w2.scales is None or w1.kind is None:
            return {"w1": w1.values, "w2": w2.values}
        scheme, wish = codes.SCHEME.get(w1.kind), self.cfg.expert_quant
        if scheme is None:
            raise ConfigError(
                f"state_dict has experts of {_in_words(w1)}, which is none of the schemes "
                f"{tuple(codes.SCHEME.values())}; pass dequantize=True"
            )
        if wish != scheme:
            must = f"be {scheme!r}, for the experts of the state_dict are {_in_words(w1)}"
            cure = "set it so in MoEConfig, or pass dequantize=True to get them in bfloat16"
            raise ConfigError(rule("expert_quant", wish, must, cure))
        return {"w1": w1.values, "w1_scale": w1.scales, "w2": w2.values, "w2_scale": w2.scales}

    def score_bias(self, *names: str) -> dict[str, Any]:
        """The selection bias under the first name that is there; nothing when the config wants none."""
        if not self.cfg.score_bias:
            return {}
        name = next((n for n in names if n in self), names[0])
        # ERNIE keeps a leading dimension of 1.
        lead = (1,) if "moe_statics" in name else ()
        bias = self.array(name, *lead, self.cfg.num_experts)
        return {"score_bias": bias.reshape(-1).astype(np.float32)}

    def shared(self, name: str) -> dict[str, Any]:
        """The shared expert below ``name``; nothing when the config wants none."""
        inter, hidden = self.cfg.shared_intermediate_size, self.cfg.hidden_size
        if inter is None:
            return {}
        halves = [self.array(f"{name}.{half}.weight", inter, hidden) for half in GATE_UP_DOWN[:2]]
        down = self.array(f"{name}.down_proj.weight", hidden, inter)
        return {"shared_w1": np.concatenate(halves), "shared_w2": down}


def _copy(part: np.ndarray | Tensor, target: np.ndarray) -> None:
    if isinstance(part, Tensor) and part.dtype == target.dtype:
        part.read_into(target)
    else:
        target[...] = np.asarray(part)


def _in_words(stored: codes.Stored) -> str:
    if stored.kind is None:
        return stored.values.dtype.name
    return "{} with a scale for each {}".format(*stored.kind)
