"""Identities that say which derivatives there are: in reverse mode, of first order.

Whoever asks for another meets JAX's texts about custom calls and custom derivative rules otherwise, or, of
forward mode outside jit, an internal error after the compilation of everything.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_moriep.errors import ConfigError

_Tree = TypeVar("_Tree")

_FORWARD = (
    "{name} has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.linearize, jax.hessian), because an "
    "exchange has its transpose alone; use reverse mode: jax.grad, jax.vjp or jax.value_and_grad"
)
_SECOND = (
    "{name} has derivatives of first order only; use an estimate of the second that takes gradients as they "
    "are, such as differences of two gradients, or jax.lax.stop_gradient around the inner one"
)

_reverse_only = Primitive("moriep_reverse_only")
_tangent = Primitive("moriep_tangent")
_first_order = Primitive("moriep_first_order")


def _refuse(text: str) -> Any:
    def rule(*args: Any, name: str, **kwargs: Any) -> NoReturn:
        raise ConfigError(text.format(name=name))

    return rule


def _reverse_jvp(primals: Any, tangents: Any, *, name: str) -> Any:
    (x,), (t,) = primals, tangents
    # An integer's tangent is nothing, which needs no rule.
    if type(t) is not ad.Zero and getattr(t, "dtype", None) != jax.dtypes.float0:
        t = _tangent.bind(t, name=name)
    return _reverse_only.bind(x, name=name), t


for _primitive in (_reverse_only, _first_order):
    _primitive.def_impl(lambda x, *, name: x)
    mlir.register_lowering(_primitive, lambda ctx, x, *, name: [x])
    batching.defvectorized(_primitive)
for _primitive in (_reverse_only, _tangent, _first_order):
    _primitive.def_abstract_eval(lambda x, *, name: x)
ad.primitive_jvps[_reverse_only] = _reverse_jvp
ad.primitive_jvps[_first_order] = lambda primals, tangents, *, name: _refuse(_SECOND)(name=name)
# What the way back transposes is never run; what is run or compiled is forward mode.
ad.deflinear2(_tangent, lambda cotangent, x, *, name: [cotangent])
_tangent.def_impl(_refuse(_FORWARD))
mlir.register_lowering(_tangent, _refuse(_FORWARD))
batching.primitive_batchers[_tangent] = _refuse(_FORWARD)


def reverse_only(tree: _Tree, name: str) -> _Tree:
    """Gives arrays back; a forward-mode derivative by them is a ConfigError that names ``name``."""
    return jax.tree.map(functools.partial(_reverse_only.bind, name=name), tree)


def first_order(tree: _Tree, name: str) -> _Tree:
    """Gives arrays back; any derivative by them is a ConfigError that tells of first order."""
    return jax.tree.map(functools.partial(_first_order.bind, name=name), tree)
