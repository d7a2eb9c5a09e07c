"""The demo's text: the source of Python's own standard library, as bytes.

Every machine that can run the demo has it. The selection and the split depend on nothing but the names of the
files, so two machines with the same Python train and measure on the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np

from jax_moriep.errors import ConfigError

VOCABULARY = 256
END_OF_FILE = 0
"""The byte after every file; source text has no other use for it."""
_HELD_OUT_PART = 12
"""One file in so many is held out."""
_LEAST_BYTES = 1 << 20
# Installed packages, tests, and tables that programs wrote.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text, u8, split by whole files; each file ends with ``END_OF_FILE``."""

    train: np.ndarray
    heldout: np.ndarray
    num_train_files: int
    num_heldout_files: int


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads all Python files below a folder, in the order of their paths.

    Args:
      root: the folder; None is the standard library of this Python.

    Raises:
      ConfigError: there is too little text to train on.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _SKIPPED.intersection(name.parts):
            parts[_is_held_out(name.as_posix())].append(path.read_bytes() + bytes([END_OF_FILE]))
    train, heldout = (np.frombuffer(b"".join(parts[key]), np.uint8) for key in (False, True))
    if len(train) < _LEAST_BYTES or not len(heldout):
        raise ConfigError(
            f"the Python files below {root} hold {len(train)} bytes to train on and {len(heldout)} held out, "
            f"and the demo needs {_LEAST_BYTES}; use a Python that comes with the source of its library"
        )
    return Corpus(train, heldout, len(parts[False]), len(parts[True]))


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % _HELD_OUT_PART == 0


def train_windows(text: np.ndarray, seed: int, step: int, count: int, length: int) -> np.ndarray:
    """The windows of one step, u8[count, length + 1], at random places: the last byte is only predicted.

    They depend on seed and step alone, so a run that goes on from a checkpoint sees what it would have seen.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(text) - length, count)
    return text[starts[:, None] + np.arange(length + 1)]


def heldout_windows(text: np.ndarray, count: int, length: int) -> np.ndarray:
    """Windows spread evenly over a text, u8[count, length + 1]."""
    starts = np.linspace(0, len(text) - length - 1, count).astype(np.int64)
    return text[starts[:, None] + np.arange(length + 1)]


def byte_frequency_loss(train: np.ndarray, targets: np.ndarray) -> float:
    """Mean loss in nats on ``targets`` of a model that knows only how often each byte occurs in ``train``."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[targets].mean())


def bits(nats: float) -> float:
    """Nats per byte as bits per byte."""
    return nats / math.log(2)
