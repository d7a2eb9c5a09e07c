"""Every instruction that the machine implements has a test."""

import subprocess

import pytest

from isa import table_matrix, table_memory, test_instructions, toolchain

# The disassembler gives none of these for gfx942, whatever the bytes: no program can have them.
NOT_OF_GFX942 = {
    "buffer_atomic_pk_add_bf16",
    "s_waitcnt_expcnt",
    "s_waitcnt_lgkmcnt",
    "s_waitcnt_vmcnt",
    "v_fmac_f16",
    "v_mac_f32",
    "v_mad_f32",
    "v_mad_legacy_f32",
    "v_mad_mix_f32",
    "v_mad_mixhi_f16",
    "v_mad_mixlo_f16",
    "v_madak_f32",
    "v_madmk_f32",
}
# Each ends a wave: every kernel of these tests has the first, and test_checks.py the others.
ENDS = {"s_endpgm", "s_endpgm_saved", "s_trap"}


def implemented():
    command = [toolchain.simulator(), "--list-instructions"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_every_implemented_instruction_has_a_test():
    tables = [*test_instructions.TABLES.values(), table_memory.CASES, table_matrix.CASES]
    tested = set().union(*(one.mnemonics for cases in tables for one in cases))
    missing = implemented() - tested - NOT_OF_GFX942 - ENDS
    assert not missing, f"no test of: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", sorted(NOT_OF_GFX942))
def test_the_assembler_knows_no_such_instruction_of_gfx942(name):
    toolchain.need("llvm-mc-19")
    command = ["llvm-mc-19", "-triple=amdgcn", "-mcpu=gfx942"]
    done = subprocess.run(command, input=f"{name} v0, v1, v2, v3\n", capture_output=True, text=True)
    assert "not supported on this GPU" in done.stderr
