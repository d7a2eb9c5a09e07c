"""What kernels must not do ends them with a text that says where, what and why."""

import re

import numpy as np
import pytest

from isa import kernels, simulator, toolchain

# Kernels get one buffer of 256 bytes, s[8:9]; v0 is the lane, v1 four times the lane.
START = """s_load_dwordx2 s[8:9], s[0:1], 0x0
v_and_b32 v0, 0x3ff, v0
v_lshlrev_b32 v1, 2, v0
s_waitcnt lgkmcnt(0)
"""
WAIT = "\ns_waitcnt vmcnt(0) lgkmcnt(0)"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs kernels' bodies, a code object for each, and gives what they left."""
    toolchain.simulator()
    folder = tmp_path_factory.mktemp("checks")
    made = []

    def launch(body, *options, block=(64, 1, 1), grid=(1, 1, 1), lds=0, words=64):
        made.append(body)
        here = folder / str(len(made))
        here.mkdir()
        source = kernels.source([kernels.Kernel("guilty", START + body, 1, lds=lds)])
        code = toolchain.assemble(source, here / "guilty.co")
        one = simulator.Launch("guilty", [np.zeros(words, np.uint32)], grid, block)
        return simulator.run(code, [one], here, *options)[0]

    return launch


def assert_says(fault, *parts):
    """Every fault names the kernel and the place; the rest depends on it."""
    assert fault is not None, "no fault"
    for part in ("guilty", r"pc 0x[0-9a-f]+", *parts):
        assert re.search(part, fault), f"no {part!r} in: {fault}"


@pytest.mark.parametrize(
    ("access", "does"),
    [
        ("global_load_dword v2, v1, s[8:9] offset:4", "loads 4 bytes"),
        ("global_store_dword v1, v0, s[8:9] offset:4", "stores 4 bytes"),
        ("global_atomic_add v1, v0, s[8:9] offset:4", "bytes"),
        ("global_load_dwordx4 v[4:7], v1, s[8:9]", "loads 16 bytes"),
        ("global_store_byte v1, v0, s[8:9] offset:4", "stores 1 byte"),
    ],
)
def test_lanes_beyond_an_allocation(launched, access, does):
    # Lane 63 is the first whose word is not inside; of 16 bytes lane 61 is.
    lane = 61 if "x4" in access else 63
    fault = launched(access + WAIT).fault
    # Four words from lane 61 on begin inside; the others begin behind the end.
    where = "buffer 0" if "x4" in access else "no allocation"
    assert_says(
        fault, r"entry\+0x", re.escape(access.split()[0]), rf"lane {lane}\b", does, r"at 0x[0-9a-f]+", where
    )


def test_the_last_word_of_an_allocation_is_inside(launched):
    result = launched("global_store_dword v1, v0, s[8:9]" + WAIT)
    assert result.fault is None
    np.testing.assert_array_equal(result.buffers[0], np.arange(64))


def test_lanes_that_are_off_may_point_anywhere(launched):
    body = "v_add_u32 v1, 0x100000, v1\ns_mov_b64 exec, 1\nv_mov_b32 v1, 0\n"
    assert launched(body + "global_store_dword v1, v0, s[8:9]" + WAIT).fault is None


def test_the_null_pointer(launched):
    fault = launched("v_mov_b32 v2, 0\nv_mov_b32 v3, 0\nglobal_load_dword v4, v[2:3], off" + WAIT).fault
    assert_says(fault, "global_load_dword", r"lane 0\b", r"0x0\b")


def test_scalar_loads_beyond_an_allocation(launched):
    fault = launched("s_load_dwordx4 s[12:15], s[8:9], 0xf8" + WAIT).fault
    assert_says(fault, "s_load_dwordx4", r"0x[0-9a-f]+", "buffer 0")


def test_the_kernel_arguments_are_read_only(launched):
    fault = launched("v_mov_b32 v2, 0\nglobal_store_dword v2, v0, s[0:1]" + WAIT).fault
    assert_says(fault, "global_store_dword", "the kernel arguments")


@pytest.mark.parametrize(
    "access", ["ds_write_b32 v1, v0 offset:4", "ds_read_b32 v2, v1 offset:4", "ds_add_u32 v1, v0 offset:4"]
)
def test_lanes_beyond_the_lds_of_the_workgroup(launched, access):
    fault = launched(access + WAIT, lds=256).fault
    assert_says(fault, access.split()[0], r"lane 63\b", "LDS", "256|0x100")


@pytest.mark.parametrize("access", ["global_atomic_add v2, v0, s[8:9]", "ds_add_u32 v2, v0"])
def test_atomics_have_to_be_aligned(launched, access):
    fault = launched("v_mov_b32 v2, 2\n" + access + WAIT, lds=256).fault
    assert_says(fault, access.split()[0], r"lane 0\b", "misaligned")


def test_a_plain_access_may_be_misaligned(launched):
    body = "s_mov_b64 exec, 1\nv_mov_b32 v2, 2\nglobal_store_dword v2, v2, s[8:9]"
    result = launched(body + WAIT)
    assert result.fault is None
    assert result.buffers[0][0] == 2 << 16


# The second wave ends while the first waits, or before it does.
LEFT_BARRIER = """v_readfirstlane_b32 s10, v0
s_cmp_lg_u32 s10, 0
s_cbranch_scc1 .Lend
s_barrier
.Lend:"""


def test_a_barrier_that_a_wave_has_left_where_asked_to_check(launched):
    assert_says(launched(LEFT_BARRIER, "--check-barriers", block=(128, 1, 1)).fault, "barrier")


def test_a_barrier_waits_for_the_surviving_waves_only(launched):
    assert launched(LEFT_BARRIER, block=(128, 1, 1)).fault is None


DIFFERENT_BARRIERS = """v_readfirstlane_b32 s10, v0
s_cmp_lg_u32 s10, 0
s_cbranch_scc1 .Lother
s_barrier
s_branch .Lend
.Lother:
s_barrier
.Lend:"""


def test_waves_meet_at_different_barriers_where_asked_to_check(launched):
    fault = launched(DIFFERENT_BARRIERS, "--check-barriers", block=(128, 1, 1)).fault
    assert_says(fault, "s_barrier", "barrier while others")


def test_hardware_does_not_care_which_barrier_it_is(launched):
    assert launched(DIFFERENT_BARRIERS, block=(128, 1, 1)).fault is None


# Each of two waves stores to its own words and then uses those at a distance, with or without a barrier.
SHARED = """v_lshlrev_b32 v2, 2, v0
ds_write_b32 v2, v0
s_waitcnt lgkmcnt(0)
{between}
v_xor_b32 v2, {distance}, v2
{then}"""


@pytest.mark.parametrize(
    ("then", "did"),
    [
        ("ds_read_b32 v3, v2", "loaded"),
        ("ds_write_b32 v2, v0", "stored"),
        ("ds_add_u32 v2, v0", "updated"),
    ],
)
def test_a_missing_barrier_where_asked_to_check(launched, then, did):
    def fault(between, distance):
        body = SHARED.format(between=between, distance=distance, then=then) + WAIT
        return launched(body, "--check-races", block=(128, 1, 1), lds=512).fault

    # The first wave is done with both when the second one stores.
    assert_says(
        fault("", 256),
        "wave 1",
        f"stores 4 bytes at 0x100 of LDS, which wave 0 has {did} and no barrier since",
    )
    assert fault("s_barrier", 256) is None
    assert fault("", 0) is None


# The first wave loads what the second one stores.
LOADED_THEN_STORED = """v_and_b32 v2, 0xfc, v1
v_readfirstlane_b32 s10, v0
s_cmp_lg_u32 s10, 0
s_cbranch_scc1 .Lsecond
ds_read_b32 v3, v2
{between}
s_branch .Lend
.Lsecond:
{between}
ds_write_b32 v2, v0
.Lend:"""


def test_a_store_to_what_another_wave_loads_where_asked_to_check(launched):
    def fault(between):
        body = LOADED_THEN_STORED.format(between=between) + WAIT
        return launched(body, "--check-races", block=(128, 1, 1), lds=256).fault

    assert_says(fault(""), "stores 4 bytes", "of LDS, which wave 0 has loaded and no barrier since")
    assert fault("s_barrier") is None


def test_atomics_of_several_waves_need_no_barrier(launched):
    body = "v_mov_b32 v2, 0\nds_add_u32 v2, v0" + WAIT
    assert launched(body, "--check-races", block=(128, 1, 1), lds=16).fault is None


def test_barriers_order_waves(launched):
    # Each wave passes its number on through LDS, four times; without a barrier some would read too early.
    body = """v_readfirstlane_b32 s10, v0
s_lshr_b32 s10, s10, 6
v_mov_b32 v4, 0
s_movk_i32 s12, 4
.Lround:
s_lshl_b32 s11, s10, 2
v_mov_b32 v2, s11
s_add_u32 s13, s10, s12
v_mov_b32 v3, s13
ds_write_b32 v2, v3
s_waitcnt lgkmcnt(0)
s_barrier
s_add_u32 s11, s10, 1
s_and_b32 s11, s11, 3
s_lshl_b32 s11, s11, 2
v_mov_b32 v2, s11
ds_read_b32 v3, v2
s_waitcnt lgkmcnt(0)
v_lshl_add_u32 v4, v4, 4, v3
s_barrier
s_sub_u32 s12, s12, 1
s_cmp_lg_u32 s12, 0
s_cbranch_scc1 .Lround
global_store_dword v1, v4, s[8:9]"""
    for seed in ("1", "2", "3"):
        result = launched(body + WAIT, "--seed", seed, block=(256, 1, 1), lds=16, words=256)
        assert result.fault is None
        waves = np.arange(256) // 64
        right = sum((((waves + 1) % 4) + 4 - r) << (4 * (3 - r)) for r in range(4))
        np.testing.assert_array_equal(result.buffers[0], right)


def test_a_wave_that_never_ends(launched):
    fault = launched(".Lforever:\ns_sleep 1\ns_branch .Lforever", "--deadline", "1").fault
    assert_says(fault, "no wave has ended for 1", "s_branch|s_sleep")


def test_waiting_for_a_store_that_does_not_come(launched):
    body = """v_mov_b32 v2, 0
.Lwait:
global_load_dword v3, v2, s[8:9] sc0 sc1
s_waitcnt vmcnt(0)
v_readfirstlane_b32 s10, v3
s_cmp_eq_u32 s10, 0
s_cbranch_scc1 .Lwait"""
    assert_says(launched(body, "--deadline", "1").fault, "no wave has ended for 1")


@pytest.mark.parametrize(
    "text", ["image_load v0, v1, s[0:7]", "v_interp_p1_f32 v0, v1, attr0.x", "s_rfe_b64 s[8:9]"]
)
def test_an_instruction_that_is_not_implemented(launched, text):
    # The words of an instruction of graphics, or one that only a trap handler executes.
    words = {"image_load v0, v1, s[0:7]": ".long 0xf0000100, 0x00000001", "s_rfe_b64 s[8:9]": text}
    body = words.get(text, ".long 0xd4000001")
    assert_says(launched(body).fault, "is not implemented|is no instruction")


def test_running_past_the_end_of_the_code(launched):
    body = "s_getpc_b64 s[10:11]\ns_add_u32 s10, s10, 0x100000\ns_addc_u32 s11, s11, 0\ns_setpc_b64 s[10:11]"
    assert_says(launched(body).fault, "code|text|instruction")


def test_a_trap(launched):
    assert_says(launched("s_trap 2").fault, "s_trap")


def test_faults_name_the_workgroup_and_the_wave(launched):
    body = """s_cmp_lg_u32 s2, 2
s_cbranch_scc1 .Lend
v_readfirstlane_b32 s10, v0
s_cmp_lg_u32 s10, 64
s_cbranch_scc1 .Lend
global_load_dword v2, v1, s[8:9] offset:1024
.Lend:"""
    fault = launched(body + WAIT, block=(128, 1, 1), grid=(4, 1, 1)).fault
    assert_says(fault, "workgroup 2,0,0", r"wave 1\b", "lane 0")
