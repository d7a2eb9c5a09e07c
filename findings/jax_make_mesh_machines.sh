#!/bin/sh
# jax.make_mesh refuses the devices of several machines, though all that it is asked for is one axis over all of them:
# "`jax.make_mesh` does not support multi-slice topologies. Please use jax.experimental.mesh_utils.create_hybrid_device_mesh".
#
# jaxlib gives every machine (every boot id) a slice of its own, on CPUs too. JAX_PARTITION_INDEX=0, which
# jax.distributed.initialize reads, would put all into one, but only GPUs' plugins are told of it: on CPUs nothing changes.
# jax.sharding.Mesh(np.array(jax.devices()), ...) takes the same devices without a word.
#
# Seen with jax 0.10.2, and with 0.12.0.1, on CPUs, two processes of which one sees another boot id:
#   jax 0.10.2: slices [0, 1]; make_mesh: ValueError; Mesh: 2 devices
# Exits with another status than 0 if that has changed. Takes unshare, and the right to have a user namespace.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/process.py" <<'PYTHON'
import sys

import jax
import numpy as np

jax.distributed.initialize("127.0.0.1:29511", 2, int(sys.argv[1]))
slices = [device.slice_index for device in jax.devices()]
try:
    made = str(jax.make_mesh((2,), ("x",)).size)
except ValueError as error:
    made = "ValueError" if "multi-slice" in str(error) else repr(error)
plain = jax.sharding.Mesh(np.array(jax.devices()), ("x",)).size
if jax.process_index() == 0:
    print(f"jax {jax.__version__}: slices {slices}; make_mesh: {made}; Mesh: {plain} devices")
jax.distributed.shutdown()
sys.exit((slices, made, plain) != ([0, 1], "ValueError", 2))
PYTHON
export JAX_PLATFORMS=cpu JAX_PARTITION_INDEX=0
echo 00000000-0000-4000-8000-000000000001 > "$folder/boot_id"
unshare --user --map-root-user --mount sh -c \
  'mount --bind "$0/boot_id" /proc/sys/kernel/random/boot_id && exec "$0/venv/bin/python" "$0/process.py" 1' "$folder" &
"$folder/venv/bin/python" "$folder/process.py" 0
wait $!
