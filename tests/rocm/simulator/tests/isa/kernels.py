"""The text of assembly kernels: descriptor and metadata around a body."""

import dataclasses

# What the descriptor says of floating point: as HIP's compiler has it, and as AITER's kernels have it.
MODES = {
    "ieee": {"float_denorm_mode_32": 3, "float_denorm_mode_16_64": 3, "ieee_mode": 1, "dx10_clamp": 1},
    "flush": {"float_denorm_mode_32": 0, "float_denorm_mode_16_64": 3, "ieee_mode": 0, "dx10_clamp": 0},
}


@dataclasses.dataclass
class Kernel:
    """A kernel whose arguments are pointers; s[0:1] points to them, s2 to s4 are the workgroup's place."""

    name: str
    body: str
    pointers: int
    lds: int = 0
    scratch: int = 0
    mode: str = "ieee"
    vgprs: int = 256
    accumulators: int = 256


def source(kernels):
    """One assembly file of many kernels."""
    text = ['.amdgcn_target "amdgcn-amd-amdhsa--gfx942"', ".amdhsa_code_object_version 5"]
    for kernel in kernels:
        text += [
            ".text",
            f".globl {kernel.name}",
            ".p2align 8",
            f".type {kernel.name},@function",
            f"{kernel.name}:",
            kernel.body,
            "s_endpgm",
            f".size {kernel.name}, . - {kernel.name}",
            ".section .rodata",
            ".p2align 6",
            f".amdhsa_kernel {kernel.name}",
            f".amdhsa_group_segment_fixed_size {kernel.lds}",
            f".amdhsa_private_segment_fixed_size {kernel.scratch}",
            f".amdhsa_kernarg_size {8 * kernel.pointers}",
            ".amdhsa_user_sgpr_kernarg_segment_ptr 1",
            ".amdhsa_user_sgpr_count 2",
            ".amdhsa_system_sgpr_workgroup_id_x 1",
            ".amdhsa_system_sgpr_workgroup_id_y 1",
            ".amdhsa_system_sgpr_workgroup_id_z 1",
            ".amdhsa_system_vgpr_workitem_id 2",
            f".amdhsa_enable_private_segment {int(kernel.scratch > 0)}",
            f".amdhsa_next_free_vgpr {kernel.vgprs + kernel.accumulators}",
            ".amdhsa_next_free_sgpr 100",
            f".amdhsa_accum_offset {kernel.vgprs}",
            *(f".amdhsa_{key} {value}" for key, value in MODES[kernel.mode].items()),
            ".end_amdhsa_kernel",
        ]
    text += [".amdgpu_metadata", "---", "amdhsa.version: [1, 2]", "amdhsa.kernels:"]
    for kernel in kernels:
        text += [
            f"  - .name: {kernel.name}",
            f"    .symbol: {kernel.name}.kd",
            f"    .kernarg_segment_size: {8 * kernel.pointers}",
            "    .kernarg_segment_align: 8",
            f"    .group_segment_fixed_size: {kernel.lds}",
            f"    .private_segment_fixed_size: {kernel.scratch}",
            "    .wavefront_size: 64",
            "    .sgpr_count: 100",
            f"    .vgpr_count: {kernel.vgprs + kernel.accumulators}",
            "    .max_flat_workgroup_size: 1024",
            "    .args:",
        ]
        for i in range(kernel.pointers):
            text += [
                f"      - .offset: {8 * i}",
                "        .size: 8",
                "        .value_kind: global_buffer",
                "        .address_space: global",
            ]
    return "\n".join([*text, "...", ".end_amdgpu_metadata", ""])
