"""Calls of programs over the mesh, which do the work once or, for its time alone, as often as a case says."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import PartitionSpec

from jax_moriep.bench.measure import programs
from jax_moriep.bench.measure.programs import Program
from jax_moriep.bench.measure.repeat import repeated_over
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.names import OTHERS
from jax_moriep.bench.problem.world import AXIS, World


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a call is of.

    Attributes:
      name: of the implementation.
      operation: what it does.
      case: the case; ``repeats`` counts.
      world: the world.
    """

    name: str
    operation: str
    case: Case
    world: World


def local_call(
    entry: Entry,
    fn: Callable[..., Any],
    shapes: tuple[Any, ...],
    operands: Callable[[], tuple[Any, ...]],
    check: Callable[[Any], list[Check]] | None = None,
    others: tuple[Program, ...] = (),
    alone: bool = False,
    how: str = "",
) -> Call:
    """A call of a function of one rank's part.

    Args:
      entry: what it is of.
      fn: see ``programs.local``.
      shapes: of the operands; the operands themselves will do.
      operands: gives them.
      check: of what ``fn`` gives over the mesh; None if nothing is to be checked.
      others: programs that the operands need.
      alone: see ``Program``.
      how: see ``Call``.
    """
    mesh, repeats = entry.world.mesh, entry.case.repeats
    many = programs.local(fn, mesh, shapes, AXIS, repeats, alone)
    needed, once = (many,), None
    if repeats > 1 and check is not None:
        single = programs.local(fn, mesh, shapes, AXIS)
        needed, once = (many, single), lambda: single(*operands())
    return Call(
        entry.name,
        entry.operation,
        lambda: many(*operands()),
        check or (lambda result: []),
        repeats,
        once,
        (*others, *needed),
        lambda: how,
    )


def mesh_call(
    entry: Entry,
    work: Callable[..., Any],
    inputs: tuple[Any, ...],
    specs: tuple[Any, Any],
    check: Callable[[Any], list[Check]],
    layers: int = 1,
) -> Call:
    """A call of a function of whole arrays that opens a ``shard_map`` of its own.

    Args:
      entry: what it is of.
      work: the function.
      inputs: its operands.
      specs: of the inputs and of the results, each as a prefix.
      check: of what ``work`` gives.
      layers: that it works through; a time is that of one.
    """
    mesh, repeats, alone = entry.world.mesh, entry.case.repeats, entry.name in OTHERS
    in_specs, out_specs = specs
    once = programs.over(work, mesh, inputs, in_specs, out_specs, alone)
    many, needed = once, (once,)
    if repeats > 1:
        repeated = repeated_over(work, repeats, mesh, AXIS, out_specs)
        many = programs.over(repeated, mesh, inputs, in_specs, PartitionSpec(AXIS), alone)
        needed = (many, once)
    return Call(
        entry.name,
        entry.operation,
        functools.partial(many, *inputs),
        check,
        repeats * layers,
        None if many is once else functools.partial(once, *inputs),
        needed,
        memory=once.temporaries,
    )
