"""An identity that jax.vmap refuses, with a text that says what to do.

A batching rule is the one place where vmap shows itself however the call is wrapped (in jit, grad or a scan),
and ``jax.custom_batching`` cannot stand there because it has no reverse-mode derivative.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_moriep.errors import ConfigError

_Tree = TypeVar("_Tree")

_unbatched = Primitive("moriep_unbatched")
_unbatched.def_impl(lambda x, *, cure: x)
_unbatched.def_abstract_eval(lambda x, *, cure: x)
ad.deflinear2(_unbatched, lambda cotangent, x, *, cure: [cotangent])
mlir.register_lowering(_unbatched, lambda ctx, x, *, cure: [x])


def _refuse(operands: Any, dims: Any, *, cure: str) -> Any:
    raise ConfigError(cure)


batching.primitive_batchers[_unbatched] = _refuse


def unbatched(tree: _Tree, cure: str) -> _Tree:
    """Gives a tree of arrays back; if vmap batches any of them, raises ConfigError with the text ``cure``."""
    return jax.tree.map(functools.partial(_unbatched.bind, cure=cure), tree)
