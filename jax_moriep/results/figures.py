"""What the pictures of the bench and of the demo share: matplotlib, if it is there, and the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_moriep.errors import ConfigError, MoriepError, rule

COLORS = ("#2a6f97", "#e07a3f", "#6a994e", "#8f5aa8", "#7a7a7a", "#b5838d", "#16324f", "#b3401d")


def read(path: Path, format: str) -> dict[str, Any] | None:
    """A result that was written in a format; None if the file is none, whatever it is."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("format") == format else None


def new(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
      MoriepError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MoriepError(
            f"plot needs matplotlib, which cannot be imported ({e}); pip install 'jax-moriep[plot]' brings it"
        ) from e
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, out: Path) -> None:
    """Writes the picture; the file's ending tells the format.

    Raises:
      ConfigError: the file cannot be written.
    """
    cure = "name a file in an existing folder that ends in .png, .pdf or .svg"
    if not out.suffix:
        # matplotlib would add one, and nobody would say so.
        raise ConfigError(rule("--out", str(out), "have an ending that tells the format", cure))
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as e:
        raise ConfigError(rule("--out", str(out), "be writable as a picture", f"{cure} ({e})")) from e
