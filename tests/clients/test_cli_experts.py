"""Experts of a mixture that a model stores in one tensor: each becomes modules of its own, which is where loaders look for codes."""

import json
from pathlib import Path

import numpy as np
import pytest

from golden.model_free import EXPERTS, digests, experts
from harness import cli
from harness.model import BF16, CONFIG, files, tensors

NAME = "model.layers.0.mlp.experts"


def write(folder: Path, layers: dict[str, np.ndarray], **config) -> Path:
    """A model of one file with these experts beside its other layers."""
    folder.mkdir()
    cli.write(folder / "model.safetensors", tensors() | layers)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def alone(fused: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same experts, a tensor for each matrix."""
    found = {}
    for at in range(EXPERTS):
        gate, up = np.split(fused[f"{NAME}.gate_up_proj"][at], 2)
        down = fused[f"{NAME}.down_proj"][at]
        found |= {f"{NAME}.{at}.{part}.weight": array for part, array in [("gate_proj", gate), ("up_proj", up), ("down_proj", down)]}
    return found


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "NVFP4A16", "int8/tensor"])
def test_fused_experts_become_what_they_would_become_alone(scheme, suffix, tmp_path):
    fused = write(tmp_path / "fused", {name + suffix: array for name, array in experts().items()})
    cli.quantize(fused, tmp_path / "out", "-s", scheme)
    cli.quantize(write(tmp_path / "alone", alone(experts())), tmp_path / "expected", "-s", scheme)
    found, expected = files(tmp_path / "out"), files(tmp_path / "expected")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert found["config.json"] == expected["config.json"]
    layers = {layer["name"]: layer["metrics"] for layer in json.loads(found["report"])["layers"]}
    assert layers == {layer["name"]: layer["metrics"] for layer in json.loads(expected["report"])["layers"]}


def test_estimate_sees_them_as_they_become(tmp_path):
    source = write(tmp_path / "fused", experts())
    told = json.loads(cli.done("estimate", source, "-s", "W4A16", "--json").out)
    names = {layer["name"] for layer in told["layers"] if layer["status"] == "quantized"}
    assert {f"{NAME}.{at}.up_proj.weight" for at in range(EXPERTS)} < names
    cli.quantize(source, tmp_path / "out", "-s", "W4A16")
    assert told["destination_bytes"] == [sum(array.nbytes for array in cli.read(tmp_path / "out/model.safetensors").tensors.values())] * 2


def kept(folder: Path, layers: dict[str, np.ndarray]):
    """They are as they were, and whoever splits them is told that they are not quantized."""
    found = cli.read(folder / "model.safetensors").tensors
    for name, array in layers.items():
        assert found[name].tobytes() == array.tobytes() and found[name].shape == array.shape
    ignore = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert r"re:model\.layers\.0\.mlp\.experts\..*" in ignore


def test_experts_that_are_ignored_stay_together(tmp_path):
    source = write(tmp_path / "fused", experts())
    cli.quantize(source, tmp_path / "out", "-s", "W4A16", "--ignore", "@standard", "--ignore", "*.experts.*")
    kept(tmp_path / "out", experts())


@pytest.mark.parametrize("config", [{}, {"model_type": "llama4", "hidden_size": None, "text_config": {"hidden_size": 256}}])
def test_experts_that_are_stored_transposed_are_left_as_they_are(config, tmp_path):
    """Their columns would be taken for inputs: `hidden_size` says which dimension is."""
    layers = {name: np.ascontiguousarray(array.swapaxes(1, 2)) for name, array in experts().items()}
    config = {key: value for key, value in config.items() if value}
    folder = write(tmp_path / "fused", layers, **config)
    cli.quantize(folder, tmp_path / "out", "-s", "W4A16")
    kept(tmp_path / "out", layers)


@pytest.mark.parametrize("shape", [[1 << 40, 2, 0], [1 << 57, 2, 0], [(1 << 63) + 1, 2, 0]])
def test_experts_that_are_claimed_and_not_there_are_left_as_they_are(shape, tmp_path):
    """A header of a hundred bytes would stand for terabytes of names."""
    source = write(tmp_path / "fused", {})
    header = {"m.experts.gate_up_proj": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    cli.write_raw(source / "model.safetensors", json.dumps(header).encode())
    ended = cli.run("estimate", source, "-s", "int8")
    assert ended.code in (0, 3) and "panicked" not in ended.err and "overflow" not in ended.err, ended.err


def test_shapes_that_do_not_tell_are_told_apart_by_the_kind_of_model(tmp_path):
    square = {f"{NAME}.gate_up_proj": np.ones((2, 256, 256), BF16)}
    cli.quantize(write(tmp_path / "usual", square), tmp_path / "split", "-s", "int8")
    assert f"{NAME}.1.up_proj.weight" in cli.read(tmp_path / "split/model.safetensors").tensors
    cli.quantize(write(tmp_path / "llama4", square, model_type="llama4_text"), tmp_path / "kept", "-s", "int8")
    kept(tmp_path / "kept", square)
