"""Programs: a function with the shapes that it takes, over a mesh or on one device, once or many times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_moriep.bench.measure.repeat import repeated


@dataclasses.dataclass(frozen=True)
class Work:
    """fn(*operands)."""

    fn: Callable[..., Any]
    operands: tuple[jax.Array, ...]


class Program:
    """A jitted function, compiled by a pool or at its first call.

    Args:
      jitted: what ``jax.jit`` gave.
      operands: arrays, or their shapes; arrays are not kept.
      alone: no other such program may be compiled meanwhile, because XLA tries matrix products on the device.
    """

    def __init__(self, jitted: Any, operands: Sequence[Any], alone: bool = False) -> None:
        def shape_of(x: Any) -> jax.ShapeDtypeStruct:
            sharding = x.sharding if isinstance(x, jax.Array) else None
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        self.alone = alone
        self._jitted = jitted
        self._shapes = jax.tree.map(shape_of, tuple(operands))
        self._lowered: Any = None
        self._compiled: Any = None

    def lower(self) -> None:
        """Traces the function; every process of a group must do so in the same order."""
        self._lowered = self._jitted.lower(*self._shapes)

    def compile(self) -> None:
        """Compiles the function, and traces it before if that has not been done; any thread may do it."""
        if self._lowered is None:
            self.lower()
        lowered, self._lowered = self._lowered, None
        assert lowered is not None
        self._compiled = lowered.compile()

    def begin(self, *operands: Any) -> Any:
        """The results, which may not be there yet."""
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        return self._compiled(*operands)

    def __call__(self, *operands: Any) -> Any:
        """The results, all there."""
        return jax.block_until_ready(self.begin(*operands))

    def temporaries(self) -> int | None:
        """Bytes that XLA gives it beside its operands and results; None where XLA does not say."""
        if self._compiled is None:
            self.compile()
        assert self._compiled is not None
        analysis = self._compiled.memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes

    def out_shapes(self) -> Any:
        """What the function gives, as shapes."""
        return jax.eval_shape(self._jitted, *self._shapes)


def on_device(
    fn: Callable[..., Any], operands: Sequence[Any], times: int = 1, *, alone: bool = False
) -> Program:
    """A program of one device.

    Args:
      fn: of arrays.
      operands: see ``Program``.
      times: how often the program does it; with more than once it gives a number without a meaning.
      alone: see ``Program``.
    """
    return Program(jax.jit(fn if times == 1 else repeated(fn, times)), operands, alone)


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
    inner = fn if repeats == 1 else repeated(fn, repeats)
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=split, out_specs=split)
    return over(mapped, mesh, operands, (split,) * len(operands), split, alone)
