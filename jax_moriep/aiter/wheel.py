"""Finds the code objects of the installed amd-aiter without importing it: its import needs torch.

Each kernel's file is compared with the one that was tested (``kernels``), so a version that still has that
file is as good as ``VERSION``.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path

from jax_moriep.errors import LibraryError, rule
from jax_moriep.runtime import settings

DISTRIBUTION = "amd-aiter"
VERSION = "0.1.7.post2.dev18"
INSTALL = f"run: pip install --no-deps {DISTRIBUTION}=={VERSION}"
# In the wheel, for the MI300 series.
CODE = Path("aiter_meta") / "hsa" / "gfx942"


@dataclasses.dataclass(frozen=True)
class Wheel:
    """An installed or unpacked amd-aiter.

    Attributes:
      folder: with the code objects for gfx942.
      version: of the distribution; "of unknown version" where nothing says it.
    """

    folder: Path
    version: str


def find() -> Wheel:
    """The amd-aiter to use: the one that ``JAX_MORIEP_AITER_DIR`` names, or else the installed one.

    Raises:
      LibraryError: there is none; the text has the cure.
    """
    named = settings.AITER_DIR.value()
    return _installed() if named is None else _named(named)


def unavailable_reason() -> str | None:
    """Why no amd-aiter can be used here, with the cure; None if one can."""
    try:
        find()
    except LibraryError as error:
        return str(error)
    return None


def _named(root: Path) -> Wheel:
    """The wheel in a folder that the user names: what it was unpacked into."""
    folder = root / CODE
    if not folder.is_dir():
        cure = f"name the folder into which a {DISTRIBUTION} wheel was unpacked, or unset the variable"
        raise LibraryError(rule(settings.AITER_DIR.name, str(root), f"hold the folder {CODE}", cure))
    for metadata in root.glob("amd_aiter-*.dist-info/METADATA"):
        if match := re.search(r"^Version: (\S+)$", metadata.read_text(), re.MULTILINE):
            return Wheel(folder, match[1])
    return Wheel(folder, "of unknown version")


def _installed() -> Wheel:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise LibraryError(f"amd-aiter is not installed; {INSTALL}") from error
    folder = Path(str(distribution.locate_file(CODE)))
    if not folder.is_dir():
        raise LibraryError(
            f"amd-aiter {distribution.version} must hold {folder}; it is no complete wheel: {INSTALL} "
            "--force-reinstall"
        )
    return Wheel(folder, distribution.version)
