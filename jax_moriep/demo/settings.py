"""What the user of the demo chose, as its first process hands it to those that train."""

from __future__ import annotations

import dataclasses
import json

from jax_moriep.errors import ConfigError, rule

EVENT_MARK = "\x1emoriep "
"""Begins a line of JSON from process 0; all else that the processes write is talk of their libraries."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run of the demo.

    Raises:
      ConfigError: a number that must be positive is not.
    """

    ranks: int
    steps: int
    experts: int
    transport: str
    seed: int
    checkpoint_dir: str
    checkpoint_every: int
    resume: bool
    quant: str | None = None
    """How the experts are quantised, as ``MoEConfig.expert_quant`` has it."""
    dtype: str = "f32"
    """What the model computes in, "f32" or "bf16"; its weights are trained in float32."""
    platform: str = "cpu"
    """Value for JAX_PLATFORMS."""
    context: int = 128
    """Bytes in a window."""
    windows: int = 24
    """Windows in a step, over all ranks; rounded up to a multiple of the ranks."""
    learning_rate: float = 8e-3
    sample_bytes: int = 240
    """Length of the text that the trained model writes."""

    def __post_init__(self) -> None:
        for name in ("ranks", "steps", "experts", "windows", "sample_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(rule(name, getattr(self, name), "be at least 1", "pass a positive number"))

    def to_json(self) -> str:
        """The settings as one word of a command line."""
        return json.dumps(dataclasses.asdict(self))

    def numerics(self) -> str:
        """What the model computes in, in words."""
        return f"{self.quant} experts in {self.dtype}" if self.quant else self.dtype

    def identity(self) -> dict[str, object]:
        """What two runs must have in common for one to go on from the other's checkpoint."""
        shared = ("ranks", "experts", "quant", "dtype", "platform", "seed", "context", "windows")
        return {name: getattr(self, name) for name in shared}
