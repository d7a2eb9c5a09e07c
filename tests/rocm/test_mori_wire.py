"""The fp8 wire of transport="mori": what arrives, to the bit, and what it costs."""

import pytest

from tests.rocm import counters, mori_jobs, wire_oracle
from tests.rocm.test_mori_exchange import ADVERSARIAL, RECORDED

RANKS, TOKENS, HIDDEN, TOP_K = 4, 64, 512, 8
# Bytes of a row on the wire, and of the ids, weights and source that go with it.
PACKED = HIDDEN + 4 * wire_oracle.num_scales(HIDDEN)
ROUTING = 8 * TOP_K + 4


@pytest.mark.parametrize(
    ("ranks", "several", "environment"),
    [
        (1, [{"hidden": 256}], {}),
        (
            2,
            [
                {"hidden": 128, "dtype": "bfloat16"},
                {"hidden": 200},
                {"hidden": 33, "dtype": "bfloat16"},
                {"hidden": 256, "tokens": 0},
            ],
            RECORDED | ADVERSARIAL,
        ),
        (
            4,
            [
                {"hidden": 256, "dtype": "bfloat16"},
                {"hidden": 200, "dtype": "bfloat16", "experts": 7, "kernel": "IntraNodeLL"},
            ],
            ADVERSARIAL,
        ),
    ],
)
def test_what_arrives_is_rounded_once(ranks, several, environment):
    """And what goes back along the plan, or again, is not rounded at all."""
    cases = [("round_trip", options | {"wire": "fp8"}) for options in several]
    mori_jobs.run_cases(ranks, *cases, **environment)


def test_after_a_failure_a_new_beginning_is_right():
    options = {"timeout": 30, "wire": "fp8", "hidden": 200}
    for out in mori_jobs.run_cases(2, ("another_program", options), JAX_MORIEP_TIMEOUT="30"):
        assert "runs another program" in out


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """For each wire and rank, of one send of bfloat16: sums by kernel, arrivals, copies to peers."""
    options = {"tokens": TOKENS, "hidden": HIDDEN, "top_k": TOP_K, "dtype": "bfloat16"}
    found = {}
    for wire in (None, "fp8"):
        path = tmp_path_factory.mktemp("counts") / "counts"
        case = ("send_alone", options | {"wire": wire})
        said = mori_jobs.run_cases(RANKS, case, ROCM_SIM_COUNT=str(path))
        numbers = [out.split("came and gone: ")[1].split()[:2] for out in said]
        found[wire] = [(counters.by_kernel(path, rank), *map(int, numbers[rank])) for rank in range(RANKS)]
    return found


def sum_of(kernels, name):
    """The one kernel whose name has this in it."""
    (key,) = [key for key in kernels if name in key]
    return kernels[key]


def moved(kernel):
    return sum(kernel[f"{home}.{way}"] for home in ("own", "peer", "host") for way in ("read", "written"))


def test_our_kernels_move_what_the_wire_needs_and_little_more(counted):
    for kernels, came, _ in counted["fp8"]:
        needs = TOKENS * (2 * HIDDEN + PACKED)
        quantise = sum_of(kernels, "quantise_kernel")
        assert quantise["launches"] == 1
        assert needs <= moved(quantise) <= 1.1 * needs
        # What says where a token is from is written twice, once as MORI numbers it.
        needs = came * (PACKED + 2 * HIDDEN + 2 * ROUTING + 4)
        collect = sum_of(kernels, "collect_kernel")
        assert collect["launches"] == 1
        assert needs <= moved(collect) <= 1.1 * needs


def test_half_the_bytes_go_to_other_devices(counted):
    """Of MORI's kernel, against the same routes in bfloat16."""
    for plain, fp8 in zip(counted[None], counted["fp8"], strict=True):
        assert plain[1:] == fp8[1:]
        gone = fp8[2]
        more = sum_of(plain[0], "EpDispatchIntraNodeKernel_bf16")["peer.written"]
        less = sum_of(fp8[0], "EpDispatchIntraNodeKernel_fp8_fnuz")["peer.written"]
        assert gone * (PACKED + ROUTING) <= less <= 1.1 * gone * (PACKED + ROUTING)
        assert less <= 0.56 * more
