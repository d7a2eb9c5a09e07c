"""What MORI cannot do and would answer by ending the process, by waiting for ever, or by wrong results.

MORI checks little, and what it checks it answers with ``abort`` or ``exit(-1)``. So every rule of its C++
code that a user can break is stated here, as a pure function, and refused before MORI is called. Letters as
in ``config``; M is the most tokens per rank that a handle is made for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from jax_moriep.errors import ConfigError, TransportError, rule

# MORI's kernels hold a number for each GPU of a machine in arrays of this size, and do not check it.
MAX_RANKS_ON_NODE = 8
# The low-latency kernel looks at a token's first experts only, as many as a machine has GPUs.
MAX_TOP_K_LL = 8
# A wave has 64 lanes, and one of them handles an expert of a token.
MAX_TOP_K = 63
# A work-group has at most 1024 threads.
MAX_WARPS = 16
# The low-latency kernel keeps two waves for routes and scales.
MIN_WARPS_LL = 3
# Bit 30 of a number that names a rank and a place in its buffer marks something else.
MAX_PLACES = 2**30
LDS_BYTES = 64 * 1024
# Of which the kernels' own variables take a part.
LDS_OWN_BYTES = 1024
# Allocations in the symmetric heap begin at multiples of this, and the first is MORI's own.
HEAP_ALIGNMENT = 256
HEAP_OWN_BYTES = 1024
# Of flags between nodes (csrc/mori/flags.h): how many sets there are, and the tokens for each flag.
_FLAG_SETS, _CHUNK = 3, 64
INTRA_NODE = ("IntraNode", "IntraNodeLL")
INTER_NODE_V1 = ("InterNodeV1", "InterNodeV1LL")
ROWS = {"float32": 4, "bfloat16": 2, "float8_e4m3fnuz": 1}


@dataclasses.dataclass(frozen=True)
class HandleSize:
    """What sizes the buffers of one of MORI's handles; the same on all ranks.

    Attributes:
      kernel: MORI's kernel type.
      ranks: R.
      gpus_per_node: what MORI is told; see ``gpus_per_node``.
      max_tokens: M.
      hidden: H.
      element_bytes: of the widest value that dispatch or combine sends.
      experts_per_rank: L.
      top_k: K.
      scales: the number of scales that accompany a token; 0: none.
      scale_bytes: the size of one.
    """

    kernel: str
    ranks: int
    gpus_per_node: int
    max_tokens: int
    hidden: int
    element_bytes: int
    experts_per_rank: int
    top_k: int
    scales: int = 0
    scale_bytes: int = 4


def heap_bytes(size: HandleSize) -> int:
    """The symmetric memory of one handle, to the byte.

    Several handles need the sum, and once ``HEAP_OWN_BYTES`` for MORI itself.
    """
    nodes = size.ranks // size.gpus_per_node
    received = size.ranks * size.max_tokens
    row = size.hidden * size.element_bytes
    scale = size.scales * size.scale_bytes
    routed = 4 * size.top_k
    # A row on its way, with its experts, their weights, its source and its scales.
    parcel = row + 2 * routed + 4 + scale
    if size.kernel in INTRA_NODE:
        tokens = [received * parcel]
    elif size.kernel in INTER_NODE_V1:
        by_node = nodes * size.max_tokens * parcel
        tokens = [by_node, received * parcel, 2 * by_node, size.max_tokens * parcel]
    else:
        tokens = [received * parcel] * 3
    tokens += [received * row, size.max_tokens * row]
    routes = [received * routed] * 5 + [received * scale] * 2
    signals = [8 * size.ranks] * 2 + [
        32 * size.ranks,
        8 * nodes,
        64 * size.ranks,
        8 * nodes * size.max_tokens,
    ]
    maps = [4, 4 * received * size.experts_per_rank]
    buffers = (*tokens, *routes, *signals, *maps)
    return sum(-(-buffer // HEAP_ALIGNMENT) * HEAP_ALIGNMENT for buffer in buffers)


def parse_heap_size(text: str) -> int:
    """The bytes that a value of ``MORI_SHMEM_HEAP_SIZE`` means, such as 8G, 512MB or 64MiB.

    MORI takes the digits that it understands and forgets the rest: it makes 1 byte of "1T" and 0 of "0.5G".

    Raises:
      ConfigError: MORI would read something else than is written.
    """
    match = re.fullmatch(r"(\d+)([KMG]?)(I?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        cure = "write whole bytes, or a number with K, M or G"
        raise ConfigError(
            rule("MORI_SHMEM_HEAP_SIZE", text, "be a whole number with K, M, G or nothing", cure)
        )
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def between_bytes(size: HandleSize) -> int:
    """The symmetric memory that a handle takes beside MORI's own between nodes: its sets of flags."""
    nodes = size.ranks // size.gpus_per_node
    if size.kernel not in INTER_NODE_V1:
        return 0
    sets = _FLAG_SETS * 8 * nodes * (-(-size.max_tokens // _CHUNK) + 1)
    return -(-sets // HEAP_ALIGNMENT) * HEAP_ALIGNMENT


def notice_bytes(nodes: int) -> int:
    """The symmetric memory by which nodes meet before each step, as ``relay.h`` lays it out."""
    return 0 if nodes == 1 else 4096 + 2 * (nodes + 1) * (128 << 10)


def check_heap(needed: int, given: str | None) -> None:
    """Refuses a heap that the user set and that is too small.

    Args:
      needed: the sum over all handles and ``HEAP_OWN_BYTES``.
      given: the value of ``MORI_SHMEM_HEAP_SIZE``, None if it is not set.

    Raises:
      ConfigError: it is too small, or MORI would misread it.
    """
    if given is not None and parse_heap_size(given) < needed:
        cure = "raise it, or unset it: jax_moriep then sets what is needed"
        raise ConfigError(
            rule(
                "MORI_SHMEM_HEAP_SIZE", given, f"be at least the {needed} bytes of this group's buffers", cure
            )
        )


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuses settings of MORI's under which its exchanges on one machine hang or are wrong.

    Args:
      environment: such as ``os.environ``.

    Raises:
      TransportError: a variable has such a value.
    """
    allowed = {
        # Of the other two heaps one faults when dispatch and combine repeat, and one was never tried here.
        "MORI_SHMEM_MODE": ("", "static_heap"),
        # In cached memory a rank may never see a peer's signal.
        "MORI_SHMEM_HEAP_TYPE": ("", "uncached"),
        # Without peer memory MORI ends the process.
        "MORI_DISABLE_P2P": ("", "0"),
    }
    for name, values in allowed.items():
        value = environment.get(name, "")
        if value not in values:
            raise TransportError(rule(name, value, f"be unset or {values[1]!r}", "unset it"))


def check_process(local_devices: int) -> None:
    """Refuses a process with several GPUs: MORI keeps one rank's state per process.

    Args:
      local_devices: of the mesh, in this process.

    Raises:
      TransportError: there are several.
    """
    if local_devices > 1:
        cure = "start one process per GPU (jax-moriep launch -n N script.py), or use transport='native'"
        raise TransportError(rule("local_devices", local_devices, "be 1 with transport='mori'", cure))


def check_kernel(kernel: str, nodes: int) -> None:
    """Refuses a kernel type that does not run on this group.

    Args:
      kernel: MORI's kernel type.
      nodes: the machines that the group is on.

    Raises:
      ConfigError: a plan cannot keep its routing, or it needs a network between machines.
    """
    cure = "leave it 'auto'"
    launched = (*INTRA_NODE, *INTER_NODE_V1)
    if kernel not in launched:
        must = (
            f"be one of {', '.join(launched)}; of the others MORI knows the routing of the last dispatch only"
        )
        raise ConfigError(rule("mori_kernel", kernel, must, cure))
    if kernel in INTER_NODE_V1 and nodes == 1:
        must = f"be {' or '.join(INTRA_NODE)} on one machine, for it sends through a network"
        raise ConfigError(rule("mori_kernel", kernel, must, cure))


def gpus_per_node(kernel: str, ranks: int, nodes: int) -> int:
    """What MORI must be told as the GPUs per node.

    It ends the process unless that is a power of two that divides R. The kernels for one machine never look
    at it, so there 1, 2, 4 or 8 is found for every R.

    Args:
      kernel: MORI's kernel type.
      ranks: R.
      nodes: the machines that they are on.

    Raises:
      TransportError: this kernel type cannot serve the group.
    """
    on_node = ranks // nodes
    if ranks % nodes:
        raise TransportError(
            rule("ranks", ranks, f"be the same on each of {nodes} machines", "even them out")
        )
    if on_node > MAX_RANKS_ON_NODE:
        cure = f"use at most {MAX_RANKS_ON_NODE} GPUs of a machine in one group, or another transport"
        raise TransportError(
            rule("ranks", ranks, f"be at most {MAX_RANKS_ON_NODE} on a machine with MORI", cure)
        )
    if kernel in INTRA_NODE:
        if nodes > 1:
            cure = "use mori_kernel='InterNodeV1', or 'auto'"
            raise TransportError(
                rule("mori_kernel", kernel, f"reach {nodes} machines, and stays on one", cure)
            )
        return on_node & -on_node
    if on_node & (on_node - 1):
        cure = "use 1, 2, 4 or 8 GPUs of each machine"
        raise TransportError(rule("gpus_per_node", on_node, f"be a power of two with {kernel}", cure))
    if kernel == "InterNode" and nodes > 1 and on_node != MAX_RANKS_ON_NODE:
        cure = "use all 8, or mori_kernel='InterNodeV1'"
        raise TransportError(rule("gpus_per_node", on_node, "be 8 with InterNode, which counts so", cure))
    return on_node


def check_nodes(node_of_ranks: tuple[tuple[int, ...], ...]) -> None:
    """Refuses ranks that are not as many on each node and next to each other, for MORI counts nodes so.

    Args:
      node_of_ranks: for each group the node of each rank, numbered as they come.

    Raises:
      TransportError: they are not.
    """
    for row in node_of_ranks:
        per_node = len(row) // (max(row) + 1)
        if row != tuple(rank // per_node for rank in range(len(row))):
            must = "be as many on each machine, and those of a machine next to each other"
            cure = "order the mesh's devices by process, and start as many processes on each machine"
            raise TransportError(rule("node_of_ranks", row, must, cure))


def experts_per_rank(num_experts: int, ranks: int) -> int:
    """L, which is the same on all ranks with MORI: an expert's rank is its number divided by L.

    Raises:
      ConfigError: E is not divisible by R.
    """
    if num_experts % ranks:
        cure = "pad the experts (jm.pad_params; jm.ep_moe does it by itself)"
        raise ConfigError(
            rule("num_experts", num_experts, f"be divisible by the {ranks} ranks with MORI", cure)
        )
    return num_experts // ranks


def check_rows(name: str, dtype: str) -> None:
    """Refuses a type of rows that MORI has no kernels for.

    Args:
      name: what has the type, for the text.
      dtype: the type's name.

    Raises:
      ConfigError: float16, OCP's float8 or another type.
    """
    if dtype not in ROWS:
        cure = "cast to bfloat16 (x.astype(jnp.bfloat16)), or use transport='native'"
        raise ConfigError(rule(name, dtype, f"be one of {', '.join(ROWS)} with transport='mori'", cure))


def check_handle(size: HandleSize) -> None:
    """Refuses sizes that MORI's kernels cannot count or hold.

    Raises:
      ConfigError: a size is too large, or not positive.
    """
    for name in ("ranks", "max_tokens", "hidden", "element_bytes", "experts_per_rank", "top_k"):
        if getattr(size, name) < 1:
            raise ConfigError(rule(name, getattr(size, name), "be at least 1", "pass a positive int"))
    most = MAX_TOP_K_LL if size.kernel == "IntraNodeLL" else MAX_TOP_K
    if size.top_k > most:
        cure = "use mori_kernel='IntraNode'" if size.kernel == "IntraNodeLL" else "lower top_k"
        raise ConfigError(rule("top_k", size.top_k, f"be at most {most} with {size.kernel}", cure))
    _check_between(size)
    places = MAX_PLACES // size.ranks**2
    if size.max_tokens >= places or size.max_tokens * size.top_k >= 2**31:
        most = min(places, -(-(2**31) // size.top_k)) - 1
        must = f"be at most {most} with ranks={size.ranks} and top_k={size.top_k}"
        raise ConfigError(rule("max_tokens", size.max_tokens, must, "give each rank fewer tokens a call"))


def _check_between(size: HandleSize) -> None:
    """What the kernels between nodes cannot do, and do wrong without a word."""
    if size.kernel not in INTER_NODE_V1:
        return
    nodes = size.ranks // size.gpus_per_node
    if size.top_k < nodes:
        # Combine keeps a number for each node in memory for one for each expert of a token.
        must = f"be at least the {nodes} machines with {size.kernel}"
        raise ConfigError(rule("top_k", size.top_k, must, "use transport='two_level'"))
    for what, row in (
        ("x", size.hidden * size.element_bytes),
        *((("wire", size.hidden),) * (size.scales > 0)),
    ):
        if row % 4:
            must = f"make rows of whole 32-bit words of {what}, which have {row} bytes, with {size.kernel}"
            raise ConfigError(rule("hidden_size", size.hidden, must, "make it a multiple of 4"))
    if size.kernel == "InterNodeV1LL" and size.experts_per_rank < 2:
        # It divides the number of no expert, which is -1, by this, and must not get a rank before the first.
        cure = "use mori_kernel='InterNodeV1', or 'auto'"
        raise ConfigError(rule("experts_per_rank", 1, "be at least 2 with InterNodeV1LL", cure))


def check_tokens(num_tokens: int, size: HandleSize) -> None:
    """Refuses more tokens than a handle was made for, which MORI would write past its buffers.

    Args:
      num_tokens: T.
      size: of the open handle.

    Raises:
      ConfigError: T is over M.
    """
    if not 0 <= num_tokens <= size.max_tokens:
        cure = "open the group for more tokens, or give each rank fewer a call"
        must = f"be at most the {size.max_tokens} tokens per rank that the group was opened for"
        raise ConfigError(rule("num_tokens", num_tokens, must, cure))


def most_warps(ranks: int, experts_per_rank: int) -> int:
    """The waves of a work-group whose counts, for each rank and expert one per wave, fit into the LDS."""
    left = LDS_BYTES - LDS_OWN_BYTES - 4 * experts_per_rank
    return max(0, min(MAX_WARPS, left // (4 * (ranks + experts_per_rank))))


def check_launch(
    size: HandleSize, compute_units: int, block_num: int, warp_num: int, rdma_block_num: int
) -> None:
    """Refuses a launch whose blocks wait for blocks that cannot run, or that the device rejects.

    Args:
      size: of the handle.
      compute_units: of the device. All blocks of a kernel wait for each other, so all must run at once.
      block_num: work-groups.
      warp_num: waves in each.
      rdma_block_num: how many of the work-groups serve the network; 0 with the kernels of one machine.

    Raises:
      ConfigError: a number is out of range.
    """
    if not 1 <= block_num <= compute_units:
        must = (
            f"be between 1 and the device's {compute_units} compute units, for all blocks wait for each other"
        )
        raise ConfigError(rule("block_num", block_num, must, "lower it, or leave it None"))
    least = MIN_WARPS_LL if size.kernel == "IntraNodeLL" else 1
    if not least <= warp_num <= MAX_WARPS:
        must = f"be between {least} and {MAX_WARPS} with {size.kernel}"
        raise ConfigError(
            rule("warp_num_per_block", warp_num, must, "choose such a number, or leave it None")
        )
    most = most_warps(size.ranks, size.experts_per_rank)
    if warp_num > most:
        must = f"be at most {most} with {size.experts_per_rank} experts per rank, whose counts fill the LDS"
        cure = "lower it" if most >= least else "use more ranks, or another transport"
        raise ConfigError(rule("warp_num_per_block", warp_num, must, cure))
    if size.kernel in INTER_NODE_V1 and not 1 <= rdma_block_num < block_num:
        must = f"be at least 1 and leave one of block_num={block_num} to the machine's own GPUs"
        raise ConfigError(rule("rdma_block_num", rdma_block_num, must, "lower it, or leave it None"))
