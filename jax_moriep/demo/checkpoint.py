"""The demo's checkpoints, by orbax: each process writes the experts that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from jax_moriep.demo.settings import Settings
from jax_moriep.errors import ConfigError, rule

_State = TypeVar("_State")


class Checkpoints:
    """The checkpoints of one run in one folder, of which the last two are kept.

    Args:
      settings: of this run.
    """

    def __init__(self, settings: Settings) -> None:
        self._identity = settings.identity()
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(settings.checkpoint_dir).absolute(), options=options)

    def save(self, step: int, state: Any, history: dict[str, Any]) -> None:
        """Saves the state after ``step`` steps, and what was measured up to there; every process calls it."""
        run = {"identity": self._identity, "history": history}
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
        )

    def restore(self, like: _State) -> tuple[int, _State, dict[str, Any]]:
        """Reads the newest checkpoint.

        Args:
          like: a state with the shapes, dtypes and shardings to restore.

        Returns:
          The number of steps that were done, the state, and what was measured.

        Raises:
          ConfigError: it is of a run with other settings.
        """
        step = self._manager.latest_step()
        assert step is not None, "the demo's first process looked for one"
        found = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        for name, value in self._identity.items():
            # A checkpoint of an earlier version lacks what there was no choice about.
            there = found["identity"].get(name)
            if there != value:
                raise ConfigError(
                    rule(
                        name,
                        value,
                        f"be {there!r} as in the checkpoint",
                        "run without --resume",
                    )
                )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        state = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        return step, state, found["history"]

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.close()
