"""Checkpoints that are quantized already: decoded where they are read, and quantized again."""

import json
import os
import shutil
import signal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from golden import cases
from golden.model_free import digests
from harness import cli
from harness.model import CONFIG, INDEX, files, tensors, write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """`made(scheme)`: the small Llama quantized, and the dense model that it decodes to."""
    folder, known = tmp_path_factory.mktemp("made"), {}

    def make(scheme) -> tuple[Path, Path]:
        if scheme not in known:
            coded, dense = folder / f"{len(known)}-coded", folder / f"{len(known)}-dense"
            cli.quantize(model, coded, "-s", scheme)
            cli.done("dequantize", coded, dense)
            known[scheme] = coded, dense
        return known[scheme]

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "model")


def report(folder) -> dict:
    return json.loads((folder / "quarrel.report.json").read_bytes())


def metrics(folder) -> dict:
    return {layer["name"]: (layer["status"], layer["metrics"]) for layer in report(folder)["layers"]}


@pytest.mark.parametrize("to", ["W8A16", "NVFP4A16", "int4/g32;solver=mse"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "int8/tensor", "NVFP4A16", "MXFP4A16"])
def test_it_becomes_what_the_dense_model_becomes_that_it_decodes_to(scheme, to, made, tmp_path):
    coded, dense = made(scheme)
    told = cli.quantize(coded, tmp_path / "out", "-s", to).out
    cli.quantize(dense, tmp_path / "expected", "-s", to)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    found, expected = files(tmp_path / "out"), files(tmp_path / "expected")
    assert found["config.json"] == expected["config.json"] and found[INDEX] == expected[INDEX]
    assert metrics(tmp_path / "out") == metrics(tmp_path / "expected")
    before = {layer["from"] for layer in report(tmp_path / "out")["layers"] if "from" in layer}
    assert before == {scheme} and f"14 layers were quantized before ({scheme})" in told


def test_what_the_command_keeps_is_dense(made, tmp_path):
    coded, dense = made("W4A16")
    for source, name in [(coded, "out"), (dense, "expected")]:
        cli.quantize(source, tmp_path / name, "-s", "W8A8", "--ignore", "@standard", "--ignore", "*.mlp.*")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    written = cli.read(tmp_path / "out/model-00001-of-00003.safetensors").tensors
    assert not [name for name in written if name.endswith("weight_packed")]


def test_a_layer_that_no_rung_is_good_enough_for_is_dense(made, tmp_path):
    recipe = {"rules": [{"targets": ["*_proj"], "scheme": "int2/g64", "fallback": {"schemes": ["int4"], "sqnr_db_min": 60.0}}]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    coded, dense = made("FP8_BLOCK")
    for source, name in [(coded, "out"), (dense, "expected")]:
        cli.quantize(source, tmp_path / name, "--recipe", tmp_path / "recipe.json")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected") == digests(dense)
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_bytes())


def deepseek(coded: Path, folder: Path) -> Path:
    """The same FP8 blocks in DeepSeek's own layout: scales of f32 that are called otherwise."""
    shutil.copytree(coded, folder)
    homes = json.loads((folder / INDEX).read_bytes())
    homes["weight_map"] = {name.replace("weight_scale", "weight_scale_inv"): home for name, home in homes["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(homes))
    for path in folder.glob("*.safetensors"):
        layers = cli.read(path).tensors
        cli.write(path, {name.replace("weight_scale", "weight_scale_inv"): array.astype(np.float32) if "scale" in name else array
                         for name, array in layers.items()})
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": said}))
    return folder


def test_deepseeks_fp8(made, tmp_path):
    coded, dense = made("FP8_BLOCK")
    source = deepseek(coded, tmp_path / "deepseek")
    cli.done("dequantize", source, tmp_path / "decoded")
    decoded = {name: array for path in (tmp_path / "decoded").glob("*.safetensors") for name, array in cli.read(path).tensors.items()}
    by_hand = {}
    for path in source.glob("*.safetensors"):
        layers = cli.read(path).tensors
        for name in layers:
            if f"{name}_scale_inv" in layers:
                scales = layers[f"{name}_scale_inv"].repeat(128, 0).repeat(128, 1)
                codes = layers[name].astype(np.float32)
                by_hand[name] = (codes * scales[: codes.shape[0], : codes.shape[1]]).astype(ml_dtypes.bfloat16)
    assert len(by_hand) == 14
    for name, array in by_hand.items():
        assert decoded[name].tobytes() == array.tobytes(), name
    assert digests(tmp_path / "decoded") == digests(dense)
    assert "quantization_config" not in json.loads((tmp_path / "decoded/config.json").read_bytes())
    cli.quantize(source, tmp_path / "out", "-s", "W4A16")
    cli.quantize(dense, tmp_path / "expected", "-s", "W4A16")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    config = json.loads((tmp_path / "out/config.json").read_bytes())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"


def test_estimate_reads_no_codes_and_tells_the_sizes(made, tmp_path):
    coded, _ = made("NVFP4A16")
    told = json.loads(cli.done("estimate", coded, "-s", "W8A16", "--json").out)
    cli.quantize(coded, tmp_path / "out", "-s", "W8A16")
    written = sum(array.nbytes for path in (tmp_path / "out").glob("*.safetensors") for array in cli.read(path).tensors.values())
    assert told["destination_bytes"] == [written, written]


def test_killed_it_goes_on(made, tmp_path):
    """It is a job like any other: its units are the files."""
    coded, _ = made("W4A16")
    cli.quantize(coded, tmp_path / "expected", "-s", "W8A8")
    with cli.Running("quantize", coded, tmp_path / "out", "-s", "W8A8") as running:
        os.kill(running.pid, signal.SIGKILL)
    cli.quantize(coded, tmp_path / "out", "-s", "W8A8")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_layouts_of_others_are_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "gptq")
    name = "model-00001-of-00003.safetensors"
    layers = cli.read(tmp_path / "gptq" / name).tensors
    cli.write(tmp_path / "gptq" / name, layers | {"a.qweight": np.zeros((4, 4), np.int32), "a.scales": np.ones((1, 4), np.float16)})
    index = json.loads((tmp_path / "gptq" / INDEX).read_bytes())
    index["weight_map"] |= {"a.qweight": name, "a.scales": name}
    (tmp_path / "gptq" / INDEX).write_text(json.dumps(index))
    ended = cli.run("quantize", tmp_path / "gptq", tmp_path / "out", "-s", "W8A16")
    assert ended.code == 3 and "[already_quantized]" in ended.err and not (tmp_path / "out").exists()
    assert "compressed-tensors, of DeepSeek's FP8, or of GPTQ or AWQ with its config.json" in ended.err.replace("\n", " ")


def one_layer(folder: Path, shape, seed="one") -> Path:
    folder.mkdir()
    values = (cases.normal(cases.generator(f"convert {seed}"), shape) * 0.05).astype(ml_dtypes.bfloat16)
    cli.write(folder / "model.safetensors", {"a.weight": values})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("shape, before, after", [
    ((257, 32768), "FP8_BLOCK", "W4A16"),  # fewer rows are read at once than a block has
    ((257, 32768), "FP8_BLOCK", "NVFP4A16"),
    ((5, 384, 256), "W4A16;channel_dims=2", "W8A8"),
    ((3, 130, 256), "FP8_BLOCK;channel_dims=2", "W4A16;channel_dims=2"),
    ((5, 384, 256), "int3-asym/g32;channel_dims=2", "int8;channel_dims=2"),
], ids=str)
def test_parts_of_layers_are_decoded_as_their_whole(shape, before, after, tmp_path):
    one_layer(tmp_path / "source", shape)

    def quantize(name, to, scheme):
        recipe = tmp_path / f"{to}.json"
        recipe.write_text(json.dumps({"rules": [{"targets": ["a"], "scheme": scheme}]}))
        cli.quantize(tmp_path / name, tmp_path / to, "--recipe", recipe)

    quantize("source", "coded", before)
    cli.done("dequantize", tmp_path / "coded", tmp_path / "dense")
    for name in ["coded", "dense"]:
        quantize(name, f"{name}-again", after)
    assert digests(tmp_path / "coded-again") == digests(tmp_path / "dense-again")
    assert report(tmp_path / "coded-again")["layers"][0]["from"]


def test_scales_of_activations_go_with_the_codes(model, tmp_path):
    """They were for codes that are no more: a loader would stop at them."""
    cli.quantize(one_layer(tmp_path / "source", (128, 256)), tmp_path / "coded", "-s", "fp8/channel")
    path = tmp_path / "coded/model.safetensors"
    more = {"a.input_scale": np.ones(1, np.float32), "b.input_scale": np.ones(1, np.float32)}
    cli.write(path, cli.read(path).tensors | more)
    cli.quantize(tmp_path / "coded", tmp_path / "out", "-s", "W4A16")
    cli.done("dequantize", tmp_path / "coded", tmp_path / "dense")
    for folder in ["out", "dense"]:
        found = cli.read(tmp_path / folder / "model.safetensors").tensors
        assert "a.input_scale" not in found and "b.input_scale" in found


def test_a_layer_in_two_forms_is_told(made, tmp_path):
    coded, _ = made("W4A16")
    shutil.copytree(coded, tmp_path / "both")
    index = json.loads((tmp_path / "both" / INDEX).read_bytes())
    name = next(name for name in index["weight_map"] if name.endswith("q_proj.weight_packed"))
    dense = name.replace("weight_packed", "weight")
    home = next(home for home in set(index["weight_map"].values()) if home != index["weight_map"][name])
    index["weight_map"][dense] = home
    (tmp_path / "both" / INDEX).write_text(json.dumps(index))
    path = tmp_path / "both" / home
    cli.write(path, cli.read(path).tensors | {dense: np.ones((256, 256), ml_dtypes.bfloat16)})
    ended = cli.run("quantize", tmp_path / "both", tmp_path / "out", "-s", "W8A16")
    assert ended.code == 3 and "in another form" in ended.err and not (tmp_path / "out").exists()


def test_a_file_that_is_quantized_in_part_stays_so(tmp_path):
    layers = {name: array for name, array in tensors().items() if "layers.0.mlp" in name}
    cli.write(tmp_path / "in.safetensors", layers)
    cli.quantize(tmp_path / "in.safetensors", tmp_path / "coded.safetensors", "-s", "W8A8", "--ignore", "*down_proj*")
    cli.quantize(tmp_path / "coded.safetensors", tmp_path / "more.safetensors", "-s", "W4A16")
    before, after = (cli.read(tmp_path / f"{name}.safetensors").tensors for name in ("coded", "more"))
    for name in before:
        assert "down_proj" in name or after[name].tobytes() == before[name].tobytes()
    assert "model.layers.0.mlp.down_proj.weight_packed" in after
