"""Programs over the mesh: compiled ahead, several at a time, and repeated on the devices."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_moriep.bench.measure import turns
from jax_moriep.runtime import compat

_COMPILERS = 8
_ERROR_CHARACTERS = 1500


class Program:
    """A jitted function, compiled by ``prepare`` or at its first call.

    Args:
      jitted: what ``jax.jit`` gave.
      operands: arrays, or their shapes.
      alone: nothing else may be compiled meanwhile, because XLA tries matrix products on the device.
    """

    def __init__(self, jitted: Any, operands: tuple[Any, ...], alone: bool = False) -> None:
        def shape_of(x: Any) -> jax.ShapeDtypeStruct:
            sharding = x.sharding if isinstance(x, jax.Array) else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        self.alone = alone
        self._jitted = jitted
        self._shapes = jax.tree.map(shape_of, operands)
        self._lowered: Any = None
        self._compiled: Any = None

    def lower(self) -> None:
        """Traces the function; every process must do so in the same order."""
        self._lowered = self._jitted.lower(*self._shapes)

    def compile(self) -> None:
        """Compiles what was traced; any thread may do it."""
        self._compiled, self._lowered = self._lowered.compile(), None

    def __call__(self, *operands: Any) -> Any:
        """The results, all there."""
        if self._compiled is None:
            self.lower()
            self.compile()
        assert self._compiled is not None
        return jax.block_until_ready(self._compiled(*operands))

    def out_shapes(self) -> Any:
        """What the function gives, as shapes."""
        return jax.eval_shape(self._jitted, *self._shapes)


def over(
    fn: Callable[..., Any],
    mesh: Mesh,
    operands: tuple[Any, ...],
    in_specs: Any,
    out_specs: Any,
    alone: bool = False,
) -> Program:
    """A program of whole arrays over the mesh.

    Args:
      fn: of arrays.
      mesh: of its devices.
      operands: see ``Program``.
      in_specs: a prefix of ``operands``.
      out_specs: a prefix of the results.
      alone: see ``Program``.
    """

    def shardings(specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
        )

    jitted = jax.jit(fn, in_shardings=shardings(in_specs), out_shardings=shardings(out_specs))
    return Program(jitted, operands, alone)


def local(
    fn: Callable[..., Any],
    mesh: Mesh,
    operands: tuple[Any, ...],
    axis: str,
    repeats: int = 1,
    alone: bool = False,
) -> Program:
    """A program whose ``fn`` sees one rank's part of all operands, which are split along their first axis.

    Args:
      fn: of arrays.
      mesh: of one axis.
      operands: see ``Program``.
      axis: of the mesh.
      repeats: how often the program does it; with more than once it gives a number without a meaning.
      alone: see ``Program``.
    """
    split = PartitionSpec(axis)
    inner = fn if repeats == 1 else turns.repeated(fn, repeats)
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=split, out_specs=split)
    return over(mapped, mesh, operands, (split,) * len(operands), split, alone)


def repeated_over(
    fn: Callable[..., Any], times: int, mesh: Mesh, axis: str, out_specs: Any
) -> Callable[..., jax.Array]:
    """``turns.repeated`` for a function of whole arrays, one that opens a ``shard_map`` of its own.

    Args:
      fn: of arrays over the mesh, the first of which is split along ``axis``.
      times: how often.
      mesh: of one axis.
      axis: of the mesh.
      out_specs: of the results of ``fn``, as a prefix.

    Returns:
      run(*operands) -> f32[R], numbers without a meaning.
    """

    def peek(results: Any) -> jax.Array:
        # Each rank reads of its own part, so that the reading moves nothing between ranks.
        first = [leaf.reshape(-1)[:1].astype(jnp.float32) for leaf in jax.tree.leaves(results) if leaf.size]
        return compat.pcast_varying(sum(first, jnp.zeros(1, jnp.float32)), frozenset({axis}))

    split = PartitionSpec(axis)
    look = jax.shard_map(peek, mesh=mesh, in_specs=(out_specs,), out_specs=split)

    follow = jax.shard_map(turns.nudged, mesh=mesh, in_specs=(split, split), out_specs=split)

    def run(*operands: Any) -> jax.Array:
        def once(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            seen, x = carry
            x = x if turns.barriers_hold() else follow(x, seen)
            held, before = lax.optimization_barrier(((x, *operands[1:]), seen))
            return turns.behind(before, look(lax.optimization_barrier(fn(*held)))), x

        start = jnp.zeros(mesh.size, jnp.float32)
        start = lax.with_sharding_constraint(start, NamedSharding(mesh, split))
        return lax.fori_loop(0, times, once, (start, operands[0]))[0]

    return run


def prepare(groups: Sequence[Sequence[Program]]) -> list[str | None]:
    """Compiles programs, some at a time.

    Args:
      groups: programs that are of use together only.

    Returns:
      For each group None, or the text of the error that one of its programs met.
    """
    workers = max(1, min(_COMPILERS, len(os.sched_getaffinity(0)) // 2))
    errors: list[str | None] = [None] * len(groups)
    jobs: list[tuple[int, concurrent.futures.Future[None]]] = []
    last: list[tuple[int, Program]] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for i, group in enumerate(groups):
            try:
                for program in group:
                    program.lower()
                    if program.alone:
                        last.append((i, program))
                    else:
                        jobs.append((i, pool.submit(program.compile)))
            except Exception as e:  # noqa: BLE001 - recorded, and the others go on
                errors[i] = describe(e)
    # The pool is through by now.
    for i, job in jobs:
        error = job.exception()
        if error is not None:
            errors[i] = errors[i] or describe(error)
    for i, program in last:
        try:
            program.compile()
        except Exception as e:  # noqa: BLE001 - as above
            errors[i] = errors[i] or describe(e)
    return errors


def describe(error: BaseException) -> str:
    """An error in one paragraph: some of XLA's have pages."""
    return f"{type(error).__name__}: {(str(error).strip() or repr(error))[:_ERROR_CHARACTERS]}"
