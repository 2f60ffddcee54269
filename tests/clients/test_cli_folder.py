"""`quarrel quantize FOLDER FOLDER`: a model in, a model out; what is complete of a run that was stopped is not done again."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from harness import cli
from harness.model import BF16, CONFIG, INDEX, LAYERS, OTHERS, STRANGERS, files, tensors, write_model


def refused(code: int, *args) -> str:
    """A run that must fail so; what it says."""
    ended = cli.run("quantize", *args)
    assert ended.code == code, (ended.code, ended.err)
    return ended.err


def all_tensors(folder: Path) -> dict:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in cli.read(path).tensors.items()}


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_a_folder_becomes_the_same_tensors_as_one_file(scheme, model, tmp_path):
    cli.quantize(model, tmp_path / "out", "-s", scheme)
    cli.quantize(cli.write(tmp_path / "one.safetensors", tensors()), tmp_path / "whole.safetensors", "-s", scheme)
    whole = cli.read(tmp_path / "whole.safetensors").tensors
    found = all_tensors(tmp_path / "out")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert (found[name].dtype, found[name].tobytes()) == (tensor.dtype, tensor.tobytes()), name


def test_the_index_and_the_configuration_say_what_is_there(model, tmp_path):
    out = tmp_path / "out"
    cli.quantize(model, out, "-s", "W4A16")
    index = json.loads((out / INDEX).read_text())
    held = {name: path.name for path in out.glob("*.safetensors") for name in cli.read(path).tensors}
    assert index["weight_map"] == held
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in all_tensors(out).values())}
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    group, = quantization.pop("config_groups").values()
    assert quantization == {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "version": "0.20.0", "global_compression_ratio": None, "kv_cache_scheme": None,
        "ignore": ["lm_head", "model.embed_tokens", r"re:.*\.lm_head$"],
    }
    assert group == {
        "targets": ["Linear"], "format": "pack-quantized", "input_activations": None, "output_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128,
                    "dynamic": False},
    }
    assert {name: (out / name).read_bytes() for name in OTHERS} == OTHERS
    expected = {"config.json", INDEX, "quarrel.report.json", *OTHERS, *held.values()}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == expected


def test_a_model_of_one_file_has_no_index(tmp_path):
    source = write_model(tmp_path / "model", shards=1, dtype="float32")
    cli.quantize(source, tmp_path / "out", "-s", "MXFP4A16")
    assert (tmp_path / "out/model.safetensors").is_file() and not (tmp_path / "out" / INDEX).exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "NVFP4A16"])
def test_what_cannot_be_foretold_is_written_the_same(scheme, model, tmp_path):
    """A ladder decides by numbers, so its results are not written to their places at once. Its first rung always passes here."""
    ladder = {"fallback": {"schemes": ["int8"], "sqnr_db_min": -1000.0}}
    for name, more in [("plain", {}), ("ladder", ladder)]:
        rule = {"targets": ["*_proj"], "scheme": scheme} | more
        (tmp_path / f"{name}.json").write_text(json.dumps({"rules": [rule], "ignore": ["@standard", "*k_proj", "*q_proj", "*gate_proj"]}))
        cli.quantize(model, tmp_path / name, "--recipe", tmp_path / f"{name}.json")
    plain, tried = files(tmp_path / "plain"), files(tmp_path / "ladder")
    assert plain.pop("report") != tried.pop("report"), "the command"
    assert plain == tried


def test_several_schemes_name_their_layers(model, tmp_path):
    recipe = tmp_path / "recipe.json"
    rules = [{"targets": ["re:.*self_attn"], "scheme": "W4A16"}, {"targets": ["re:.*mlp"], "scheme": "FP8_DYNAMIC"}]
    recipe.write_text(json.dumps({"rules": rules, "ignore": ["@standard"]}))
    cli.quantize(model, tmp_path / "out", "--recipe", recipe)
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    groups = {group["format"]: group for group in quantization["config_groups"].values()}
    assert len(groups["pack-quantized"]["targets"]) == 4 * LAYERS
    assert len(groups["float-quantized"]["targets"]) == 3 * LAYERS
    assert groups["float-quantized"]["input_activations"]["strategy"] == "token"


def test_killed_at_any_moment_the_same_command_makes_the_same_files(model, tmp_path):
    undisturbed = tmp_path / "undisturbed"
    began = time.monotonic()
    cli.quantize(model, undisturbed, "-s", "NVFP4A16")
    seconds = time.monotonic() - began
    expected = files(undisturbed)
    moments, resumed = random.Random(5), 0
    for at in range(20):
        out = tmp_path / f"out{at}"
        with cli.Running("quantize", model, out, "-s", "NVFP4A16") as running:
            time.sleep(moments.random() * seconds)  # the moment itself
            running.send(signal.SIGKILL)
        done = set(out.glob("*.safetensors"))
        resumed += bool(done) and (out / ".quarrel").exists()
        assert (out / ".quarrel").exists() or not out.exists() or files(out) == expected
        assert not (out / "config.json").exists() or (out / INDEX).exists()
        before = {path: path.stat().st_ino for path in done}
        if not (out / "config.json").exists() or (out / ".quarrel").exists():
            cli.quantize(model, out, "-s", "NVFP4A16")
        records = {path for path in done if path.stat().st_ino == before[path]}
        assert len(done - records) <= 1, "one at most had its name and no record yet"
        assert files(out) == expected
        shutil.rmtree(out)
    print(f"{resumed} of 20 runs had files that were not made again")


def test_stopped_by_a_signal_it_says_how_to_go_on(model, tmp_path):
    with cli.Running("quantize", model, tmp_path / "out", "-s", "W4A16", "--cpu-level", "scalar") as running:
        running.reaches(lambda: (tmp_path / "out/.quarrel/job.json").exists())
        running.send(signal.SIGTERM)
        ended = running.end()
    if ended.code != 0:  # it may have been too quick
        assert ended.code == 143 and "Run the same command again" in ended.advice
        cli.quantize(model, tmp_path / "out", "-s", "W4A16")
    cli.quantize(model, tmp_path / "whole", "-s", "W4A16")
    assert files(tmp_path / "out").keys() == files(tmp_path / "whole").keys()


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_a_folder_is_dequantized_as_its_files_are(scheme, model, tmp_path):
    cli.quantize(model, tmp_path / "out", "-s", scheme)
    cli.done("dequantize", tmp_path / "out", tmp_path / "dense")
    found = {str(path.relative_to(tmp_path / "dense")) for path in (tmp_path / "dense").rglob("*") if path.is_file()}
    expected = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert found == expected - STRANGERS.keys()
    for path in (tmp_path / "out").glob("*.safetensors"):
        cli.done("dequantize", path, tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == (tmp_path / "dense" / path.name).read_bytes()
    assert json.loads((tmp_path / "dense/config.json").read_text()) == CONFIG
    index = json.loads((tmp_path / "dense" / INDEX).read_text())
    assert index["weight_map"] == json.loads((model / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors().values())


def test_a_folder_without_quantized_layers_is_told(model, tmp_path):
    ended = cli.run("dequantize", model, tmp_path / "out")
    assert ended.code == 3 and "has no quantized layers" in ended.err and not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_refused(model, tmp_path):
    """In a layout that is read it is decoded: test_cli_convert.py."""
    said = shutil.copytree(model, tmp_path / "said")
    (said / "config.json").write_text(json.dumps({"text_config": {"quantization_config": {"quant_method": "fp8"}}}))
    assert "says that it is quantized" in refused(3, said, tmp_path / "again", "-s", "int8")


def test_a_model_of_transposed_layers_is_refused(tmp_path):
    source = write_model(tmp_path / "model", shards=1, model_type="gpt2")
    assert "`gpt2`, whose linear layers are stored transposed" in refused(3, source, tmp_path / "out", "-s", "int8")


def test_of_a_model_linear_layers_alone_are_quantized(tmp_path):
    """transformers looks for codes in no other module."""
    source = write_model(tmp_path / "model", shards=1)
    more = {"model.conv.weight": np.ones((8, 4, 4, 8), BF16), "model.experts.weight_of_all": np.ones((2, 256, 256), BF16)}
    cli.write(source / "model.safetensors", tensors() | more)
    cli.quantize(source, tmp_path / "out", "-s", "int8")
    assert more.keys() <= all_tensors(tmp_path / "out").keys()
    ignore = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.conv", r"re:model\.experts\..*"} <= set(ignore)


def test_force_starts_over_and_leaves_no_old_weights(begun, model, tmp_path):
    one = write_model(tmp_path / "one", shards=1)
    cli.quantize(one, begun, "-s", "W4A16", "--force")
    assert [path.name for path in begun.glob("*.safetensors")] == ["model.safetensors"]
    before = (begun / "model.safetensors").stat().st_mtime_ns
    cli.quantize(one, begun, "-s", "W4A16", "--force")
    assert (begun / "model.safetensors").stat().st_mtime_ns > before and (begun / "config.json").exists()


def test_folders_within_each_other_and_reports_within_them_are_refused(model, tmp_path):
    inside = shutil.copytree(model, tmp_path / "inside")
    for args in [(inside, inside / "out"), (inside / "assets", inside), (inside, inside),
                 (inside, tmp_path / "out", "--report", inside / "config.json"),
                 (inside, tmp_path / "out", "--report", tmp_path / "out/config.json", "--force")]:
        error = refused(2, *args, "-s", "W4A16")
        assert "is within" in error or "named twice" in error
    assert files(inside) == files(model) and not (tmp_path / "out").exists()


def test_weights_that_are_not_of_the_model_are_named_and_not_copied(model, tmp_path):
    ended = cli.quantize(model, tmp_path / "out", "-s", "W4A16")
    left_out = sorted(name for name in STRANGERS if not name.startswith(".git"))
    assert f"not copied: {', '.join(left_out)}" in ended.out.replace("\n", " ")
    assert json.loads((tmp_path / "out/quarrel.report.json").read_text())["left_out"] == left_out


def test_a_file_of_tensors_under_another_ending_is_written_once(model, tmp_path):
    def renamed(map, at):
        file = map[first(map)]
        (at / file).rename(at / "model.st")
        map.update({name: "model.st" for name, home in map.items() if home == file})

    cli.quantize(edited(model, tmp_path / "renamed", renamed), tmp_path / "out", "-s", "W4A16")
    assert any("weight_packed" in name for name in cli.read(tmp_path / "out/model.st").tensors)


def test_scales_that_lie_elsewhere_are_told(model, tmp_path):
    cli.quantize(model, tmp_path / "out", "-s", "W8A8")
    one, other = sorted((tmp_path / "out").glob("*.safetensors"))[:2]
    here, there = cli.read(one).tensors, cli.read(other).tensors
    name = next(name for name in here if name.endswith(".weight_scale"))
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    index["weight_map"][name] = other.name
    (tmp_path / "out" / INDEX).write_text(json.dumps(index))
    cli.write(other, there | {name: here.pop(name)})
    cli.write(one, here)
    ended = cli.run("dequantize", tmp_path / "out", tmp_path / "dense")
    assert ended.code == 3 and "wants both in one file" in ended.err and not (tmp_path / "dense").exists()


@pytest.fixture
def begun(model, tmp_path):
    """A folder in which one file is missing."""
    out = tmp_path / "out"
    refused(7, model, out, "-s", "W4A16", "--sqnr-db-min", "99")
    assert not (out / "config.json").exists() and len(list(out.glob("*.safetensors"))) == 3
    return out


def test_a_gate_that_is_missed_leaves_no_model(begun, model):
    error = refused(7, model, begun, "-s", "W4A16", "--cosine-min", "0.99999")
    assert "has a cosine of 0.9" in error and "expected at least 0.99999" in error
    assert not (begun / "config.json").exists()
    cli.quantize(model, begun, "-s", "W4A16")
    assert (begun / "config.json").exists() and not (begun / ".quarrel").exists()


def test_a_gate_that_is_missed_leaves_no_file(tmp_path):
    source = cli.write(tmp_path / "one.safetensors", tensors())
    error = refused(7, source, tmp_path / "out.safetensors", "-s", "int2/g64", "--sqnr-db-min", "12")
    assert "dB: expected at least 12 dB" in error
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_another_command_or_another_source_does_not_go_on(begun, model, tmp_path):
    assert "its command differs" in refused(2, model, begun, "-s", "W8A16")
    changed = shutil.copytree(model, tmp_path / "changed")
    shard = next(changed.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert "its source differs" in refused(2, changed, begun, "-s", "W4A16")
    cli.quantize(model, begun, "-s", "W8A16", "--force")
    cli.quantize(model, tmp_path / "whole", "-s", "W8A16")
    assert files(begun) == files(tmp_path / "whole")


def test_a_file_that_is_not_as_it_was_written_is_made_again(begun, model, tmp_path):
    shard = sorted(begun.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    cli.quantize(model, begun, "-s", "W4A16")
    cli.quantize(model, tmp_path / "whole", "-s", "W4A16")
    assert files(begun) == files(tmp_path / "whole")


def test_a_folder_that_holds_something_is_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert "exists" in refused(2, model, tmp_path / "out", "-s", "W4A16")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("mine")
    assert "expected a folder" in refused(2, model, tmp_path / "file", "-s", "W4A16")


def edited(model: Path, folder: Path, edit) -> Path:
    """A copy whose index is edited."""
    copy = shutil.copytree(model, folder)
    index = json.loads((copy / INDEX).read_text())
    edit(index["weight_map"], copy)
    (copy / INDEX).write_text(json.dumps(index))
    return copy


def first(weight_map):
    return next(iter(weight_map))


BROKEN = {
    "a file that is missing": (lambda map, _: map.update({first(map): "gone.safetensors"}), "`gone.safetensors`, which is not"),
    "a file elsewhere": (lambda map, _: map.update({first(map): "../x.safetensors"}), "expected a file in its own folder"),
    "a tensor elsewhere": (lambda map, _: map.update({"no.such": map[first(map)]}), "tensor `no.such` in `model-00001"),
    "nothing": (lambda map, _: map.clear(), "`weight_map` is empty"),
    "a file twice": (lambda map, at: (shutil.copy(at / map[first(map)], at / "b.safetensors"),
                                      map.update({first(map): "b.safetensors"})), "is in `b.safetensors` and in `model-0"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_index_that_lies_is_told(what, model, tmp_path):
    edit, says = BROKEN[what]
    broken = edited(model, tmp_path / "broken", edit)
    assert says in refused(3, broken, tmp_path / "out", "-s", "W4A16")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_model_are_told(model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no file of safetensors" in refused(3, tmp_path / "empty", tmp_path / "out", "-s", "W4A16")
    several = shutil.copytree(model, tmp_path / "several")
    (several / INDEX).unlink()
    assert "several files of safetensors and no index" in refused(3, several, tmp_path / "out", "-s", "W4A16")
    wrong = shutil.copytree(model, tmp_path / "wrong")
    (wrong / "config.json").write_text("[1")
    assert "config.json" in refused(3, wrong, tmp_path / "out", "-s", "W4A16")
    twice = shutil.copytree(model, tmp_path / "twice")
    name, file = next(iter(json.loads((twice / INDEX).read_text())["weight_map"].items()))
    (twice / INDEX).write_text('{"weight_map": {"%s": "%s", "%s": "%s"}}' % ((name, file) * 2))
    assert f"tensor `{name}` is there twice" in refused(3, twice, tmp_path / "out", "-s", "W4A16")


def test_a_server_elsewhere_makes_the_same_model(model, tmp_path, server):
    cli.quantize(model, tmp_path / "there", "-s", "W4A16", "--server", server.location)
    cli.quantize(model, tmp_path / "here", "-s", "W4A16")
    there, here = files(tmp_path / "there"), files(tmp_path / "here")
    assert there == here
