#!/bin/sh
# jax.lax.top_k does not treat 0.0 and -0.0 as equal, though its documentation says that of two equal elements the
# one with the lower index appears first.
#
# It sorts by the total order of floats, in which -0.0 < 0.0: of [-0.0, 0.0] it gives index 1 first. jnp.argmax, which
# compares as IEEE 754 does, gives 0. So a router on logits sends a token elsewhere by the sign of a zero.
#
# Seen with jax 0.10.2 on a CPU, with and without jit:
#   jax 0.10.2: [-0.0, 0.0]: top_k gives index 1, argmax gives index 0
# Exits with another status than 0 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

zeros = jnp.array([-0.0, 0.0])
plain, compiled = (int(f(zeros)[1][0]) for f in (lambda x: jax.lax.top_k(x, 1), jax.jit(lambda x: jax.lax.top_k(x, 1))))
best = int(jnp.argmax(zeros))
print(f"jax {jax.__version__}: [-0.0, 0.0]: top_k gives index {plain}, argmax gives index {best}")
sys.exit((plain, compiled, best) != (1, 1, 0))
PYTHON
