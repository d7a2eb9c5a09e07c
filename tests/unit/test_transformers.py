"""The checks of test_weight_files.py on models that the installed transformers makes now, where there is one.

CI has none; it tests what tests/golden/make_checkpoints.py has kept.
"""

import importlib
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from goldens import FOLDER

import jax_moriep as jm

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.13")
sys.path.insert(0, str(FOLDER))
make = importlib.import_module("make_checkpoints")
sys.path.remove(str(FOLDER))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("model", make.MODELS)
def test_a_model_made_now(tmp_path, model):
    arrays = make.make(model, str(tmp_path))
    cfg = jm.MoEConfig.from_hf(make.config_of(model))
    assert cfg == jm.MoEConfig.from_hf(tmp_path)
    layers = jm.weights.moe_layers(tmp_path)
    assert {f"y/{layer}" for layer in layers} == {key for key in arrays if key.startswith("y/")}
    mesh = jax.make_mesh((3,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    disk = {
        name: value
        for file in tmp_path.glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items()
    }
    compute = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=mesh)[0])
    for layer in layers:
        params = jm.weights.load(tmp_path, cfg, layers=layer, mesh=mesh)
        want = arrays[f"y/{layer}"]
        np.testing.assert_allclose(compute(arrays["x"], params), want, atol=1e-5 * np.abs(want).max())
        block = next(
            b
            for b in make.BLOCKS
            if any(f"layers.{layer}.{b}.experts" in n or f"{b}.input" in n for n in disk)
        )
        prefix = f"model.layers.{layer}.{block}."
        back = jm.weights.to_hf(params, make.MODELS[model][0], cfg, prefix=prefix)
        assert back.keys() == {name for name in disk if name.startswith(prefix)}
        for name, value in back.items():
            np.testing.assert_array_equal(value, disk[name], err_msg=name)
