"""Models and machines that ``bench plan`` knows by name."""

from __future__ import annotations

import dataclasses

from jax_moriep.config import MoEConfig


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's MoE layers: their number and their config."""

    layers: int
    cfg: MoEConfig


MODELS = {
    "deepseek-v3": Model(
        58,
        MoEConfig(
            *(256, 8, 7168, 2048),
            router="deepseek_v3",
            score_bias=True,
            num_groups=8,
            top_groups=4,
            shared_intermediate_size=2048,
        ),
    ),
    "mixtral-8x7b": Model(32, MoEConfig(8, 2, 4096, 14336)),
    "qwen3-30b-a3b": Model(48, MoEConfig(128, 8, 2048, 768)),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds of one rank: bytes per second in each direction inside a node and between nodes, and FLOP/s."""

    inside: float
    between: float
    flops: float


MACHINES = {
    # AMD's data sheet of the MI300X: seven links of 128 GB/s, both ways together; bf16 without sparsity.
    "mi300x": Machine(7 * 64e9, 400e9 / 8, 1307e12),
    # NVIDIA's data sheet of the H100 SXM: NVLink 900 GB/s, both ways together; bf16 without sparsity.
    "h100": Machine(450e9, 400e9 / 8, 989e12),
}
"""Peaks of public data sheets, and a network of 400 Gbit/s for each rank."""
