"""What MORI would answer by ending the process or by waiting is refused, with value, rule and cure."""

import dataclasses
import re
from pathlib import Path

import pytest

from jax_moriep.errors import ConfigError, TransportError
from jax_moriep.mori import limits
from jax_moriep.mori.limits import HandleSize

SIZE = HandleSize("IntraNode", 8, 8, 4096, 7168, 2, 32, 8)

# Bisected with the real library, which dies when its heap has a byte less; without HEAP_OWN_BYTES.
MEASURED = {
    HandleSize("IntraNode", 2, 2, 64, 256, 2, 8, 2, 0, 0): 177664,
    HandleSize("IntraNode", 1, 1, 1, 8, 4, 1, 1, 0, 0): 4096,
    HandleSize("IntraNode", 8, 8, 128, 7168, 2, 32, 8, 56, 4): 32250624,
    HandleSize("InterNodeV1", 16, 8, 64, 256, 2, 8, 8, 2, 4): 1639168,
    HandleSize("InterNodeV1LL", 16, 8, 64, 256, 2, 8, 8, 0, 0): 1611008,
    HandleSize("AsyncLL", 8, 8, 7, 256, 2, 3, 3, 0, 0): 130304,
    HandleSize("InterNode", 16, 8, 5, 128, 1, 2, 2, 1, 4): 56320,
    HandleSize("IntraNodeLL", 3, 1, 9, 100, 4, 5, 7, 0, 0): 33792,
}


@pytest.mark.parametrize("size", MEASURED, ids=lambda size: f"{size.kernel}-{size.ranks}")
def test_heap_bytes(size):
    assert limits.heap_bytes(size) == MEASURED[size]


def refused(kind, text, check, *arguments, **keywords):
    """The call must be refused with this text, in which … stands for anything."""
    pattern = ".*".join(map(re.escape, text.split("…")))
    with pytest.raises(kind, match=f"^{pattern}$"):
        check(*arguments, **keywords)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("1M", 2**20),
        ("1mb", 2**20),
        ("1MiB", 2**20),
        ("3K", 3072),
        ("4G", 2**32),
    ],
)
def test_parse_heap_size(text, size):
    assert limits.parse_heap_size(text) == size


@pytest.mark.parametrize("text", ["1T", "0.5G", "1e6", "0x1000", "-1", "", "abc"])
def test_a_heap_size_that_mori_misreads(text):
    refused(
        ConfigError,
        f"MORI_SHMEM_HEAP_SIZE={text!r} must be a whole number with K, M, G or nothing; write whole bytes, …",
        limits.parse_heap_size,
        text,
    )


def test_a_heap_that_is_too_small():
    limits.check_heap(2**20, None)
    limits.check_heap(2**20, "1M")
    refused(
        ConfigError,
        "MORI_SHMEM_HEAP_SIZE='1M' must be at least the 1048577 bytes of this group's buffers; raise it, …",
        limits.check_heap,
        2**20 + 1,
        "1M",
    )


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("MORI_SHMEM_MODE", "isolation", "static_heap"),
        ("MORI_SHMEM_MODE", "vmm_heap", "static_heap"),
        ("MORI_SHMEM_HEAP_TYPE", "normal", "uncached"),
        ("MORI_DISABLE_P2P", "1", "0"),
    ],
)
def test_settings_of_mori(name, bad, good):
    limits.check_environment({})
    limits.check_environment({name: good})
    text = f"{name}={bad!r} must be unset or {good!r}; unset it"
    refused(TransportError, text, limits.check_environment, {name: bad})


def test_several_gpus_in_a_process():
    limits.check_process(1)
    refused(
        TransportError,
        "local_devices=2 must be 1 with transport='mori'; start one process per GPU (jax-moriep launch …",
        limits.check_process,
        2,
    )


@pytest.mark.parametrize(("ranks", "told"), [(1, 1), (2, 2), (3, 1), (4, 4), (5, 1), (6, 2), (7, 1), (8, 8)])
def test_gpus_per_node_on_one_machine(ranks, told):
    for kernel in ("IntraNode", "IntraNodeLL"):
        assert limits.gpus_per_node(kernel, ranks, 1) == told


def test_gpus_per_node_on_several_machines():
    assert limits.gpus_per_node("InterNodeV1", 16, 2) == 8
    assert limits.gpus_per_node("InterNodeV1LL", 8, 2) == 4
    assert limits.gpus_per_node("InterNode", 16, 2) == 8
    check = limits.gpus_per_node
    refused(
        TransportError, "ranks=9 must be at most 8 on a machine with MORI; use …", check, "IntraNode", 9, 1
    )
    refused(TransportError, "ranks=32 must be at most 8 on a machine …", check, "InterNodeV1", 32, 2)
    text = "mori_kernel='IntraNode' must reach 2 machines, and stays on one; use mori_kernel='InterNodeV1', …"
    refused(TransportError, text, check, "IntraNode", 16, 2)
    text = "gpus_per_node=6 must be a power of two with InterNodeV1; use 1, 2, 4 or 8 GPUs of each machine"
    refused(TransportError, text, check, "InterNodeV1", 12, 2)
    text = (
        "gpus_per_node=4 must be 8 with InterNode, which counts so; use all 8, or mori_kernel='InterNodeV1'"
    )
    refused(TransportError, text, check, "InterNode", 8, 2)
    refused(TransportError, "ranks=9 must be the same on each of 2 machines; …", check, "InterNodeV1", 9, 2)


def test_kernel_types():
    for kernel, nodes in (("IntraNode", 1), ("IntraNodeLL", 1), ("InterNodeV1", 2), ("InterNodeV1LL", 2)):
        limits.check_kernel(kernel, nodes)
    check = limits.check_kernel
    for kernel in ("InterNode", "AsyncLL"):
        text = f"mori_kernel={kernel!r} must be one of IntraNode, IntraNodeLL, InterNodeV1, InterNodeV1LL; …"
        for nodes in (1, 2):
            refused(ConfigError, text, check, kernel, nodes)
    for kernel in ("InterNodeV1", "InterNodeV1LL"):
        text = f"mori_kernel={kernel!r} must be IntraNode or IntraNodeLL on one machine, for it sends …"
        refused(ConfigError, text, check, kernel, 1)


def test_experts_per_rank():
    assert limits.experts_per_rank(256, 8) == 32
    text = "num_experts=10 must be divisible by the 4 ranks with MORI; pad the experts (jm.pad_params; …"
    refused(ConfigError, text, limits.experts_per_rank, 10, 4)


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float64"])
def test_types_of_rows(dtype):
    for good in ("float32", "bfloat16", "float8_e4m3fnuz"):
        limits.check_rows("x.dtype", good)
    text = (
        f"x.dtype={dtype!r} must be one of float32, bfloat16, float8_e4m3fnuz with transport='mori'; cast …"
    )
    refused(ConfigError, text, limits.check_rows, "x.dtype", dtype)


def test_top_k():
    limits.check_handle(SIZE)
    low_latency = dataclasses.replace(SIZE, kernel="IntraNodeLL")
    limits.check_handle(low_latency)
    limits.check_handle(dataclasses.replace(SIZE, top_k=63))
    text = "top_k=9 must be at most 8 with IntraNodeLL; use mori_kernel='IntraNode'"
    refused(ConfigError, text, limits.check_handle, dataclasses.replace(low_latency, top_k=9))
    text = "top_k=64 must be at most 63 with IntraNode; lower top_k"
    refused(ConfigError, text, limits.check_handle, dataclasses.replace(SIZE, top_k=64))


def test_places_that_can_be_counted():
    # A place is numbered rank * (R * M) + place below R * M, and R * R * M, which is none, must fit as well.
    most = 2**24 - 1
    limits.check_handle(dataclasses.replace(SIZE, max_tokens=most))
    text = f"max_tokens={most + 1} must be at most {most} with ranks=8 and top_k=8; give each rank fewer …"
    refused(ConfigError, text, limits.check_handle, dataclasses.replace(SIZE, max_tokens=most + 1))
    one = dataclasses.replace(SIZE, ranks=1, gpus_per_node=1)
    limits.check_handle(dataclasses.replace(one, max_tokens=2**28 - 1))
    text = f"max_tokens={2**28} must be at most {2**28 - 1} with ranks=1 and top_k=8; …"
    refused(ConfigError, text, limits.check_handle, dataclasses.replace(one, max_tokens=2**28))


@pytest.mark.parametrize(
    "name", ["ranks", "max_tokens", "hidden", "element_bytes", "experts_per_rank", "top_k"]
)
def test_sizes_are_positive(name):
    text = f"{name}=0 must be at least 1; pass a positive int"
    refused(ConfigError, text, limits.check_handle, dataclasses.replace(SIZE, **{name: 0}))


@pytest.mark.parametrize(("hidden", "scales"), [(7168, 0), (7168, 56), (200, 2)])
def test_scales(hidden, scales):
    """MORI copies them as bytes beside the rows: their number need not divide a row."""
    limits.check_handle(dataclasses.replace(SIZE, hidden=hidden, scales=scales))


def test_more_tokens_than_the_handle_holds():
    for good in (0, 1, 4096):
        limits.check_tokens(good, SIZE)
    text = "num_tokens=4097 must be at most the 4096 tokens per rank that the group was opened for; open …"
    refused(ConfigError, text, limits.check_tokens, 4097, SIZE)


def test_blocks():
    check = limits.check_launch
    check(SIZE, 304, 304, 16, 0)
    text = "block_num=305 must be between 1 and the device's 304 compute units, for all …; lower it, …"
    refused(ConfigError, text, check, SIZE, 304, 305, 16, 0)
    refused(ConfigError, "block_num=0 must be between 1 and …", check, SIZE, 304, 0, 16, 0)


def test_waves():
    check = limits.check_launch
    text = "warp_num_per_block=17 must be between 1 and 16 with IntraNode; choose such a number, …"
    refused(ConfigError, text, check, SIZE, 304, 80, 17, 0)
    low_latency = dataclasses.replace(SIZE, kernel="IntraNodeLL")
    check(low_latency, 304, 80, 3, 0)
    text = "warp_num_per_block=2 must be between 3 and 16 with IntraNodeLL; …"
    refused(ConfigError, text, check, low_latency, 304, 80, 2, 0)


def test_local_memory():
    check = limits.check_launch
    many = dataclasses.replace(SIZE, ranks=1, gpus_per_node=1, experts_per_rank=1000)
    # 4 * (w + 1000 * (w + 1)) bytes of the 64512 that are left: w = 15 takes 64060, w = 16 takes 68064.
    check(many, 304, 80, 15, 0)
    text = "warp_num_per_block=16 must be at most 15 with 1000 experts per rank, whose counts …; lower it"
    refused(ConfigError, text, check, many, 304, 80, 16, 0)
    # w = 15 takes 64572 bytes, which only the kernels' own variables make too many.
    check(dataclasses.replace(many, experts_per_rank=1008), 304, 80, 14, 0)
    text = "warp_num_per_block=15 must be at most 14 with 1008 experts per rank, …"
    refused(ConfigError, text, check, dataclasses.replace(many, experts_per_rank=1008), 304, 80, 15, 0)
    most = dataclasses.replace(many, experts_per_rank=20000)
    text = "warp_num_per_block=1 must be at most 0 with 20000 …; use more ranks, or another transport"
    refused(ConfigError, text, check, most, 304, 80, 1, 0)


def test_blocks_for_the_network():
    check = limits.check_launch
    size = dataclasses.replace(SIZE, kernel="InterNodeV1", ranks=16)
    check(size, 304, 64, 8, 63)
    for bad in (0, 64):
        text = f"rdma_block_num={bad} must be at least 1 and leave one of block_num=64 to the machine's own …"
        refused(ConfigError, text, check, size, 304, 64, 8, bad)


def test_ranks_of_a_node_are_next_to_each_other():
    for good in (((0, 0, 0),), ((0, 1),), ((0, 0, 1, 1), (0, 0, 1, 1))):
        limits.check_nodes(good)
    for bad in ((0, 1, 0, 1), (0, 0, 0, 1), (0, 0, 1)):
        text = f"node_of_ranks={bad} must be as many on each machine, and those of a machine next to each …"
        refused(TransportError, text, limits.check_nodes, (bad,))


def test_what_the_kernels_between_nodes_cannot_do():
    size = HandleSize("InterNodeV1", 16, 8, 64, 256, 2, 2, 2)
    limits.check_handle(size)
    check = limits.check_handle
    text = "top_k=1 must be at least the 2 machines with InterNodeV1; use transport='two_level'"
    refused(ConfigError, text, check, dataclasses.replace(size, top_k=1))
    text = (
        "hidden_size=33 must make rows of whole 32-bit words of x, which have 66 bytes, with InterNodeV1; …"
    )
    refused(ConfigError, text, check, dataclasses.replace(size, hidden=33))
    text = "hidden_size=34 must make rows of whole 32-bit words of wire, which have 34 bytes, …"
    refused(ConfigError, text, check, dataclasses.replace(size, hidden=34, scales=1))
    low_latency = dataclasses.replace(size, kernel="InterNodeV1LL")
    limits.check_handle(low_latency)
    text = (
        "experts_per_rank=1 must be at least 2 with InterNodeV1LL; use mori_kernel='InterNodeV1', or 'auto'"
    )
    refused(ConfigError, text, check, dataclasses.replace(low_latency, experts_per_rank=1))


def test_memory_between_nodes():
    one = HandleSize("IntraNode", 8, 8, 64, 256, 2, 8, 8)
    assert (limits.between_bytes(one), limits.notice_bytes(1)) == (0, 0)
    # Three sets of flags, one for 64 tokens and one total for each of two nodes.
    assert limits.between_bytes(HandleSize("InterNodeV1", 16, 8, 65, 256, 2, 8, 8)) == 256
    assert limits.between_bytes(HandleSize("InterNodeV1LL", 16, 8, 4096, 256, 2, 8, 8)) == 3328


def test_notices_are_as_large_as_their_header_says():
    header = (Path(limits.__file__).parent / "relay.h").read_text()
    notice = int(re.findall(r"kNoticeBytes = size_t{(\d+)} << 10", header)[0]) << 10
    counts = int(re.findall(r"kCountBytes = (\d+)", header)[0])
    assert limits.notice_bytes(4) == counts + 2 * 5 * notice
