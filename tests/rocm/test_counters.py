"""ROCM_SIM_COUNT: kernels whose instructions and bytes are known, and the copies of two processes."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.rocm import counter_cases as cases
from tests.rocm import counters, simulated

SOURCE = Path(__file__).parent / "kernels" / "counted_kernels.hip"
ITEMS = cases.ITEMS
NOTHING = {"read": 0, "written": 0, "atomic": 0, "lines_read": 0, "lines_written": 0}


@pytest.fixture(scope="module")
def code_object(tmp_path_factory):
    return simulated.compile_kernels(SOURCE, tmp_path_factory.mktemp("kernels") / "counted.hsaco")


@pytest.fixture(scope="module")
def counted(code_object, tmp_path_factory):
    path = tmp_path_factory.mktemp("counts") / "counts"
    simulated.run(simulated.PYTHON, "-m", cases.__name__, code_object, devices=2, ROCM_SIM_COUNT=str(path))
    return path


def launches(path, name):
    return [one for one in counters.read(path) if one["name"] == name]


# What an instruction is, by its first letters; the first that fits counts.
KINDS = [
    ("mfma", "v_mfma"),
    ("valu", "v_"),
    ("lds", "ds_"),
    ("branch", "s_c?branch"),
    ("smem", "s_load"),
    ("salu", "s_"),
    ("atomic", "global_atomic"),
    ("load", "global_load"),
    ("store", "global_store"),
    ("cache", "buffer_(wbl2|inv)"),
]


def instructions_of(code_object, kernel):
    """Counts of a kernel without branches, from its disassembly up to the end of the program."""
    command = ["llvm-objdump-19", "-d", "--mcpu=gfx942", f"--disassemble-symbols={kernel}", code_object]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = Counter()
    for line in text.splitlines():
        if match := re.match(r"\t(\w+)", line):
            counts[next(kind for kind, begin in KINDS if re.match(begin, match[1]))] += 1
            if match[1] == "s_endpgm":
                return counts
    raise AssertionError(text)


@pytest.mark.parametrize(("kernel", "waves"), [("copy_rows", 6), ("read_far", 6), ("add", 6), ("mixed", 2)])
def test_instructions_by_kind(code_object, counted, kernel, waves):
    once = instructions_of(code_object, kernel)
    if kernel == "mixed":
        assert set(once) == {kind for kind, _ in KINDS if kind != "branch"}
    for launch in launches(counted, kernel):
        assert launch["instructions"] == {kind: waves * once[kind] for kind, _ in KINDS}


def test_a_loop_counts_every_round(counted):
    few, many = (Counter(launch["instructions"]) for launch in launches(counted, "loop"))
    more = 2 * (cases.ROUNDS[1] - cases.ROUNDS[0])  # of two waves
    many.subtract(few)
    assert {kind: count for kind, count in many.items() if count} == {
        "valu": 2 * more,
        "salu": 3 * more,
        "branch": more,
    }


def test_bytes_by_whose_memory_it_is(counted):
    size = cases.ROW * ITEMS
    read = NOTHING | {"read": size, "lines_read": size // 64}
    written = NOTHING | {"written": size, "lines_written": size // 64}
    both = written | {"read": size, "lines_read": size // 64}
    found = [tuple(one[home] for home in ("own", "peer", "host")) for one in launches(counted, "copy_rows")]
    assert found == [
        (both, NOTHING, NOTHING),
        (written, read, NOTHING),
        (read, written, NOTHING),
        (written, NOTHING, read),
        (read, NOTHING, written),
    ]


def test_lines_are_counted_once(counted):
    (launch,) = launches(counted, "read_far")
    assert launch["own"] == {
        "read": 4 * ITEMS,
        "written": 4 * ITEMS,
        "atomic": 0,
        "lines_read": ITEMS,
        "lines_written": 4 * ITEMS // 64,
    }


def test_atomics_are_bytes_of_their_own(counted):
    (launch,) = launches(counted, "add")
    assert launch["peer"] == NOTHING | {"atomic": 4 * ITEMS, "lines_written": 4 * ITEMS // 64}
    assert launch["own"] == NOTHING


def test_a_launch_says_what_it_was(counted):
    (launch,) = launches(counted, "add")
    assert launch["grid"] == [cases.GRID, 1, 1]
    assert launch["block"] == [cases.BLOCK, 1, 1]
    assert launch["device"] == 0
    assert counters.read(counted, device=1) == []


def test_sums_by_kernel(counted):
    sums = counters.by_kernel(counted)["copy_rows"]
    size = cases.ROW * ITEMS
    assert sums["launches"] == 5
    assert (sums["own.read"], sums["own.written"]) == (3 * size, 3 * size)
    assert (sums["peer.read"], sums["peer.written"], sums["host.read"]) == (size, size, size)
    assert sums["load"] == 5 * 6


def test_copies_and_fills(counted):
    (fill,) = counters.read(counted, "fill")
    assert (fill["bytes"], fill["to"]) == (100, "own")
    copies = [(copy["bytes"], copy["from"], copy["to"]) for copy in counters.read(counted, "copy")]
    assert copies == [(101, "own", "own"), (102, "own", "peer"), (103, "host", "own")]


def test_memory_of_another_process_is_a_peers(tmp_path):
    owner = simulated.start(simulated.PYTHON, "-m", "tests.rocm.ipc_owner", stdin=True)
    handle, path = owner.stdout.readline().strip(), tmp_path / "counts"
    simulated.run(simulated.PYTHON, "-m", "tests.rocm.ipc_peer", handle, ROCM_SIM_COUNT=str(path))
    simulated.finish(owner, deadline=60)
    copies = [(copy["from"], copy["to"]) for copy in counters.read(path, "copy")]
    assert copies == [("peer", "host"), ("host", "peer")]
