"""`quarrel estimate`: what it says of a model is what `quarrel quantize` makes of it."""

import json
import re

import numpy as np
import pytest

from harness import cli
from harness.model import tensors


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16", "int8", "int3-asym/g32", "fp8/tensor", "FP8_BLOCK",
                                    "NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16"])
def test_sizes_and_bits_are_those_of_what_is_made(scheme, model, tmp_path):
    said = cli.done("estimate", model, "-s", scheme, "--json").json
    cli.quantize(model, tmp_path / "out", "-s", scheme)
    made = json.loads((tmp_path / "out/quarrel.report.json").read_text())
    held = sum(array.nbytes for path in (tmp_path / "out").glob("*.safetensors")
               for array in cli.read(path).tensors.values())
    assert said["destination_bytes"] == [held, held]
    assert said["source_bytes"] == made["totals"]["source_bytes"]
    assert said["bits_per_weight"] == pytest.approx(made["totals"]["bits_per_weight"], rel=1e-12)
    assert [layer["name"] for layer in said["layers"]] == [layer["name"] for layer in made["layers"]]
    for told, found in zip(said["layers"], made["layers"], strict=True):
        assert (told["status"], told["reason"]) == (found["status"], found["reason"])
        if told["status"] == "quantized":
            assert told["schemes"] == [found["scheme"]]
            assert told["bits_per_weight"] == pytest.approx(found["metrics"]["bits_per_weight"], rel=1e-12)


def test_no_weights_are_read(model, tmp_path):
    """A file whose tensors are a hole of a terabyte."""
    shape = [1 << 20, 1 << 18]
    header = {"a.up_proj.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1 << 40]}}
    path = cli.write_raw(tmp_path / "huge.safetensors", json.dumps(header).encode())
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40))
    said = cli.done("estimate", path, "-s", "W4A16", "--json").json
    assert said["layers"][0]["bits_per_weight"] == 4.25 and said["peak_memory_bytes"] < 1 << 28


@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "NVFP4A16", "int8/tensor", "nf4;double_quant=true"])
def test_memory_is_no_more_than_it_says(scheme, tmp_path):
    rows = np.random.default_rng(1).standard_normal((8192, 4096)).astype(np.float16)  # 64 MiB
    source = cli.write(tmp_path / "large.safetensors", {f"{name}_proj.weight": rows for name in ("a", "b", "c")})
    said = cli.done("estimate", source, "-s", scheme, "--json").json
    with cli.Running("quantize", source, tmp_path / "out.safetensors", "-s", scheme) as running:
        peak = 0
        while not running.is_over():
            peak = max(peak, running.peak_rss_bytes())
        assert running.end().code == 0
    print(f"{scheme}: {peak >> 20} MiB of {said['peak_memory_bytes'] >> 20}")
    assert 0 < peak < said["peak_memory_bytes"]
    if scheme in ("W4A16", "FP8_BLOCK", "NVFP4A16"):  # others hold whole layers
        assert said["peak_memory_bytes"] < 130 << 20


def test_a_ladder_says_a_range_and_its_table_names_what_is_kept(model):
    said = cli.done("estimate", model, "--profile", "edge", "--json").json
    least, most = said["destination_bytes"]
    assert least < most <= said["source_bytes"]
    shown = cli.done("estimate", model, "--profile", "edge").out
    assert "int2/g64, or W4A16, or int8" in shown or re.search(r"int2/g64, or int4/g128, or int8", shown)
    assert "kept: ignored" in shown and "to" in shown


def test_what_quantize_refuses_is_refused(tmp_path):
    source = cli.write(tmp_path / "in.safetensors", {"a.weight": tensors()["model.embed_tokens.weight"]})
    assert cli.run("estimate", source, "-s", "nope").code == 2
    assert cli.run("estimate", source, "-s", "FP8").code == 2
    assert cli.run("estimate", source, "-s", "int4", "--group-size", 100, "--on-indivisible", "fail").code in (2, 3)
