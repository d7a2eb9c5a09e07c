"""Reads the golden files that the scripts in tests/golden have made."""

import json
import pathlib

import numpy as np

from jax_moriep.config import MoEConfig, MoEParams

FOLDER = pathlib.Path(__file__).parents[1] / "golden"
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.npz") if path.stem not in ("spellings", "quantised", "checkpoints")
)


class Golden:
    """One file: its arrays by name, its config, and its weights and gradients as MoEParams."""

    def __init__(self, name: str):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.cfg = MoEConfig(**json.loads(str(self.arrays["cfg"])))
        self.family = str(self.arrays["family"])
        self.params = MoEParams(**{"router": None, "w1": None, "w2": None, **self.part("param.")})
        self.grads = MoEParams(**{"router": None, "w1": None, "w2": None, **self.part("grad.", but="x")})

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def part(self, prefix: str, but: str = "") -> dict[str, np.ndarray]:
        """The arrays whose name starts with the prefix, by the rest of their name."""
        found = {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}
        found.pop(but, None)
        return found


def write_checkpoint(arrays: dict[str, np.ndarray], folder: pathlib.Path) -> pathlib.Path:
    """Writes the files of a model of ``checkpoints.npz`` to a folder."""
    for key, value in arrays.items():
        if key.startswith("file/"):
            (folder / key.removeprefix("file/")).write_bytes(value.tobytes())
    return folder


def by_model(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a file of many models by model, then by the rest of their name."""
    models: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for key in file.files:
            model, rest = key.split("/", 1)
            models.setdefault(model, {})[rest] = file[key]
    return models
