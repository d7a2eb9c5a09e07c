"""The faces of the kinds: ``Kind`` of those that have cases, ``Study`` of those that are one run each.

A ``Kind`` says what it can compare, its rules, its data and its programs, each with the check of its result;
the rooms above start its processes and show what they found. A ``Study`` is asked and gives a result.
``load`` is between them: it has calls as a kind has, but of a checkpoint and not of a case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import transport_of
from jax_moriep.bench.problem.traffic import Traffic
from jax_moriep.bench.problem.world import World
from jax_moriep.config import TRANSPORTS
from jax_moriep.errors import ConfigError, rule

Asked = TypeVar("Asked", contravariant=True)


@runtime_checkable
class Study(Protocol[Asked]):
    """A kind without cases: it measures in this process or computes, and checks what it measured.

    A module that has an ``Asked``, which refuses what breaks a rule, and this function is one.
    """

    def run(
        self, asked: Asked, say: Callable[[str], None], save: Callable[[dict[str, Any]], None], /
    ) -> dict[str, Any]:
        """Does what is asked.

        Args:
          asked: an ``Asked`` of the module.
          say: takes lines that tell how it goes.
          save: takes the result as far as it is, at least when it is whole.

        Returns:
          A JSON-able dict.
        """
        ...


class Kind(Protocol):
    """What one kind of case is. A subclass gives the first six attributes and the first two methods.

    ``run`` starts processes and has each of them call ``make_data`` and ``calls``; ``show`` asks how to name
    a case and how to count its bytes. Neither knows one kind from another.

    Attributes:
      name: on the command line and in results.
      operations: what is timed, in this order; a case may have some of them, or others like them.
      comparable: names of all implementations.
      compared: those that are compared unless told otherwise.
      iterations: timed ones and those before them, unless told otherwise.
      repeats_on_gpus: how often one program does the work there, so that its start is paid once for all.
      memory_operation: the operation whose memory is measured; "" where none is.
      compared_on_gpus: as ``compared``; () for the same ones.
      has_layers: a case may have several.
      fills_arenas: its steps need room in the transports' buffers.
      compare_options: of the command line, for ``compare``.
      tokens_unless_told: for the command line's help.
    """

    name: str
    operations: tuple[str, ...]
    comparable: tuple[str, ...]
    compared: tuple[str, ...]
    iterations: tuple[int, int]
    repeats_on_gpus: int
    memory_operation: str = ""
    compared_on_gpus: tuple[str, ...] = ()
    has_layers: bool = False
    fills_arenas: bool = True
    compare_options: tuple[str, ...] = ("--compare",)
    tokens_unless_told: str = "1024"

    def make_data(self, case: Case, world: World) -> Any:
        """The data of a case, on the devices."""
        ...

    def calls(self, case: Case, world: World, data: Any) -> list[Call]:
        """The programs of a case: each with its name, its operation, and the oracle's check of its result."""
        ...

    def check(self, case: Case) -> None:
        """Refuses a case by the kind's rules; ``problem.cases`` has those of all kinds.

        Raises:
          ConfigError: a value breaks a rule.
        """
        if case.layers > 1 and not self.has_layers:
            cure = "add --phase decode or leave out --layers"
            raise ConfigError(rule("layers", case.layers, "be 1 but for decoding", cure))
        for name in case.compare:
            if name not in self.comparable:
                raise ConfigError(rule("compare", name, f"be one of {self.comparable}", "pick some of these"))

    def title(self, case: Case) -> str:
        """One line that names a case."""
        processes = f"{case.processes} process{'es' if case.processes > 1 else ''}"
        return (
            f"{case.kind}: {self.sizes(case)} E={case.experts} K={case.top_k} {case.dtype}, {case.routing} "
            f"routing, {case.ranks} ranks in {processes}"
        )

    def sizes(self, case: Case) -> str:
        """The part of the title that the kinds differ in."""
        return f"T={case.tokens} H={case.hidden} I={case.intermediate}"

    def transports(self, case: Case) -> tuple[str, ...]:
        """Those that are compared, whatever they are joined with."""
        names = [transport_of(name).split("+")[0] for name in case.compare]
        return tuple(dict.fromkeys(name for name in names if name in TRANSPORTS))

    def traffic(self, case: Case) -> Traffic | None:
        """The bytes of one dispatch; None where there is no exchange to be timed alone."""
        del case
        return None

    def times_moved(self, case: Case, name: str, operation: str) -> float:
        """How often an implementation's operation moves the bytes of ``traffic``."""
        del case, name, operation
        return 1.0

    def beside(self, ranks: int, on_gpus: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of a case of the command line: its floors, and what others have made that is compared as well."""
        del ranks, on_gpus
        return (), ()

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Adds options that no other kind has."""
        del parser

    def of_options(self, args: argparse.Namespace, fields: dict[str, Any]) -> None:
        """Fills in fields of a case of the command line; those whose options were given are there.

        Args:
          args: the command line's.
          fields: of the case, without its kind and its floors; changed in place.

        Raises:
          ConfigError: an option breaks its rule.
        """
        del args, fields
