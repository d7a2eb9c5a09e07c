#!/bin/sh
# safetensors writes NumPy arrays of bfloat16 and float8 (ml_dtypes) and cannot read all of them back.
#
# safetensors.numpy.save_file takes both. bfloat16 comes back from a file (load_file, safe_open), but not from bytes
# (load). float8 comes back neither way. So a float8 checkpoint needs torch, or a reader of one's own.
#
# Seen with safetensors 0.8.0, numpy 2.4.6, ml_dtypes 0.6.0:
#   safetensors 0.8.0: bfloat16: load_file gives bfloat16, load raises KeyError
#   safetensors 0.8.0: float8_e4m3fn: load_file raises AttributeError, load raises KeyError
# Exits with another status than 0 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
"$folder/venv/bin/python" - "$folder/x.safetensors" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import ml_dtypes
import numpy as np
import safetensors.numpy

path = pathlib.Path(sys.argv[1])


def outcome(read):
    try:
        return f"gives {read()['x'].dtype}"
    except Exception as e:
        return f"raises {type(e).__name__}"


found = []
for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    safetensors.numpy.save_file({"x": np.arange(4).astype(dtype)}, path)
    from_file = outcome(lambda: safetensors.numpy.load_file(path))
    from_bytes = outcome(lambda: safetensors.numpy.load(path.read_bytes()))
    name, version = np.dtype(dtype).name, importlib.metadata.version("safetensors")
    print(f"safetensors {version}: {name}: load_file {from_file}, load {from_bytes}")
    found += [from_file, from_bytes]
sys.exit(found != ["gives bfloat16", "raises KeyError", "raises AttributeError", "raises KeyError"])
PYTHON
