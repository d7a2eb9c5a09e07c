#!/bin/sh
# MaxText 0.2.5: the load-balance loss of its sparse MoE layers is that of the first data shard's tokens alone.
#
# Each shard computes the loss of its own tokens inside a shard_map whose output is declared replicated and not
# checked (check_vma is off by default), with no mean over the shards; what is read is the first shard's. The
# gradient is that of the mean. So `learning/loss` and `learning/moe_lb_loss` are of another function than the one
# that is trained, and change with the number of devices. sparse_matmul is MaxText's default, as is the mesh.
#
# One RoutedMoE, 8 sequences, load_balance_loss_weight 1, on 1 and on 8 CPU devices. Seen with jax 0.12.0.1:
#   dense  on 1 device: loss 1.2989; on 8: loss 1.2989, gradient of the gate differs by 0.0000
#   sparse on 1 device: loss 1.2989; on 8: loss 1.2653, gradient of the gate differs by 0.0000
# Exits with another status than 0 if that has changed. Takes a Python >= 3.12 and 2 GB.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# MaxText's wheel asks for nothing; these are what its layers import on a CPU.
"$folder/venv/bin/pip" install -q jax==0.12.0.1 flax==0.12.12 optax==0.2.8 orbax-checkpoint==0.12.8 aqtp==0.9.0 \
  qwix==0.1.8 tokamax==0.0.17 omegaconf==2.4.0 pydantic==2.14.4 jinja2==3.1.6 pathwaysutils==0.1.13 \
  huggingface_hub==2.4.0 transformers==5.24.0 grain==0.2.18 drjax==0.2.1 pillow==13.0.0 tiktoken==0.14.0 \
  sentencepiece==0.2.3 sympy==1.14.0
"$folder/venv/bin/pip" install -q --no-deps maxtext==0.2.5

cat > "$folder/measure.py" <<'PYTHON'
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import maxtext.configs
import numpy as np
from flax import linen, nnx
from maxtext.configs import pyconfig
from maxtext.layers import moe
from maxtext.layers.initializers import nd_dense_init

BASE = os.path.join(next(iter(maxtext.configs.__path__)), "base.yml")
OPTIONS = """decoder_block=mixtral num_experts=8 num_experts_per_tok=2 base_emb_dim=32 base_mlp_dim=24
  base_moe_mlp_dim=24 dtype=float32 load_balance_loss_weight=1.0 megablox=false hardware=cpu log_config=false
  skip_jax_distributed_system=true ici_fsdp_parallelism=1 ici_data_parallelism=8 run_name=r
  base_output_directory=unused""".split()


def measure(sparse, devices):
    """The balance loss of a layer and the gate's gradient of it."""
    config = pyconfig.initialize(["measure", BASE, *OPTIONS, f"sparse_matmul={sparse}"])
    shape = [devices if axis == "data" else 1 for axis in config.mesh_axes]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(shape), config.mesh_axes)
    x = np.random.default_rng(1).normal(size=(8, 5, config.emb_dim)).astype(np.float32)
    with jax.set_mesh(mesh), linen.logical_axis_rules(config.logical_axis_rules):
        layer = moe.RoutedMoE(
            config=config,
            num_experts=8,
            num_experts_per_tok=2,
            mesh=mesh,
            kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
            kernel_axes=("embed_router", None),
            intermediate_dim=24,
            rngs=nnx.Rngs(params=0),
        )
        graph, weights, rest = nnx.split(layer, nnx.Param, ...)
        loss = jax.jit(jax.value_and_grad(lambda weights: nnx.merge(graph, weights, rest)(x)[1]))
        value, gradient = loss(weights)
    return float(value), np.asarray(nnx.to_pure_dict(gradient)["gate"]["kernel"])


found = []
for sparse in (False, True):
    (one, one_gradient), (eight, eight_gradient) = measure(sparse, 1), measure(sparse, 8)
    error = np.abs(one_gradient - eight_gradient).max()
    found.append(
        f"{'sparse' if sparse else 'dense ':6} on 1 device: loss {one:.4f}; on 8: loss {eight:.4f}, "
        f"gradient of the gate differs by {error:.4f}"
    )
    print(found[-1])
sys.exit(found != Path(sys.argv[1]).read_text().splitlines())
PYTHON
cat > "$folder/expected" <<'TEXT'
dense  on 1 device: loss 1.2989; on 8: loss 1.2989, gradient of the gate differs by 0.0000
sparse on 1 device: loss 1.2989; on 8: loss 1.2653, gradient of the gate differs by 0.0000
TEXT
cd "$folder"
status=0
JAX_PLATFORMS=cpu DECOUPLE_GCLOUD=TRUE XLA_FLAGS=--xla_force_host_platform_device_count=8 \
  "$folder/venv/bin/python" measure.py expected > log 2>&1 || status=$?
grep -E '^(dense|sparse) |Error' log
exit $status
