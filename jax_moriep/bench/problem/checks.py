"""A comparison of what was measured with what it must be, and which of them make a run a failed one."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_moriep.bench.problem.names import is_baseline


@dataclasses.dataclass(frozen=True)
class Check:
    """A comparison of a result with what it must be.

    Attributes:
      name: of the implementation.
      operation: that gave the result.
      what: was compared, such as "rows of rank 2".
      error: largest difference.
      limit: largest difference that is right.
    """

    name: str
    operation: str
    what: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the result is right; NaN is not."""
        return self.error <= self.limit


def failed_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks of a result that found something wrong, but not with a baseline."""
    return [check for check in result["checks"] if not (check["ok"] or is_baseline(check["name"]))]
