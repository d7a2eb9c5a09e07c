#!/usr/bin/env bash
# jaxlib 0.10.2 on a CPU: by XLA's older code generation (--xla_cpu_use_fusion_emitters=false) float32 becomes
# float8_e4m3fnuz or float8_e5m2fnuz wrongly where a negative number is too small for the format: the result is
# NaN. The sign is kept beside a zero, and in the fnuz formats that byte, 0x80, is no negative zero but their only
# NaN. By default (the flag is true) the same program gives 0x00, and so does ml_dtypes.
#
# Seen with jax 0.10.2 and jaxlib 0.10.2, Python 3.11, x86-64:
#   default         float8_e4m3fnuz -1e-09 -> 0x0   -0.0001 -> 0x0
#   older emitters  float8_e4m3fnuz -1e-09 -> 0x80  -0.0001 -> 0x80   (ml_dtypes: 0x0)
#   older emitters  float8_e5m2fnuz -1e-09 -> 0x80                    (ml_dtypes: 0x0)
#   older emitters  float8_e4m3fn   -1e-09 -> 0x80, which is -0.0 there, as ml_dtypes has it
# Exits with another status than 0 if that has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq jax==0.10.2 jaxlib==0.10.2
cat > "$folder/convert.py" <<'PYTHON'
import sys

import jax
import ml_dtypes
import numpy as np

x = np.array([-1e-9, -1e-4, 1e-9, -1.0], np.float32)
differ = set()
for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3fn", "float8_e5m2"):
    dtype = np.dtype(getattr(ml_dtypes, name))
    got = np.asarray(jax.jit(lambda a, dtype=dtype: (a * 1.0).astype(dtype))(x)).view(np.uint8)
    want = x.astype(dtype).view(np.uint8)
    print(name, *(f"{value:g} -> {byte:#x} (ml_dtypes {right:#x})" for value, byte, right in zip(x, got, want)))
    differ |= {(name, float(value), int(byte)) for value, byte, right in zip(x, got, want) if byte != right}
of_e4m3, of_e5m2 = ("float8_e4m3fnuz", float(x[0]), 0x80), ("float8_e5m2fnuz", float(x[0]), 0x80)
expected = {of_e4m3, of_e5m2, ("float8_e4m3fnuz", float(x[1]), 0x80)} if sys.argv[1] == "older" else set()
assert differ == expected, (sys.argv[1], differ)
PYTHON
echo "default"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/convert.py" default
echo "older emitters"
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_use_fusion_emitters=false "$folder/venv/bin/python" "$folder/convert.py" older
echo "as described"
