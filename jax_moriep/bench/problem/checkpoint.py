"""The synthetic checkpoint of ``bench load``: a Qwen3-MoE model's MoE blocks in bfloat16, in several files.

The bits of every matrix are one random pattern, changed by a number of the matrix's own, so that any of them
can be made anew and compared, and none can be taken for another.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_moriep.hf_config import FILE
from jax_moriep.weights.files import INDEX

PREFIX = "model.layers.{}.mlp."
MATRICES = ("gate_proj", "up_proj", "down_proj")
_ROUTER = "gate.weight"
_OWN_NUMBER = 40503
"""Odd, so that multiples of it modulo 2^16 differ."""


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of the model; those of the experts are as in ``MoEConfig``."""

    num_layers: int
    num_experts: int
    hidden: int
    intermediate: int
    layers_per_file: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer."""
        return len(MATRICES) * self.hidden * self.intermediate * 2

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "model_type": "qwen3_moe",
            "num_experts": self.num_experts,
            "num_experts_per_tok": min(8, self.num_experts),
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "norm_topk_prob": True,
        }

    def name(self, layer: int, expert: int, matrix: str) -> str:
        """The whole name of an expert's tensor."""
        return f"{PREFIX.format(layer)}experts.{expert}.{matrix}.weight"

    def bits(self, layer: int, expert: int, matrix: str) -> np.ndarray:
        """u16[rows, columns], the bits of a matrix."""
        number = (layer * self.num_experts + expert) * len(MATRICES) + MATRICES.index(matrix)
        shape = (
            (self.hidden, self.intermediate) if matrix == "down_proj" else (self.intermediate, self.hidden)
        )
        return (_pattern(self.hidden * self.intermediate) ^ np.uint16(number * _OWN_NUMBER % 65536)).reshape(
            shape
        )

    def router_bits(self, layer: int) -> np.ndarray:
        """u16[E, H]"""
        return np.full((self.num_experts, self.hidden), 16000 + layer, np.uint16)

    def write(self, folder: Path) -> None:
        """Writes the checkpoint."""
        (folder / FILE).write_text(json.dumps(self.config))
        weight_map: dict[str, str] = {}
        for first in range(0, self.num_layers, self.layers_per_file):
            layers = range(first, min(first + self.layers_per_file, self.num_layers))
            file = f"model-{first:05}.safetensors"
            weight_map |= dict.fromkeys(_write_file(folder / file, [*self._tensors(layers)]), file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))

    def _tensors(self, layers: range) -> Iterator[tuple[str, tuple[int, ...], Any]]:
        """The name, the shape, and a function that gives the bits, of each tensor of some layers."""
        for layer in layers:
            yield (
                PREFIX.format(layer) + _ROUTER,
                (self.num_experts, self.hidden),
                functools.partial(self.router_bits, layer),
            )
            for expert in range(self.num_experts):
                for matrix in MATRICES:
                    shape = (self.intermediate, self.hidden)
                    yield (
                        self.name(layer, expert, matrix),
                        shape[::-1] if matrix == "down_proj" else shape,
                        functools.partial(self.bits, layer, expert, matrix),
                    )


@functools.lru_cache(maxsize=1)
def _pattern(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, count, np.uint16)


def _write_file(path: Path, tensors: list[tuple[str, tuple[int, ...], Any]]) -> list[str]:
    """Writes one safetensors file of bfloat16 and gives the names in it."""
    header, end = {}, 0
    for name, shape, _ in tensors:
        first, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, bits in tensors:
            file.write(bits().tobytes())
    return list(header)
