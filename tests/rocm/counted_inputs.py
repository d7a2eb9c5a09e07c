"""The inputs of exchanges whose bytes are counted."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is exchanged, in bfloat16; ``blocks`` and ``waves`` are those of MORI's launches."""

    ranks: int = 4
    tokens: int = 64
    hidden: int = 512
    experts: int = 32
    top_k: int = 8
    words: int = 67  # as many as a layer's statistics have with 32 experts
    capacity_factor: float | None = None
    block: int | None = None
    blocks: int = 2
    waves: int = 4

    @property
    def local_experts(self) -> int:
        return self.experts // self.ranks

    @property
    def row_bytes(self) -> int:
        return 2 * self.hidden


@dataclasses.dataclass(frozen=True)
class Given:
    """What all ranks have: x bf16[R, T, H], ids i32[R, T, K], weights f32[R, T, K], words i32[R, W]."""

    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    words: np.ndarray

    @classmethod
    def draw(cls, sizes: Sizes, seed: int = 0) -> "Given":
        """Each token has top_k experts of its own; some of its routes lead nowhere."""
        rng = np.random.default_rng(seed)
        routes = (sizes.ranks, sizes.tokens)
        ids = np.argsort(rng.random((*routes, sizes.experts)), axis=-1)[..., : sizes.top_k].astype(np.int32)
        ids[rng.random(ids.shape) < 0.05] = -1
        return cls(
            rng.normal(size=(*routes, sizes.hidden)).astype(ml_dtypes.bfloat16),
            ids,
            rng.random(ids.shape, dtype=np.float32),
            rng.integers(-(2**31), 2**31, (sizes.ranks, sizes.words)).astype(np.int32),
        )

    def save(self, path: Path) -> Path:
        # As bits, for NumPy's files know no bfloat16.
        np.savez(path, x=self.x.view(np.uint16), ids=self.ids, weights=self.weights, words=self.words)
        return path

    @classmethod
    def load(cls, path: str) -> "Given":
        found = np.load(path)
        return cls(
            found["x"].view(ml_dtypes.bfloat16), *(found[name] for name in ("ids", "weights", "words"))
        )
