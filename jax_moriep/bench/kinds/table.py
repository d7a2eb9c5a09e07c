"""The table of kinds: the one place that names them all."""

from __future__ import annotations

from typing import Any

from jax_moriep.bench.kinds.decode import Decode
from jax_moriep.bench.kinds.exchange import Exchange
from jax_moriep.bench.kinds.experts import Experts
from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.kinds.layer import Layer
from jax_moriep.bench.kinds.link import Link
from jax_moriep.bench.kinds.route import Route
from jax_moriep.bench.kinds.train import Train
from jax_moriep.bench.problem.cases import Case

_ALL: tuple[Kind, ...] = (Exchange(), Experts(), Layer(), Decode(), Link(), Train(), Route())
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}


def new_case(kind: str, **fields: Any) -> Case:
    """A case that its kind takes; without ``compare`` it compares what the kind does unless told otherwise.

    Raises:
      ConfigError: a value breaks a rule of all kinds, or one of this kind's.
    """
    of_kind = KINDS[kind]
    case = Case(kind, **{**fields, "compare": fields.get("compare") or of_kind.compared})
    of_kind.check(case)
    return case


def transports_of(case: Case) -> tuple[str, ...]:
    """The transports that a case compares."""
    return KINDS[case.kind].transports(case)


def title_of(case: Case) -> str:
    """One line that names a case."""
    return KINDS[case.kind].title(case)
