"""The tensors of one MoE block as Hugging Face names them, put together from MoEParams."""

from __future__ import annotations

from typing import Any

import numpy as np

from jax_moriep.config import MoEConfig
from jax_moriep.quant import num_groups
from jax_moriep.weights.block import GATE_UP_DOWN

SCALES = {"fp8_block": "weight_scale_inv", "fp8_token": "weight_scale", "int8_token": "weight_scale"}
"""What stands beside a matrix of codes: as DeepSeek has it, and as compressed-tensors."""


class Written:
    """What has been written so far.

    Attributes:
      params: a MoEParams of NumPy, E experts, no padding.
      cfg: the layer.
      spelling: "memory" or "disk".
      tensors: by their name below the block; contiguous.
    """

    def __init__(self, params: Any, cfg: MoEConfig, spelling: str) -> None:
        self.params = params
        self.cfg = cfg
        self.spelling = spelling
        self.tensors: dict[str, np.ndarray] = {}

    def put(self, name: str, value: np.ndarray) -> None:
        """Adds a tensor."""
        self.tensors[name] = np.ascontiguousarray(value)

    def experts(self, names: tuple[str, str, str]) -> None:
        """w1 and w2: fused in memory; on disk a tensor for each expert's gate, up and down."""
        w1, w2, inter = self.params.w1, self.params.w2, self.cfg.intermediate_size
        if self.spelling == "memory":
            self.put("experts.gate_up_proj", w1)
            self.put("experts.down_proj", w2)
            return
        scales1, scales2 = self.params.w1_scale, self.params.w2_scale
        by_block = self.cfg.expert_quant == "fp8_block"
        scale_rows = num_groups(inter) if by_block else inter
        for i in range(self.cfg.num_experts):
            gate, up, down = (f"experts.{i}.{name}" for name in names)
            self.put(f"{gate}.weight", w1[i, :inter])
            self.put(f"{up}.weight", w1[i, inter:])
            self.put(f"{down}.weight", w2[i])
            if scales1 is None:
                continue
            for name, scales in (
                (gate, scales1[i, :scale_rows]),
                (up, scales1[i, scale_rows:]),
                (down, scales2[i]),
            ):
                scale = scales if by_block else scales[:, None]
                self.put(f"{name}.{SCALES[str(self.cfg.expert_quant)]}", scale)

    def score_bias(self, name: str) -> None:
        """The selection bias; ERNIE keeps a leading dimension of 1."""
        bias = self.params.score_bias
        self.put(name, bias[None] if "moe_statics" in name else bias)

    def shared(self, name: str) -> None:
        """The shared expert below ``name``."""
        w1 = self.params.shared_w1
        half = w1.shape[0] // 2
        for part, value in zip(GATE_UP_DOWN, (w1[:half], w1[half:], self.params.shared_w2), strict=True):
            self.put(f"{name}.{part}.weight", value)
