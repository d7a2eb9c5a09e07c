"""Tuning: how a transport launches its kernels, where the user knows better than the tables.

The tables are those of ``mori.tuning`` and ``transports.delivery``. How the experts' kernels are cut is no
option: see ``experts.pallas.triton.tuning``.
"""

from __future__ import annotations

import dataclasses
import numbers

from jax_moriep.errors import ConfigError, rule

# MORI's own names of its kernel types.
MORI_KERNELS = ("IntraNode", "IntraNodeLL", "InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL")
DELIVERIES = ("pull", "put")
# A work-group has at most 1024 threads, which are 16 waves.
_MAX_WARPS = 16


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How ``transport="mori"`` launches MORI's kernels, and how "native" dispatches between GPUs; frozen, and
    hashable by value.

    None leaves a number to the tables that come with MORI; ``jm.explain`` shows what they say. The numbers
    hold for dispatch and for combine.

    Args:
      mori_kernel: "auto" or one of MORI's kernel types. "auto" takes IntraNode on one machine; on several
        InterNodeV1, and InterNodeV1LL at few tokens.
      block_num: work-groups of a launch, at most the device's compute units.
      warp_num_per_block: waves in each, at most 16.
      rdma_block_num: how many of the work-groups serve the network, with several machines.
      native_dispatch: "pull": each rank reads the tokens that it needs in their owners' memory; "put": their
        owners write them to its memory. Results are the same to the bit. "auto": as
        ``JAX_MORIEP_NATIVE_DISPATCH`` says, else as a table does by the GPU's architecture. On CPUs ranks
        pull whatever is said here.

    Raises:
      ConfigError: a value breaks its rule; the text names the value, the rule and the cure.
    """

    mori_kernel: str = "auto"
    block_num: int | None = None
    warp_num_per_block: int | None = None
    rdma_block_num: int | None = None
    native_dispatch: str = "auto"

    def __post_init__(self) -> None:
        for name, known in (("mori_kernel", MORI_KERNELS), ("native_dispatch", DELIVERIES)):
            if (value := getattr(self, name)) not in ("auto", *known):
                raise ConfigError(rule(name, value, f"be one of {('auto', *known)}", "pick one of these"))
        for name in ("block_num", "warp_num_per_block", "rdma_block_num"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise ConfigError(rule(name, value, "be an integer", "pass an int, or None for the tables"))
            if value < 1:
                raise ConfigError(rule(name, value, "be at least 1", "pass None to leave it to the tables"))
            object.__setattr__(self, name, int(value))
        if self.warp_num_per_block is not None and self.warp_num_per_block > _MAX_WARPS:
            must = f"be at most {_MAX_WARPS}, which are 1024 threads"
            raise ConfigError(rule("warp_num_per_block", self.warp_num_per_block, must, "lower it"))
        blocks, network = self.block_num, self.rdma_block_num
        if blocks is not None and network is not None and network >= blocks:
            must = f"be less than block_num={blocks}"
            raise ConfigError(rule("rdma_block_num", network, must, "lower it or raise block_num"))
