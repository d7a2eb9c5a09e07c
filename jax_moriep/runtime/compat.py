"""The only module that depends on the jax version: everything that jax renamed, hid or has not settled.

Runs on jax 0.10.2 and on the newest release; tests import it under both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax._src import distributed as _distributed
from jax._src import mesh as _mesh
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state


@functools.cache
def ffi_api_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI API that the installed jaxlib runs, read from the header it ships."""
    assert jaxlib.__file__ is not None
    header = Path(jaxlib.__file__).parent / "include" / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(m.group(1)) if m else 0 for m in found)
    return major, minor


def gpu_backend() -> str | None:
    """ "cuda" or "rocm", by what this process's GPU client says it is; None if there is none."""
    try:
        version = jax.local_devices(backend="gpu")[0].client.platform_version
    except RuntimeError:
        return None
    return "rocm" if "rocm" in version.lower() else "cuda"


def concrete_mesh() -> jax.sharding.Mesh | None:
    """The mesh of ``jax.set_mesh`` with its devices, or None; inside jit too, where ``get_mesh`` raises."""
    mesh = _mesh.get_concrete_mesh()
    return None if mesh is None or mesh.empty else mesh


def distributed_client() -> Any | None:
    """The key-value client that ``jax.distributed.initialize`` made, or None in a single process.

    jax exports no key-value store; MORI and TransformerEngine take the same private client, because
    ``process_allgather`` needs a working device collective and was seen to return short data.
    """
    return _distributed.global_state.client


def coordination_service(address: str, num_processes: int) -> Any:
    """Starts jax's coordination service in this process, which need not be one of the job's.

    Where process 0 hosts it, as ``jax.distributed.initialize`` alone has it, the death of process 0 makes jax
    abort every other process at once, before any of them can say what it saw.

    Args:
      address: "host:port" to listen on.
      num_processes: how many processes will connect.

    Returns:
      The service; ``shutdown()`` ends it.
    """
    return _jax.get_distributed_runtime_service(address, num_processes)


def device_kind(platform: str) -> str:
    """The kind of this process's first device of a platform ("cuda", "rocm"); "" where it has none."""
    try:
        return jax.local_devices(backend=platform)[0].device_kind
    except RuntimeError:
        return ""


def architecture(device: Any) -> str:
    """ "sm_90", "gfx942" and the like of a GPU; "" for other devices."""
    name = str(getattr(device, "compute_capability", "")).partition(":")[0]
    return name if not name or name.startswith("gfx") else f"sm_{name.replace('.', '')}"


def has_hopper_kernels() -> bool:
    """Whether Pallas-Mosaic kernels for Hopper run here: on such a GPU, from jax 0.11 on.

    An older Pallas-Mosaic has some of the same names with other arguments.
    """
    if jax.__version_info__ < (0, 11):
        return False
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return False
    return str(getattr(device, "compute_capability", "")) == "9.0"


def mosaic_kernel(
    body: Callable[..., None], out_type: Any, aliases: dict[int, int], params: Any, **mesh: Any
) -> Callable[..., Any]:
    """``mosaic_gpu.kernel``, whose results may take the memory of operands.

    jax 0.11 has this for references only, which no ``shard_map`` takes that checks what varies; what it makes
    of them takes arrays too.

    Args:
      body: the kernel.
      out_type: what the results are.
      aliases: the operand's and the result's number for each result that takes an operand's memory.
      params: the compiler's.
      mesh: the other arguments of ``mosaic_gpu.kernel``.
    """
    from jax.experimental.pallas import mosaic_gpu as mg

    if not aliases:
        return mg.kernel(body, out_type=out_type, compiler_params=params, **mesh)

    from jax._src import config
    from jax._src.pallas import mpmd

    def run(*operands: jax.Array) -> Any:
        with config._check_vma(False):  # pyright: ignore[reportPrivateUsage]
            of_kernel = mpmd._mpmd_map(  # pyright: ignore[reportPrivateUsage]
                [(mg.Mesh(**mesh), body)],
                out_type,
                input_output_aliases=aliases,
                compiler_params=params,
                interpret=config.pallas_tpu_interpret_mode_context_manager.value or False,
            )
            return of_kernel(*operands)

    return run


def converts_float8(platform: str, dtype: Any) -> bool:
    """Whether Pallas-Triton converts codes of a dtype on a platform: no float8 but e4m3fn, from sm_89 on.

    Where this process has no such device, nothing is said of it that might be wrong.
    """
    if jnp.dtype(dtype) != jnp.float8_e4m3fn or platform == "rocm":
        return jnp.issubdtype(dtype, jnp.integer)
    if platform == "cpu":
        return True
    try:
        capability = str(getattr(jax.local_devices(backend=platform)[0], "compute_capability", ""))
    except RuntimeError:
        return False
    return tuple(int(part) for part in capability.split(".") if part.isdigit()) >= (8, 9)


def lowers_triton() -> bool:
    """Whether Pallas-Triton's kernels can be lowered for the mesh without devices that is in use.

    From jax 0.11 on it must say which device it is of (``abstract_device``).
    """
    if jax.__version_info__ < (0, 11):
        return True
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) is not None


def matmul_precision() -> str | None:
    """What ``jax.default_matmul_precision`` is here; jax makes the property when it is imported."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def trace_state() -> Any:
    """An object that compares equal while the same trace is the innermost one."""
    return get_opaque_trace_state()


def is_tracer(x: Any) -> bool:
    """Whether x stands for a value in a program that is being traced."""
    return isinstance(x, Tracer)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which x may differ; empty outside shard_map."""
    return jax.typeof(x).manual_axis_type.varying


def result_type(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
    """The type of a custom call's result that varies over the mesh just as ``x`` does.

    A plain ShapeDtypeStruct types the result as replicated and hides a missing psum.
    """
    return jax.typeof(x).update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)


def result_type_shared(x: jax.Array, shape: tuple[int, ...], dtype: Any, ep_axis: str) -> Any:
    """The same for a result that is equal on all devices along ``ep_axis``; the caller vouches for that."""
    varying = varying_axes(x) - {ep_axis}
    kind = jax.typeof(x).manual_axis_type.update(varying=varying)
    return result_type(x, shape, dtype).update(manual_axis_type=kind)


def pcast_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Types x as varying over ``axes`` as well."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def union_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each typed as varying over every mesh axis that any of them varies over."""
    axes = frozenset().union(*(varying_axes(x) for x in arrays))
    return tuple(pcast_varying(x, axes) for x in arrays)


def zeros_like_varying(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.Array:
    """Zeros that vary over every mesh axis that any of ``like`` varies over."""
    axes = frozenset().union(*(varying_axes(x) for x in like))
    return pcast_varying(jnp.zeros(shape, dtype), axes)
