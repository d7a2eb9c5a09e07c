"""Files that a command will write when it has measured: looked at before, for that takes its time."""

from __future__ import annotations

import os
from pathlib import Path

from jax_moriep.errors import ConfigError, rule


def check_file(option: str, path: Path) -> None:
    """Raises ConfigError unless a file can be written there.

    Args:
      option: of the command line, that named it.
      path: of the file; one that is there will be replaced.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(rule(option, str(path), "lie in an existing folder", "make the folder first"))
    if path.is_dir():
        raise ConfigError(rule(option, str(path), "be a file, and is a folder", "name a file in it"))
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigError(rule(option, str(path), "be a file that can be written", "name another"))
