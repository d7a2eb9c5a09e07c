"""jm.weights.load across processes: each has its own experts only, and reads little else."""

import json

import numpy as np
import pytest
import safetensors.numpy

import jax_moriep as jm
from tests.multiprocess.test_native import start

E, H, INTER, LAYERS = 10, 24, 16, (1, 2)
CONFIG = {
    "model_type": "deepseek_v3",
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "hidden_size": H,
    "moe_intermediate_size": INTER,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 3,
}
EXPERT_BYTES = 3 * H * INTER * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two layers behind a dense one, in a file each."""
    made, rng, weight_map = tmp_path_factory.mktemp("checkpoint"), np.random.default_rng(0), {}
    for layer in range(3):
        matrices = {"up_proj": (INTER, H)}
        if layer in LAYERS:
            matrices = {"gate": (E, H)}
            for of in ("shared_experts", *(f"experts.{i}" for i in range(E))):
                matrices |= {f"{of}.gate_proj": (INTER, H), f"{of}.up_proj": (INTER, H)}
                matrices[f"{of}.down_proj"] = (H, INTER)
        prefix = f"model.layers.{layer}.mlp."
        tensors = {f"{prefix}{name}.weight": rng.normal(size=shape) for name, shape in matrices.items()}
        if layer in LAYERS:
            tensors[f"{prefix}gate.e_score_correction_bias"] = rng.normal(size=E)
        tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
        safetensors.numpy.save_file(tensors, made / f"{layer}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{layer}.safetensors")
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return made


@pytest.mark.parametrize(("nprocs", "devices"), [(3, 1), (2, 4)])
def test_every_process_gets_its_experts_and_reads_no_others(folder, tmp_path, nprocs, devices):
    """On three ranks the last holds two experts and two of padding; on eight the last three hold padding."""
    result = start("script_load.py", nprocs, folder, tmp_path, devices=devices)
    assert result.returncode == 0, "\n".join(result.outputs)
    whole = vars(jm.weights.load(folder))
    prefix = f"model.layers.{LAYERS[1]}.mlp."
    disk = safetensors.numpy.load_file(folder / f"{LAYERS[1]}.safetensors")
    disk = {name.removeprefix(prefix): value for name, value in disk.items()}
    each = -(-E // (nprocs * devices))
    seen = 0
    for process in range(nprocs):
        saved = dict(np.load(tmp_path / f"{process}.npz"))
        read, error = int(saved.pop("read")), str(saved.pop("error"))
        assert "must be of this process; gather it first: jax.experimental.multihost_utils." in error
        back = {key: saved.pop(key) for key in list(saved) if key.startswith("back/")}
        assert {key.removeprefix("back/") for key in back} == disk.keys()
        for name, value in disk.items():
            np.testing.assert_array_equal(back[f"back/{name}"], value, err_msg=name)
        for key, got in saved.items():
            name, first = key.split("/")
            want = whole[name]
            if name in ("w1", "w2"):
                mine = want[:, int(first) : int(first) + each]
                want = np.zeros((len(LAYERS), each, *want.shape[2:]), want.dtype)
                want[:, : mine.shape[1]] = mine
                seen += 1
            np.testing.assert_array_equal(got, want, err_msg=key)
        experts = range(process * devices * each, min(E, (process + 1) * devices * each))
        # Beside the experts: the routers, the shared experts, the headers; one expert of a rank with padding.
        common = sum(whole[name].nbytes for name in ("router", "score_bias", "shared_w1", "shared_w2"))
        headers = sum(file.stat().st_size for file in folder.glob("*.safetensors")) - (
            common + len(LAYERS) * E * EXPERT_BYTES + INTER * H * 4
        )
        padding_alone = sum(each * r >= E for r in range(process * devices, (process + 1) * devices))
        own = len(LAYERS) * EXPERT_BYTES * (len(experts) + padding_alone)
        assert own + common <= read <= own + common + headers
    assert seen == 2 * nprocs * devices
