"""Which kernels run the products of a call, Pallas-Mosaic's or Pallas-Triton's, and why.

One answer serves the program that is traced and the text of ``jm.explain`` and ``jax-moriep doctor``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.config import MoEConfig
from jax_moriep.experts.pallas.hopper import support
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place

HOPPER = "sm_90"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernels of a call on a Hopper GPU.

    Attributes:
      mosaic: Pallas-Mosaic's run the products.
      few: they are those for short runs.
      reason: why it is not Pallas-Mosaic's; None if it is.
    """

    mosaic: bool
    few: bool = False
    reason: str | None = None


def of(spec: ExpertSpec, rows: Any, weights: ExpertWeights, *, differentiated: bool) -> Choice:
    """The kernels that a call on a Hopper GPU gets.

    Args:
      spec: the static side.
      rows: [C, H], or its shape and dtype.
      weights: the experts, or their shapes and dtypes.
      differentiated: it is a forward pass that keeps something for the backward pass, or that.
    """
    why = support.unsuited(spec, rows, weights)
    if why is None:
        return Choice(mosaic=True)
    if not differentiated and support.unsuited_few(spec, rows, weights) is None:
        return Choice(mosaic=True, few=True)
    return Choice(mosaic=False, reason=why)


def unsuited_device(place: Place) -> str | None:
    """Why no Pallas-Mosaic kernel runs at a place, whatever the call is; None if some do."""
    if place.architecture != HOPPER:
        this = place.architecture or f"one that says no architecture, on platform {place.platform!r}"
        return f"they are for Hopper GPUs ({HOPPER}), and this is {this}"
    if not compat.has_hopper_kernels():
        return f"they need jax 0.11 and a Hopper GPU in this process, which has jax {jax.__version__}"
    return None


def describe(place: Place, cfg: MoEConfig | None, shape: ExchangeShape | None, dtype: str) -> str:
    """Which kernels run a layer at a place, and why not Pallas-Mosaic's; in lines for people.

    Args:
      place: where; one that ``unavailable_reason`` has nothing against.
      cfg: the layer; None asks about the place alone.
      shape: the sizes of the exchange before; None where they are not known.
      dtype: of rows and of floating weights.
    """
    why = unsuited_device(place)
    if why is not None:
        return _by_triton(why)
    if cfg is None:
        return (
            "products by Pallas-Mosaic where it has kernels for a layer's sizes, else by Pallas-Triton; "
            "jm.explain(cfg, mesh, num_tokens=T) says which and why"
        )
    known = shape is not None or cfg.block is not None
    lines = {}
    for frozen in (False, True) if cfg.expert_quant else (False,):
        call = _call(place, cfg, shape, dtype, frozen=frozen)
        for differentiated in (True, False):
            chosen = of(*call, differentiated=differentiated)
            lines[frozen, differentiated] = _said(chosen, support.suited_blocks(call[0]), known)
    if len(set(lines.values())) == 1:
        return lines[False, True]
    whose = {False: "of floating weights", True: "of quantised weights"}
    when = {False: "not differentiated", True: "differentiated"}
    return "\n".join(f"{whose[frozen]}, {when[d]}: {line}" for (frozen, d), line in lines.items())


def _said(choice: Choice, blocks: str, known: bool) -> str:
    if choice.reason is not None:
        return _by_triton(choice.reason)
    if not known:
        return (
            f"products by Pallas-Mosaic if block is {blocks}, else by Pallas-Triton; num_tokens=T says which"
        )
    return "products by Pallas-Mosaic" + (", in tiles for few rows" if choice.few else "")


def _by_triton(why: str) -> str:
    return f"products by Pallas-Triton; not by Pallas-Mosaic's kernels: {why}"


def _call(
    place: Place, cfg: MoEConfig, shape: ExchangeShape | None, dtype: str, *, frozen: bool
) -> tuple[ExpertSpec, Any, ExpertWeights]:
    """What ``of`` asks about, of a layer's sizes. A block that is not known is one that suits."""
    block = shape.block if shape is not None else cfg.block or support.ROWS
    capacity = shape.capacity if shape is not None else block * support.ROWS
    num_local = 1 if shape is None else shape.num_local_experts
    spec = ExpertSpec.of(cfg, block=block, architecture=place.architecture)
    if spec.scheme is not None:
        # ``triton.quantised.with_weighted_input`` multiplies the rows before they become codes.
        spec = dataclasses.replace(spec, weight_input=False)
    hidden, inner = cfg.hidden_size, cfg.intermediate_size
    w1, w2 = (num_local, 2 * inner, hidden), (num_local, hidden, inner)
    of_weights = jnp.dtype(dtype)
    scales: dict[str, Any] = {}
    if frozen and spec.scheme is not None:
        of_weights = schemes.code_dtype(spec.scheme, schemes.FORMATS[spec.format])
        shapes = schemes.scale_shapes(spec.scheme, num_local, hidden, inner)
        names = ("w1_scale", "w2_scale")
        scales = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in zip(names, shapes, strict=True)}
    biases: dict[str, Any] = {}
    if cfg.expert_bias:
        biases = {
            "b1": jax.ShapeDtypeStruct(w1[:2], dtype),
            "b2": jax.ShapeDtypeStruct(w2[:2], dtype),
        }
    arrays = (jax.ShapeDtypeStruct(s, of_weights) for s in (w1, w2))
    weights = ExpertWeights(*arrays, **biases, **scales)
    return spec, jax.ShapeDtypeStruct((capacity, hidden), dtype), weights
