"""`quarrel measure A B` and `inspect` of a folder: any two checkpoints of one model, layer by layer."""

import json

import ml_dtypes
import numpy as np
import pytest

from harness import cli
from harness.model import INDEX, tensors

METRICS = ("mse", "sqnr_db", "cosine", "max_abs_error", "amax")


def measured(*args) -> dict:
    return cli.done("measure", *args, "--json").json


def by_name(found) -> dict:
    return {layer["name"]: layer for layer in found["layers"]}


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "int3/g64"])
def test_it_measures_what_the_report_says(scheme, model, tmp_path):
    cli.quantize(model, tmp_path / "out", "-s", scheme)
    report = json.loads((tmp_path / "out/quarrel.report.json").read_text())["layers"]
    found = measured(model, tmp_path / "out")
    assert found["only_in_first"] == found["only_in_second"] == []
    layers = by_name(found)
    assert layers.keys() == tensors().keys()
    for told in report:
        layer = layers[told["name"]]
        assert (layer["first"], layer["second"]) == ("BF16", told["scheme"] or "BF16")
        if told["metrics"]:
            for metric in METRICS:
                assert layer["metrics"][metric] == pytest.approx(told["metrics"][metric], rel=1e-6), (told["name"], metric)
        else:
            assert layer["metrics"]["max_abs_error"] == 0 and layer["metrics"]["sqnr_db"] is None


def test_it_measures_by_the_formulas(tmp_path):
    generator = np.random.default_rng(11)
    one, other = (generator.normal(size=(300, 700)).astype(np.float32) for _ in range(2))
    cli.write(tmp_path / "a.safetensors", {"x.weight": one, "y": one.astype(np.float64), "ids": np.arange(3)})
    cli.write(tmp_path / "b.safetensors", {"x.weight": other.astype(np.float16), "y": one.astype(ml_dtypes.bfloat16)})
    layers = by_name(measured(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert layers.keys() == {"x.weight", "y"}
    for name, a, b in [("x.weight", one, other.astype(np.float16)), ("y", one, one.astype(ml_dtypes.bfloat16))]:
        x, y = a.astype(np.float64), b.astype(np.float64)
        metrics = layers[name]["metrics"]
        expected = {
            "mse": np.mean((x - y) ** 2), "sqnr_db": 10 * np.log10(np.sum(x * x) / np.sum((x - y) ** 2)),
            "cosine": np.sum(x * y) / np.sqrt(np.sum(x * x) * np.sum(y * y)), "max_abs_error": np.abs(x - y).max(),
            "amax": np.abs(x).max(),
        }
        for metric in METRICS:
            assert metrics[metric] == pytest.approx(expected[metric], rel=1e-6), (name, metric)
        assert metrics["elements"] == x.size


def test_two_quantized_ones_a_gate_and_what_only_one_has(model, tmp_path):
    cli.quantize(model, tmp_path / "four", "-s", "W4A16")
    cli.quantize(model, tmp_path / "eight", "-s", "W8A16")
    found = measured(tmp_path / "eight", tmp_path / "four")
    layer = by_name(found)["model.layers.0.mlp.up_proj.weight"]
    assert (layer["first"], layer["second"]) == ("W8A16", "W4A16") and 18 < layer["metrics"]["sqnr_db"] < 21
    ended = cli.run("measure", model, tmp_path / "four", "--sqnr-db-min", "25")
    cli.check_refusal(ended, 7, "expected at least 25 dB")
    cli.done("measure", model, tmp_path / "eight", "--sqnr-db-min", "25", "--cosine-min", "0.999")
    cli.write(tmp_path / "a.safetensors", {"x.weight": np.ones((4, 4), np.float32), "only.a": np.ones(3, np.float32)})
    cli.write(tmp_path / "b.safetensors", {"x.weight": np.ones((4, 5), np.float32), "only.b": np.ones(3, np.float32)})
    found = measured(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert found == {"layers": [], "only_in_first": ["x.weight", "only.a"], "only_in_second": ["x.weight", "only.b"]}
    text = cli.done("measure", tmp_path / "a.safetensors", tmp_path / "b.safetensors").out
    assert "0 layers differ" in text and "Only in the first, or there in another shape: x.weight and 1 more" in text


def test_numbers_that_are_none_are_undefined_and_not_nan(tmp_path):
    weights = np.ones((4, 4), np.float32)
    cli.write(tmp_path / "a.safetensors", {"x.weight": weights, "empty.weight": np.ones((0, 4), np.float32)})
    weights = weights.copy()
    weights[1, 2] = np.nan
    cli.write(tmp_path / "b.safetensors", {"x.weight": weights, "empty.weight": np.ones((0, 4), np.float32)})
    layers = by_name(measured(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))
    assert layers["x.weight"]["metrics"]["mse"] is layers["x.weight"]["metrics"]["sqnr_db"] is None
    assert layers["x.weight"]["metrics"]["max_abs_error"] is None
    assert layers["empty.weight"]["metrics"]["elements"] == 0
    told = cli.done("measure", tmp_path / "a.safetensors", tmp_path / "b.safetensors").out
    assert "0 layers differ, the worst above, 1 are the same, 1 hold numbers that are not finite" in told
    assert any("x.weight" in line and "not finite" in line for line in told.splitlines())
    same = cli.done("measure", tmp_path / "a.safetensors", tmp_path / "a.safetensors").out
    assert same.strip() == "0 layers differ, 2 are the same"
    ended = cli.run("measure", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--cosine-min", "0.5")
    cli.check_refusal(ended, 7, "x.weight")


def test_a_folder_is_inspected_as_its_files_are(model, tmp_path):
    recipe = tmp_path / "recipe.json"
    rules = [{"targets": ["re:.*self_attn"], "scheme": "W4A16"}, {"targets": ["re:.*mlp"], "scheme": "FP8_DYNAMIC"}]
    recipe.write_text(json.dumps({"rules": rules, "ignore": ["@standard"]}))
    cli.quantize(model, tmp_path / "out", "--recipe", recipe)
    whole = cli.done("inspect", tmp_path / "out", "--json").json
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    parts = [cli.done("inspect", shard, "--json").json for shard in shards]
    assert whole["tensors"] == [tensor for part in parts for tensor in part["tensors"]]
    assert whole["schemes"] == {name: scheme for part in parts for name, scheme in part["schemes"].items()}
    assert whole["files"] == {shard.name: part["metadata"] for shard, part in zip(shards, parts, strict=True)}
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert {tensor["name"]: tensor["file"] for tensor in whole["tensors"]} == index
    text = cli.done("inspect", tmp_path / "out").out
    assert "8 layers of W4A16" in text and "6 layers of FP8_DYNAMIC" in text and "in 3 files" in text
