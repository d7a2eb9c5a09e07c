"""Which kernel type and which numbers: by tables that these tests write, and what is not believed in them."""

import json

import pytest

import jax_moriep as jm
from jax_moriep.mori import tuning
from jax_moriep.mori.tuning import Hardware

HARDWARE = Hardware("gfx942", "mi300x", 304, ranks=8)
CONFIG = jm.MoEConfig(256, 8, 7168, 2048)


class Tables:
    """A folder of tables. A row is (num_tokens, block_num, warp_per_block), and what else is unusual."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, phase, *rows, kernel="IntraNode", ranks=8, model="mi300x", arch="gfx942"):
        usual = {"dtype": "bf16", "hidden_dim": 7168, "rdma_block_num": 0, "latency_us": 10.0}
        if phase == "combine":
            usual |= {"zero_copy": True, "quant_type": "none"}
        rules = []
        for tokens, blocks, warps, *more in rows:
            numbers = {"num_tokens": tokens, "block_num": blocks, "warp_per_block": warps}
            rules.append(usual | numbers | (more[0] if more else {}))
        path = self.folder / f"{arch}_{model}_{kernel}_ep{ranks}_{phase}.json"
        path.write_text(json.dumps({"version": "1.0", "rules": rules}))
        tuning._rows.cache_clear()

    def launch(self, phase, num_tokens=64, hardware=HARDWARE, cfg=CONFIG, dtype="bfloat16", **more):
        return getattr(tuning.resolve(self.folder, hardware, cfg, num_tokens, dtype, **more), phase)

    def numbers(self, *arguments, **keywords):
        launch = self.launch(*arguments, **keywords)
        return launch.block_num, launch.warp_num_per_block


@pytest.fixture
def tables(tmp_path):
    return Tables(tmp_path)


@pytest.mark.parametrize(
    ("num_tokens", "warps"), [(0, 1), (64, 1), (65, 2), (4096, 2), (4097, 3), (10**6, 3)]
)
def test_the_least_row_with_as_many_tokens(tables, num_tokens, warps):
    tables.write("dispatch", (4096, 64, 2), (8192, 64, 3), (64, 64, 1))
    assert tables.numbers("dispatch", num_tokens) == (64, warps)


def test_the_nearest_hidden_size_and_then_the_nearest_top_k(tables):
    tables.write(
        "dispatch",
        (64, 8, 1, {"hidden_dim": 4096}),
        (64, 8, 2, {"topk": 6}),
        (64, 8, 3, {"topk": 16}),
        (64, 8, 4),
    )

    def warps(hidden, top_k, num_tokens=64):
        cfg = jm.MoEConfig(256, top_k, hidden, 2048)
        return tables.numbers("dispatch", num_tokens, cfg=cfg)[1]

    assert warps(7168, 6) == warps(9999, 1) == 2
    assert warps(7168, 16) == warps(7168, 13) == 3
    assert warps(7168, 8) == 4  # a row without top_k was measured at 8
    assert warps(4096, 16) == 1
    # More tokens than the table has do not lead to another top_k's rows.
    assert warps(7168, 6, 10**6) == 2


def test_types_of_rows(tables):
    tables.write("dispatch", (64, 8, 1, {"dtype": "fp4"}), (64, 8, 2), (64, 8, 3, {"dtype": "fp8_e4m3_fnuz"}))
    assert tables.numbers("dispatch") == tables.numbers("dispatch", dtype="float32") == (8, 2)
    fp8 = jm.MoEConfig(256, 8, 7168, 2048, wire_dtype="fp8")
    assert tables.numbers("dispatch", cfg=fp8) == (8, 3)
    tables.write("combine", (64, 8, 5))
    assert tables.numbers("combine", cfg=fp8, zero_copy=True) == (8, 5)


def test_no_row_at_all(tables):
    assert tables.numbers("dispatch") == (256, 16)
    assert tables.launch("dispatch").source == "no measured row; MORI's default"
    assert tables.numbers("combine", zero_copy=True) == (80, 8)
    tables.write("dispatch", (64, 8, 1, {"dtype": "fp4"}), ranks=4)
    assert tables.numbers("dispatch", hardware=Hardware("gfx942", "mi300x", 304, ranks=4)) == (256, 16)
    assert tables.numbers("dispatch", hardware=Hardware("gfx942", "mi308x", 80, ranks=8)) == (80, 16)


def test_combine_rows_that_are_copies_are_not_believed(tables):
    sends = {"zero_copy": False}
    tables.write("combine", (64, 32, 4), (64, 32, 4, sends), (4096, 80, 4), (4096, 80, 4, sends))
    assert tables.numbers("combine", 64, zero_copy=True) == (32, 4)
    assert tables.numbers("combine", 64) == (256, 8)
    assert tables.numbers("combine", 257) == (256, 16)
    assert "no measured row" in tables.launch("combine").source
    # The same numbers with another time were measured.
    tables.write("combine", (64, 32, 4), (64, 32, 4, sends | {"latency_us": 11.0}))
    assert tables.numbers("combine", 64) == (32, 4)


def test_rows_of_quantised_combine_are_others(tables):
    tables.write("combine", (64, 32, 4, {"quant_type": "fp8_direct_cast"}), (64, 40, 5))
    assert tables.numbers("combine", zero_copy=True) == (40, 5)


@pytest.mark.parametrize(
    ("written", "taken"), [(257, 256), (255, 256), (223, 224), (225, 224), (1, 1), (7, 7)]
)
def test_odd_numbers_of_blocks_are_evened(tables, written, taken):
    tables.write("dispatch", (64, written, 4))
    launch = tables.launch("dispatch")
    assert launch.block_num == taken
    assert (f"its {written} blocks evened" in launch.source) == (written != taken)


def test_more_blocks_than_the_device_holds_are_not_taken(tables):
    tables.write("dispatch", (64, 304, 4), (128, 32, 5))
    assert tables.numbers("dispatch") == (304, 4)
    part = Hardware("gfx942", "mi300x", 38, ranks=8)
    assert tables.numbers("dispatch", hardware=part) == (32, 5)
    tables.write("dispatch", (64, 304, 4))
    assert tables.numbers("dispatch", hardware=part) == (38, 16)


def test_another_models_table(tables):
    tables.write("dispatch", (64, 64, 7), model="mi308x")
    tables.write("dispatch", (64, 64, 9), model="mi300x")
    tables.write("dispatch", (64, 64, 11), model="mi355x", arch="gfx950")
    hardware = Hardware("gfx942", "mi325x", 304, ranks=8)
    assert tables.numbers("dispatch", hardware=hardware) == (64, 9)
    assert "gfx942_mi300x_IntraNode_ep8_dispatch.json" in tables.launch("dispatch", hardware=hardware).source


def test_waves_that_fit_into_the_local_memory(tables):
    tables.write("dispatch", (64, 64, 16), ranks=1)
    one = Hardware("gfx942", "mi300x", 304, ranks=1)
    many = jm.MoEConfig(1000, 8, 7168, 2048)
    assert tables.numbers("dispatch", hardware=one, cfg=many) == (64, 15)
    assert tables.numbers("dispatch", hardware=one) == (64, 16)


def test_the_low_latency_kernel_needs_three_waves(tables):
    cfg = jm.MoEConfig(256, 8, 7168, 2048, tuning=jm.Tuning("IntraNodeLL"))
    tables.write("dispatch", (64, 64, 1), kernel="IntraNodeLL")
    assert tables.numbers("dispatch", cfg=cfg) == (64, 3)


@pytest.mark.parametrize(
    ("nodes", "num_tokens", "kernel"),
    [(1, 1, "IntraNode"), (1, 10**5, "IntraNode"), (2, 256, "InterNodeV1LL"), (2, 257, "InterNodeV1")],
)
def test_the_kernel_that_auto_takes(tables, nodes, num_tokens, kernel):
    hardware = Hardware("gfx942", "mi300x", 304, ranks=8 * nodes, nodes=nodes)
    found = tuning.resolve(tables.folder, hardware, CONFIG, num_tokens, "bfloat16")
    assert found.kernel == kernel
    assert str(found).startswith(f"mori_kernel: {kernel} (")
    assert "\n  dispatch: 256 blocks" in str(found) or kernel == "InterNodeV1"


def test_the_kernel_and_the_numbers_that_the_user_names(tables):
    tables.write("dispatch", (64, 64, 7))
    cfg = jm.MoEConfig(256, 8, 7168, 2048, tuning=jm.Tuning("IntraNode", block_num=33))
    found = tuning.resolve(tables.folder, HARDWARE, cfg, 64, "bfloat16")
    assert found.why == "named by cfg.tuning"
    assert (found.dispatch.block_num, found.dispatch.warp_num_per_block) == (33, 7)
    assert found.dispatch.source.startswith("block_num by cfg.tuning, the rest: gfx942_mi300x")
    whole = jm.MoEConfig(256, 8, 7168, 2048, tuning=jm.Tuning("InterNodeV1", 33, 5, 3))
    found = tuning.resolve(tables.folder, HARDWARE, whole, 64, "bfloat16")
    assert (
        str(found.combine)
        == "33 blocks, 3 of them for the network, of 5 waves (block_num, warp_num_per_block, "
        "rdma_block_num by cfg.tuning)"
    )


def test_the_network_leaves_blocks_to_the_machine(tables):
    hardware = Hardware("gfx942", "mi308x", 80, ranks=16, nodes=2)
    launch = tables.launch("dispatch", hardware=hardware)  # MORI's default has 128 of 256 for the network
    assert (launch.block_num, launch.rdma_block_num) == (80, 40)
    tables.write("dispatch", (64, 64, 4, {"rdma_block_num": 42}), kernel="InterNodeV1LL", ranks=16)
    launch = tables.launch("dispatch", hardware=Hardware("gfx942", "mi300x", 304, ranks=16, nodes=2))
    assert (launch.block_num, launch.rdma_block_num) == (64, 42)


@pytest.mark.parametrize(
    ("arch", "kind", "model"),
    [
        ("gfx942", "AMD Instinct MI300X OAM", "mi300x"),
        ("gfx942", "AMD Instinct MI308X", "mi308x"),
        ("gfx942", "Simulated gfx942", "mi300x"),
        ("gfx950", "AMD Instinct MI350X", "mi350x"),
        ("gfx90a", "AMD Instinct MI250X", "unknown"),
    ],
)
def test_the_model(arch, kind, model):
    assert tuning.model_of(arch, kind) == model


def test_tuning_in_a_config():
    assert CONFIG.tuning is None
    cfg = jm.MoEConfig(8, 2, 16, 8, tuning=jm.Tuning(block_num=64))
    assert hash(cfg) == hash(jm.MoEConfig(8, 2, 16, 8, tuning=jm.Tuning(block_num=64)))
    assert cfg != jm.MoEConfig(8, 2, 16, 8)
    assert "tuning=Tuning(mori_kernel='auto', block_num=64" in cfg.describe()
    with pytest.raises(jm.ConfigError, match=r"tuning=64 must be a jm.Tuning or None; pass jm.Tuning\(...\)"):
        jm.MoEConfig(8, 2, 16, 8, tuning=64)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mori_kernel": "Intra"}, "mori_kernel='Intra' must be one of ('auto', 'IntraNode', "),
        ({"block_num": 0}, "block_num=0 must be at least 1; pass None to leave it to the tables"),
        ({"block_num": 2.0}, "block_num=2.0 must be an integer; pass an int, or None for the tables"),
        ({"rdma_block_num": True}, "rdma_block_num=True must be an integer; "),
        (
            {"warp_num_per_block": 17},
            "warp_num_per_block=17 must be at most 16, which are 1024 threads; lower it",
        ),
        ({"block_num": 4, "rdma_block_num": 4}, "rdma_block_num=4 must be less than block_num=4; "),
    ],
)
def test_tuning_values(given, text):
    with pytest.raises(jm.ConfigError) as caught:
        jm.Tuning(**given)
    assert str(caught.value).startswith(text)
