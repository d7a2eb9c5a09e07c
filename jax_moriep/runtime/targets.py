"""The custom-call targets: their registration and the only use of ``jax.ffi.ffi_call``.

One target name serves every platform, so a lowered module is portable and a platform without a library
fails when it compiles, not silently.
"""

from __future__ import annotations

import threading
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.runtime import compat, library

DISPATCH = "moriep_dispatch"
REPLAY = "moriep_replay"
COMBINE = "moriep_combine"
EXPAND = "moriep_expand"
REEXPAND = "moriep_reexpand"
GATHER = "moriep_gather"
SEND = "moriep_send"
RESEND = "moriep_resend"
GIVE_BACK = "moriep_give_back"
DLPACK_CALL = "moriep_dlpack_call"
AITER_EXPERTS = "moriep_aiter_experts"
FUSED_EXPERTS = "moriep_fused_experts"

_ROW_MAJOR = {DISPATCH: "MoriepDispatch", REPLAY: "MoriepReplay", COMBINE: "MoriepCombine"}
_TOKEN_MAJOR = {
    SEND: "MoriepSend",
    RESEND: "MoriepResend",
    GIVE_BACK: "MoriepGiveBack",
    FUSED_EXPERTS: "MoriepFusedExperts",
}
_SYMBOLS = {"cpu": _ROW_MAJOR, "cuda": _ROW_MAJOR, "rocm": _ROW_MAJOR, "mori": _TOKEN_MAJOR}
_EXPAND_SYMBOLS = {EXPAND: "MoriepExpand", REEXPAND: "MoriepReexpand", GATHER: "MoriepGather"}
_AITER_SYMBOLS = {AITER_EXPERTS: "MoriepAiterExperts"}
# As XLA spells its platforms: another spelling is accepted, and never used.
_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA", "rocm": "ROCM", "mori": "ROCM"}
_INTEROP_SYMBOLS = {"cpu": "MoriepDlpackCpu", "CUDA": "MoriepDlpackCuda", "ROCM": "MoriepDlpackRocm"}
_registered: set[str] = set()
_lock = threading.Lock()


def register(backend: str) -> None:
    """Registers a backend's handlers with XLA, once.

    Args:
      backend: "cpu", "cuda", "rocm" or "mori".

    Raises:
      LibraryError: the library is missing or does not fit.
    """
    _register(backend, backend, _SYMBOLS[backend])


def register_expand(backend: str) -> None:
    """Registers a GPU backend's handlers of the adapter between token-major and row-major, once.

    Args:
      backend: "cuda" or "rocm".

    Raises:
      LibraryError: the library is missing or does not fit.
    """
    _register(f"{backend} expand", backend, _EXPAND_SYMBOLS)


def register_aiter(backend: str) -> None:
    """Registers the handlers that run AITER's kernels, once.

    Args:
      backend: the library that has them, "rocm".

    Raises:
      LibraryError: the library is missing or does not fit.
    """
    _register(f"{backend} aiter", backend, _AITER_SYMBOLS)


def _register(name: str, backend: str, symbols: dict[str, str]) -> None:
    with _lock:
        if name in _registered:
            return
        lib = library.load(backend)
        for target, symbol in symbols.items():
            capsule = jax.ffi.pycapsule(getattr(lib, symbol))
            jax.ffi.register_ffi_target(target, capsule, platform=_PLATFORMS[backend])
        _registered.add(name)


def register_interop() -> None:
    """Registers the interop library's handlers with XLA, once: one library for every platform.

    jax keeps a handler of a platform that is not there until its plugin is loaded.

    Raises:
      LibraryError: the library is missing or does not fit.
    """
    with _lock:
        if "interop" in _registered:
            return
        lib = library.load("interop")
        for platform, symbol in _INTEROP_SYMBOLS.items():
            jax.ffi.register_ffi_target(
                DLPACK_CALL, jax.ffi.pycapsule(getattr(lib, symbol)), platform=platform
            )
        _registered.add("interop")


def own_rank(ep_axis: str, like: jax.Array) -> jax.Array:
    """This device's rank i32[1] as data, varying as ``like`` does.

    The module is the same on all ranks, so the rank is no attribute, and the handler checks its table by it.
    """
    rank = lax.axis_index(ep_axis).astype(jnp.int32).reshape(1)
    return compat.pcast_varying(rank, compat.varying_axes(like))


def call(
    target: str, results: tuple[Any, ...], *operands: jax.Array, attributes: tuple[tuple[str, int | str], ...]
) -> tuple[jax.Array, ...]:
    """Emits a custom call.

    It has no side effect in JAX's sense: the order keeps calls in order and alive, and an effect would
    forbid ``jax.checkpoint``. vmap over it is an error, because a batched exchange is another exchange.

    Args:
      target: one of the names above.
      results: the result types, from ``compat.result_type``.
      *operands: the operands.
      attributes: (name, int or str) each, so that C++ decodes int64 and string_view.

    Returns:
      The results.
    """
    return tuple(jax.ffi.ffi_call(target, results, has_side_effect=False)(*operands, **dict(attributes)))


def call_function(name: str, results: tuple[Any, ...], *operands: jax.Array) -> tuple[jax.Array, ...]:
    """Emits the custom call that runs a registered Python function.

    It has no side effect either: the function must be pure.

    Args:
      name: of the function, from ``interop.registry``.
      results: the result types, from ``compat.result_type``.
      *operands: the operands.

    Returns:
      The results.
    """
    return tuple(jax.ffi.ffi_call(DLPACK_CALL, results, has_side_effect=False)(*operands, function=name))
