"""Weights of published models: MoE blocks as Hugging Face names them, in and out.

``load`` reads a checkpoint's layers from disk, each process its own experts. ``from_hf`` takes one layer's
tensors in both spellings of transformers 5.24: that in memory (one tensor for all experts), and that of
checkpoints on disk (mostly one tensor per expert), also where the weights are quantised. ``to_hf`` is its way
back.

| file | |
|---|---|
| `checkpoint.py` | ``load`` and ``moe_layers`` |
| `files.py`, `shards.py` | its files, and the part that this process holds |
| `reader.py`, `block.py` | ``from_hf``, and the tensors of one layer's block |
| `writer.py`, `written.py` | ``to_hf``, and the same on the way back |
| `families.py`, `codes.py` | what models call their tensors, and how quantised ones are kept |
"""

from jax_moriep.weights.checkpoint import load, moe_layers
from jax_moriep.weights.families import FAMILIES
from jax_moriep.weights.reader import from_hf
from jax_moriep.weights.writer import to_hf

__all__ = ["FAMILIES", "from_hf", "load", "moe_layers", "to_hf"]
