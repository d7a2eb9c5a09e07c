"""transport="mori": MORI's own kernels, from the installed amd-mori wheel, as XLA custom calls.

A token comes once to each rank that has an expert for it, and rows are made of the tokens there
(``transports.expand``). Every call takes what it needs of MORI's routing from ``own``, which the program
keeps: any number of exchanges may lie between a dispatch and its combine.
"""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_moriep import quant
from jax_moriep.config import MoEConfig
from jax_moriep.errors import MoriepError
from jax_moriep.mori import kernels, limits, network, tuning, wheel, world
from jax_moriep.plan import ExchangeShape, Link, Opened
from jax_moriep.runtime import compat, targets
from jax_moriep.runtime.mesh import abstract_name, groups_of
from jax_moriep.runtime.place import Place
from jax_moriep.transports.arrivals import Arrivals

BACKEND = "mori"
_CURE = "use transport='native' or 'collective'"


class Own(NamedTuple):
    """What a plan keeps: MORI's routing of one dispatch."""

    ids: jax.Array
    """i32[T, K], as MORI was given them: -1 for what is no expert."""
    places: jax.Array
    """i32[T, K]: at which place of which rank each token of this rank lies, as MORI numbers them."""
    origins: jax.Array
    """i32[N]: which token of which rank lies at each place of this rank, as MORI numbers them."""
    count: jax.Array
    """i32[1]: how many tokens have come to this rank."""
    between: jax.Array
    """i32[B]: what went where between nodes (csrc/mori/flags.h); empty on one."""


def unavailable_reason(place: Place) -> str | None:
    """See ``transports.Transport.unavailable_reason``."""
    if place.platform is None:
        return None
    if place.backend != "rocm":
        return f"it needs AMD's GPUs; {_CURE}"
    if not place.architecture.startswith("gfx942"):
        return f"it runs on the MI300 series (gfx942), and this is {place.architecture}; {_CURE}"
    try:
        limits.check_process(place.devices_per_process)
        limits.check_nodes(place.node_of_ranks)
        limits.gpus_per_node(_usual_kernel(place), place.num_ranks, place.num_nodes)
        network.by_proxy(os.environ, network.adapters())
        world.library()
    except MoriepError as e:
        return str(e)
    return None


def open(  # noqa: A001 - the contract's name
    place: Place,
    cfg: MoEConfig | None,
    shape: ExchangeShape | None,
    dtype: str,
    *,
    again: bool = False,
) -> Opened:
    """See ``transports.Transport.open``; the handle is made in the background, its kernels are compiled here.

    Raises:
      ConfigError: MORI cannot do what cfg asks.
      LibraryError: a library or a compiler for MORI's kernels is missing.
      TransportError: the group could not be opened, or with ``again`` not all ranks came.
    """
    groups = None
    if place.platform is None:
        name = abstract_name(place.mesh, place.ep_axis)
    else:
        groups = groups_of(place.mesh, place.ep_axis)
        name = groups.name
        world.open_group(groups, again=again)
    if cfg is None or shape is None:
        return Opened(name)
    chosen, size = _chosen(place, cfg, shape, dtype)
    request = world.Request(size, cfg.describe(), ())
    fp8 = cfg.wire_dtype == "fp8"
    # Between nodes ranks meet by what a handle brings, also where nobody has a token.
    if groups is not None and (shape.num_tokens or place.num_nodes > 1):
        limits.check_handle(size)
        # Only the plain kernel goes along a plan that the other has made.
        types = dict.fromkeys(
            (chosen.kernel, "IntraNode" if chosen.kernel == "IntraNodeLL" else chosen.kernel)
        )
        units = [kernels.Unit(kernel, dtype) for kernel in types]
        if fp8:
            units.append(kernels.Unit(chosen.kernel, "float8_e4m3fnuz"))
        folders = kernels.obtain(wheel.find(), place.architecture, units)
        request = dataclasses.replace(request, kernels=tuple(folders))
        world.open_handle(groups, request, wait=again)
    return Opened(
        name,
        (
            ("group", name),
            # Compared between the ranks at run time.
            ("config", cfg.describe()),
            ("num_experts", shape.num_experts),
            ("num_local_experts", shape.num_local_experts),
            ("num_nodes", place.num_nodes),
            ("handle", request.key),
            ("wire", "fp8" if fp8 else ""),
            ("dispatch_blocks", chosen.dispatch.block_num),
            ("dispatch_waves", chosen.dispatch.warp_num_per_block),
            ("dispatch_rdma_blocks", chosen.dispatch.rdma_block_num),
            ("combine_blocks", chosen.combine.block_num),
            ("combine_waves", chosen.combine.warp_num_per_block),
            ("combine_rdma_blocks", chosen.combine.rdma_block_num),
        ),
        quantises=fp8,
    )


def describe(place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str) -> str | None:
    """See ``transports.Describes.describe``: kernel type and launch sizes, and which table they are from."""
    try:
        chosen, size = _chosen(place, cfg, shape, dtype)
        if shape.num_tokens:
            limits.check_handle(size)
    except MoriepError as e:
        return f"refuses it: {e}"
    if place.num_nodes == 1:
        return str(chosen)
    proxy, why = network.by_proxy(os.environ, network.adapters())
    return f"{chosen}\n  between machines: sent by {'a thread of MORI' if proxy else 'the GPU'} ({why})"


def run_experts(
    link: Link,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    *,
    operands: tuple[jax.Array, ...],
    attributes: tuple[tuple[str, int | str], ...],
    scratch: tuple[int, int, int],
    words: jax.Array,
    order: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See ``transports.RunsExperts.run_experts``."""
    shape = link.shape
    ids = _experts_only(ids, link)
    carried = compat.pcast_varying(words, compat.varying_axes(x))
    num_arrivals = shape.num_ranks * shape.num_tokens
    quantised = shape.num_tokens if link.opened.quantises else 0
    code_rows, row_scales, expert_words = scratch
    own_words = shape.num_tokens * shape.top_k + num_arrivals + 2
    results = (
        compat.result_type(x, x.shape, x.dtype),
        compat.result_type_shared(words, (shape.num_ranks, words.shape[0]), jnp.int32, link.ep_axis),
        compat.result_type(x, (1,), jnp.int32),
        # Memory for as long as the call runs: tokens for the wire and for the experts, what the experts make
        # of them, and numbers.
        compat.result_type(x, (quantised, x.shape[1]), jnp.uint8),
        compat.result_type(x, (quantised, quant.num_groups(x.shape[1])), jnp.float32),
        compat.result_type(x, (code_rows, x.shape[1]), jnp.uint8),
        compat.result_type(x, (row_scales,), jnp.float32),
        compat.result_type(x, (num_arrivals, x.shape[1]), x.dtype),
        compat.result_type(x, (own_words + expert_words,), jnp.int32),
    )
    y, all_words, order, *_ = targets.call(
        targets.FUSED_EXPERTS,
        results,
        *(x, ids, weights, carried, targets.own_rank(link.ep_axis, x), order, *operands),
        attributes=(*link.opened.attributes, *attributes),
    )
    return y, all_words, order


def send(
    link: Link,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    *,
    words: jax.Array,
    order: jax.Array,
) -> tuple[Arrivals, Own, jax.Array, jax.Array]:
    """See ``transports.expand.TokenTransport.send``."""
    shape = link.shape
    ids = _experts_only(ids, link)
    carried = compat.pcast_varying(words, compat.varying_axes(x))
    num_arrivals = shape.num_ranks * shape.num_tokens
    quantised = shape.num_tokens if link.opened.quantises else 0
    results = (
        compat.result_type(x, (num_arrivals, x.shape[1]), x.dtype),
        compat.result_type(x, (num_arrivals, shape.top_k), jnp.int32),
        compat.result_type(x, (num_arrivals, shape.top_k), jnp.float32),
        compat.result_type(x, (num_arrivals,), jnp.int32),
        compat.result_type(x, (1,), jnp.int32),
        compat.result_type(x, (shape.num_tokens, shape.top_k), jnp.int32),
        compat.result_type(x, (num_arrivals,), jnp.int32),
        compat.result_type(x, (_between_words(link),), jnp.int32),
        compat.result_type_shared(words, (shape.num_ranks, words.shape[0]), jnp.int32, link.ep_axis),
        # Memory for the float8 rows and their scales until MORI has read them; nobody asks for it.
        compat.result_type(x, (quantised, x.shape[1]), jnp.uint8),
        compat.result_type(x, (quantised, quant.num_groups(x.shape[1])), jnp.float32),
        compat.result_type(x, (1,), jnp.int32),
    )
    tokens, there_ids, there_weights, sources, count, places, origins, between, all_words, _, _, order = (
        targets.call(
            targets.SEND,
            results,
            *(x, ids, weights, carried, targets.own_rank(link.ep_axis, x), order),
            attributes=link.opened.attributes,
        )
    )
    arrivals = Arrivals(tokens, there_ids, there_weights, sources, count)
    return arrivals, Own(ids, places, origins, count, between), all_words, order


def resend(link: Link, x: jax.Array, own: Own, *, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See ``transports.expand.TokenTransport.resend``."""
    if str(_attribute(link, "handle")).startswith("InterNodeV1LL/"):
        return _sent_again(link, x, own, order=order)
    num_arrivals = link.shape.num_ranks * link.shape.num_tokens
    results = (
        compat.result_type(x, (num_arrivals, x.shape[1]), x.dtype),
        compat.result_type(x, (1,), jnp.int32),
    )
    tokens, order = targets.call(
        targets.RESEND,
        results,
        *(x, *own, targets.own_rank(link.ep_axis, x), order),
        attributes=link.opened.attributes,
    )
    return tokens, order


def _sent_again(link: Link, x: jax.Array, own: Own, *, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Resends by a kernel that goes along no plan: sends anew, and puts what came into the plan's order."""
    as_it_is = tuple((name, "" if name == "wire" else value) for name, value in link.opened.attributes)
    opened = dataclasses.replace(link.opened, attributes=as_it_is, quantises=False)
    weights = compat.zeros_like_varying(own.ids.shape, jnp.float32, x)
    words = jnp.zeros((0,), jnp.int32)
    again, _, _, order = send(
        dataclasses.replace(link, opened=opened), x, own.ids, weights, words=words, order=order
    )
    num_tokens, num_arrivals = link.shape.num_tokens, again.tokens.shape[0]
    if num_arrivals == 0:
        return again.tokens, order
    places = jnp.arange(num_arrivals, dtype=jnp.int32)
    source = jnp.where(places < again.count, again.sources, num_arrivals)
    place_of_source = (
        compat.zeros_like_varying((num_arrivals,), jnp.int32, x).at[source].set(places, mode="drop")
    )
    # As MORI numbers tokens; those behind the last are of no rank.
    wanted = own.origins // num_arrivals * num_tokens + own.origins % num_arrivals
    return again.tokens[place_of_source[jnp.where(places < own.count, wanted, 0)]], order


def give_back(
    link: Link, tokens: jax.Array, own: Own, *, order: jax.Array, scalars: jax.Array | None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See ``transports.expand.TokenTransport.give_back``; ranks add up in the order of a token's experts."""
    shape = link.shape
    # An empty operand stands for "no scalars", so that one target serves the forward and the backward pass.
    carried = scalars is not None
    if scalars is None:
        scalars = compat.zeros_like_varying((0, shape.top_k), jnp.float32, tokens)
    results = (
        compat.result_type(tokens, (shape.num_tokens, tokens.shape[1]), tokens.dtype),
        compat.result_type(tokens, (shape.num_tokens if carried else 0, shape.top_k), jnp.float32),
        compat.result_type(tokens, (1,), jnp.int32),
    )
    y, token_scalars, order = targets.call(
        targets.GIVE_BACK,
        results,
        *(tokens, scalars, *own, targets.own_rank(link.ep_axis, tokens), order),
        attributes=link.opened.attributes,
    )
    return y, token_scalars if carried else None, order


def _attribute(link: Link, name: str) -> int | str:
    return dict(link.opened.attributes)[name]


def _between_words(link: Link) -> int:
    """B, as csrc/mori/flags.h has it."""
    nodes, tokens = int(_attribute(link, "num_nodes")), link.shape.num_tokens
    return 0 if nodes == 1 else nodes * (tokens * link.shape.top_k + tokens + -(-tokens // 64))


def _usual_kernel(place: Place) -> str:
    return "IntraNode" if place.num_nodes == 1 else "InterNodeV1"


def _experts_only(ids: jax.Array, link: Link) -> jax.Array:
    shape = link.shape
    if _attribute(link, "num_nodes") == 1 and shape.num_experts == shape.num_local_experts * shape.num_ranks:
        return ids
    # MORI takes an expert's number apart: it would send these to the last ranks, and between nodes forget to
    # say that they go nowhere.
    return jnp.where((ids >= 0) & (ids < shape.num_experts), ids, -1)


def _chosen(
    place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str
) -> tuple[tuning.Resolution, limits.HandleSize]:
    """Kernel type and launch sizes, and the handle they are for; checked."""
    limits.check_rows("x.dtype", dtype)
    chosen = tuning.resolve(wheel.find().tables, _hardware(place), cfg, shape.num_tokens, dtype)
    limits.check_kernel(chosen.kernel, place.num_nodes)
    size = _handle_size(place, cfg, shape, dtype, chosen.kernel)
    for launch in (chosen.dispatch, chosen.combine):
        limits.check_launch(size, _compute_units(place), *dataclasses.astuple(launch)[:3])
    return chosen, size


def _handle_size(
    place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str, kernel: str
) -> limits.HandleSize:
    return limits.HandleSize(
        kernel=kernel,
        ranks=shape.num_ranks,
        gpus_per_node=limits.gpus_per_node(kernel, shape.num_ranks, place.num_nodes),
        max_tokens=max(shape.num_tokens, 1) if place.num_nodes > 1 else shape.num_tokens,
        hidden=cfg.hidden_size,
        element_bytes=limits.ROWS[dtype],
        experts_per_rank=shape.num_local_experts,
        top_k=shape.top_k,
        scales=quant.num_groups(cfg.hidden_size) if cfg.wire_dtype == "fp8" else 0,
    )


def _hardware(place: Place) -> tuning.Hardware:
    kind = "" if place.platform is None else place.mesh.devices.flat[0].device_kind
    arch = place.architecture or "gfx942"
    return tuning.Hardware(
        arch, tuning.model_of(arch, kind), _compute_units(place), place.num_ranks, place.num_nodes
    )


def _compute_units(place: Place) -> int:
    """Of one device; for a program that is only lowered, those of an MI300X."""
    if place.platform is None:
        return tuning.COMPUTE_UNITS["mi300x"]
    return place.mesh.devices.flat[0].core_count
