#!/bin/sh
# orbax's StandardCheckpointer.restore, strict as it is by default, checks the shape of a target only where the target
# is a jax.Array or has a sharding. For a NumPy array, or a jax.ShapeDtypeStruct without a sharding, it gives what is
# stored, of another shape, and says nothing.
#
# So a checkpoint whose experts are padded for 4 ranks is read into a state for 8 without an error, and what is wrong is
# noticed later or never. The documentation of strict says: "if False, restoration allows silent truncating/padding of
# arrays if the stored array shape does not match the target shape. Otherwise, raises an error."
#
# Seen with jax 0.10.2 and orbax-checkpoint 0.12.8 on a CPU:
#   orbax 0.12.8, [12] read as [10]: NumPy [12], struct [12], struct with a sharding ValueError, jax.Array ValueError
# Exits with another status than 0 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 orbax-checkpoint==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/saved" <<'PYTHON' 2> "$folder/log" || { cat "$folder/log"; exit 1; }
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], {"w": np.arange(12.0, dtype=np.float32)})
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
targets = {
    "NumPy": np.zeros(10, np.float32),
    "struct": jax.ShapeDtypeStruct((10,), jnp.float32),
    "struct with a sharding": jax.ShapeDtypeStruct((10,), jnp.float32, sharding=sharding),
    "jax.Array": jnp.zeros(10),
}
seen = {}
for name, target in targets.items():
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            seen[name] = str(list(checkpointer.restore(sys.argv[1], {"w": target})["w"].shape))
        except ValueError:
            seen[name] = "ValueError"
print(f"orbax {ocp.__version__}, [12] read as [10]: " + ", ".join(f"{name} {what}" for name, what in seen.items()))
sys.exit(list(seen.values()) != ["[12]", "[12]", "ValueError", "ValueError"])
PYTHON
