"""What a number was measured on and with, which a result keeps beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from jax_moriep.version import __version__


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    installed = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"jax_moriep": __version__, "python": platform.python_version(), **installed}


def machine() -> dict[str, Any]:
    """What this is run on; GPUs are the processes' matter."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = named[0] if named else model
    system = f"{platform.system()} {platform.machine()}"
    return {"cores": len(os.sched_getaffinity(0)), "processor": model, "system": system}
