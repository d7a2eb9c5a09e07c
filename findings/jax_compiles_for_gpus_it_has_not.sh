#!/usr/bin/env bash
# jax 0.11.2 compiles for an H200 on a machine that has no GPU, no driver and no CUDA libraries, down to the machine code, and
# says how much memory the program needs: with the plugin installed and JAX_PLATFORMS=cpu, a topology in text is enough.
#
# One would expect the CUDA plugin to need a driver for that, as jax.devices("cuda") does, and look for spills and for the
# peak of temporaries on a GPU only. What is compiled is XLA's own program with its buffers assigned, and Pallas-Mosaic's
# kernels go through ptxas (MOSAIC_GPU_DUMP_PTXAS=1 then tells their registers and spills).
#
# Seen on Linux x86-64 without a GPU, Python 3.12:
#   devices: RuntimeError
#   platform: gpu, device: NVIDIA H200
#   temporaries: 41943040, for tanh(x @ a) @ b in bfloat16 with x[4096, 8192] and a[8192, 4096]
# Exits 0 while it is so. Needs a Python >= 3.12, python3.12 or what PYTHON names; downloads about 300 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.11.2 jaxlib==0.11.2
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
  nvidia-cuda-nvcc nvidia-nvvm
cat > "$folder/compile.py" <<'PROGRAM'
import jax
import jax.numpy as jnp
from jax.experimental import topologies

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 memory_bandwidth: 4800000000000 device_memory_size: 150754820096
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
topology = topologies.get_topology_desc(platform="cuda", topology_name="1x1x1", target_config=H200, topology="1x1x1")
(device,) = topology.devices
print(f"platform: {device.platform}, device: {device.device_kind}")
sharding = jax.sharding.SingleDeviceSharding(device)
shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in ((4096, 8192), (8192, 4096), (4096, 64))]
compiled = jax.jit(lambda x, a, b: jnp.tanh(x @ a) @ b).lower(*shapes).compile()
temporaries = compiled.memory_analysis().temp_size_in_bytes
print("temporaries:", temporaries)
assert temporaries >= 4096 * 4096 * 2
PROGRAM
cat > "$folder/devices.py" <<'PROGRAM'
import jax

try:
    print("devices:", jax.devices("cuda"))
except RuntimeError:
    print("devices: RuntimeError")
PROGRAM
"$folder/venv/bin/python" "$folder/devices.py" 2> /dev/null | tee "$folder/said"
# Otherwise the plugin looks for CUDA's libraries, misses them, and is left out.
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/compile.py" | tee -a "$folder/said"
grep -q "devices: RuntimeError" "$folder/said"
grep -q "device: NVIDIA H200" "$folder/said"
