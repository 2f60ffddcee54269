"""Models of GPTQ and AWQ are seen in the layout of compressed-tensors: the same codes, scales and zero points, which stand for the same numbers."""

import json

import numpy as np
import pytest

from golden import ggufs, legacy
from harness import cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("legacy")
    return {name: model.write(folder / name) for name, model in (legacy.MODELS | legacy.DECODED).items()}


@pytest.mark.parametrize("dtype", ["f32", "f16", None])
@pytest.mark.parametrize("name", legacy.MODELS | legacy.DECODED)
def test_values_are_those_of_the_formula(name, dtype, folders, tmp_path):
    cli.done("dequantize", folders[name], tmp_path / "dense", *(("--dtype", dtype) if dtype else ()))
    dense = cli.read(tmp_path / "dense/model.safetensors").tensors
    model = (legacy.MODELS | legacy.DECODED)[name]
    layers = model.layers()
    for module, layer in layers.items():
        # Without a word, of the type of the scales.
        values = layer.values if dtype == "f32" else layer.values.astype(np.float16)
        assert dense[f"{module}.weight"].dtype == values.dtype
        np.testing.assert_array_equal(dense[f"{module}.weight"], values, err_msg=module)
    others = {tensor for tensor in model.family.tensors() if tensor.removesuffix(".weight") not in layers}
    assert set(dense) == others | {f"{module}.weight" for module in layers}
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("name", legacy.MODELS)
def test_a_copy_has_the_same_codes_scales_and_zero_points(name, folders, tmp_path):
    cli.quantize(folders[name], tmp_path / "copy", "-s", "COPY")
    model = legacy.MODELS[name]
    made = cli.read(tmp_path / "copy/model.safetensors").tensors
    expected = {}
    for module, layer in model.layers().items():
        expected |= {f"{module}.{part}": array for part, array in legacy.packed(layer, model.bits).items()}
    kept = {tensor: array for tensor, array in model.family.tensors().items() if tensor.removesuffix(".weight") not in model.layers()}
    assert set(made) == set(expected) | set(kept)
    for tensor, array in (expected | kept).items():
        assert made[tensor].dtype == array.dtype, tensor
        np.testing.assert_array_equal(made[tensor], array, err_msg=tensor)
    config = json.loads((tmp_path / "copy/config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["format"] == "pack-quantized" and "lm_head" in config["ignore"] and config["quant_method"] == "compressed-tensors"
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (model.bits, model.group, model.symmetric)


@pytest.mark.parametrize("name", legacy.MODELS)
def test_a_copy_is_foretold(name, folders, tmp_path):
    told = cli.done("estimate", folders[name], "-s", "COPY", "--json").json
    cli.quantize(folders[name], tmp_path / "copy", "-s", "COPY")
    made = cli.read(tmp_path / "copy/model.safetensors").tensors
    assert told["destination_bytes"] == [sum(array.nbytes for array in made.values())] * 2
    assert {layer["name"]: layer["shape"] for layer in told["layers"]} == {tensor: list(array.shape) for tensor, array in made.items()}
    before = sum(array.nbytes for array in cli.read(folders[name] / "model.safetensors").tensors.values())
    report = json.loads((tmp_path / "copy/quarrel.report.json").read_bytes())
    assert told["source_bytes"] == report["totals"]["source_bytes"] == before


def test_inspect_says_what_they_are(folders):
    told = cli.done("inspect", folders["awq"], "--json").json
    assert set(told["schemes"].values()) == {"int4-asym/g64"} and len(told["schemes"]) == 7


@pytest.mark.parametrize("name", ["gptq", *legacy.DECODED])
def test_they_become_anything_that_a_dense_model_becomes(name, folders, tmp_path):
    told = cli.done("dequantize", folders[name], tmp_path / "dense", "--json").json
    assert set(told["dequantized"]) == {f"{module}.weight" for module in (legacy.MODELS | legacy.DECODED)[name].layers()}
    for scheme, ending in (("Q8_0", ".gguf"), ("FP8_DYNAMIC", "")):
        cli.quantize(folders[name], tmp_path / f"made{ending}", "-s", scheme)
        cli.quantize(tmp_path / "dense", tmp_path / f"expected{ending}", "-s", scheme)
    assert ggufs.read(tmp_path / "made.gguf").tensors == ggufs.read(tmp_path / "expected.gguf").tensors
    made, expected = (cli.read(tmp_path / name / "model.safetensors").tensors for name in ("made", "expected"))
    assert {name: array.tobytes() for name, array in made.items()} == {name: array.tobytes() for name, array in expected.items()}


@pytest.mark.parametrize("name, scheme", [("ordered", "int4-asym/g64"), ("3 bits, symmetric", "int3/g64"), ("8 bits with zero points", "int8-asym/g64"),
                                          ("a short last group", "int4-asym/g96")])
def test_what_has_no_layout_is_seen_as_what_it_decodes_to(name, scheme, folders, tmp_path):
    modules = {f"model.layers.0.{module}" for module in "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj".split()}
    assert cli.done("inspect", folders[name], "--json").json["schemes"] == dict.fromkeys(modules, scheme)
    cli.quantize(folders[name], tmp_path / "made", "-s", "W8A16/g64")
    report = json.loads((tmp_path / "made/quarrel.report.json").read_bytes())
    assert {layer["from"] for layer in report["layers"] if layer["status"] == "quantized"} == {scheme}
    why = {"ordered": "`g_idx`, of `desc_act`", "3 bits, symmetric": "3 bits", "8 bits with zero points": "8 bits and zero points", "a short last group": "its last group is shorter"}
    for destination in ("copy", "copy.gguf"):
        ended = cli.run("quantize", folders[name], tmp_path / destination, "-s", "COPY")
        cli.check_refusal(ended, 3, "layer `model.layers.0.", why[name], "which neither the layout of compressed-tensors nor a block holds")
        assert not (tmp_path / destination).exists()


def test_a_copy_of_eight_bits_becomes_blocks_of_the_same_numbers(folders, tmp_path):
    cli.quantize(folders["gptq 8 bits"], tmp_path / "made.gguf", "-s", "COPY")
    assert {kind for kind, shape, _ in ggufs.read(tmp_path / "made.gguf").tensors.values() if len(shape) > 1} == {"Q8_0", "F16"}


def spoiled(folder, tensors=None, said=None):
    file = cli.read(folder / "model.safetensors")
    found = {name: array.copy() for name, array in file.tensors.items()}
    (tensors or (lambda _: None))(found)
    cli.write(folder / "model.safetensors", found)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said or {}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("method, tensors, said, says", [
    ("gptq", lambda t: t[f"{Q}.scales"].__setitem__((1, 5), np.nan), None, f"layer `{Q}`: the scale of channel 5 and group 1 is NaN"),
    ("gptq", lambda t: (t[f"{Q}.scales"].__setitem__((1, 5), np.inf), t[f"{Q}.g_idx"].__setitem__(0, 1)), {"desc_act": True}, None),
    ("gptq", lambda t: t[f"{Q}.g_idx"].__setitem__(7, 4), None, "its `g_idx` has 4 for column 7: expected a group, 0 to 3"),
    ("gptq", lambda t: t.pop(f"{Q}.g_idx"), {"desc_act": True}, "its columns are ordered (`desc_act`)"),
    ("gptq", lambda t: t[f"{Q}.qzeros"].fill(-1), None, "the zero point of channel 0 and group 0 is 16: codes of 4 bits have none beyond 15"),
    ("gptq", lambda t: t.pop(f"{Q}.scales"), None, "it has no `scales`"),
    ("gptq", lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][:, :8].copy()}), None, "which are no codes of 4 bits"),
    ("awq", lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"][:1].copy()}), None, "its `qzeros` is I32 [1, 32]: expected I32 [4, 32]"),
    ("gptq", None, {"bits": "8"}, "its config.json has `bits` \"8\": expected a whole number"),
    ("gptq", None, {"bits": None}, "its config.json has no `bits`"),
    ("gptq", None, {"group_size": 128}, "it has 4 groups in 256 columns: expected groups of 128 columns, as its config.json says"),
    ("awq", None, {"group_size": 70}, "it has 4 groups in 256 columns: expected groups of 70 columns"),
    ("awq", None, {"group_size": None}, "it has 4 groups, and neither a `group_size` in its config.json nor a `g_idx` says of which columns"),
    ("gptq", None, {"sym": True}, "its zero points are not in the middle of the codes"),
    ("gptq", lambda t: t.pop(f"{Q}.qzeros"), None, "it has no `qzeros`"),
    ("awq", lambda t: t.pop(f"{Q}.qzeros"), {"zero_point": None}, "it has no `qzeros`, and its config.json does not say that it is symmetric"),
    ("gptq", None, {"dynamic": {"-:.*q_proj": {}}}, "layers of their own bits are not read"),
    ("gptq", None, {"desc_act": "true"}, "its config.json has `desc_act` \"true\": expected true or false"),
    ("gptq", lambda t: t.update({f"{Q}.weight": np.ones((256, 256), np.float16)}), None, "is there beside its `qweight`"),
    ("awq", lambda t: t.update({"model.layers.0.mlp.act.scales": np.ones(4, np.float16)}), None, "is there and no `qweight` that it is of"),
    ("gptq", None, {"bits": 5}, "its layers have 5 bits"),
    ("gptq", None, {"checkpoint_format": "marlin"}, "in the format `marlin`"),
    ("awq", None, {"version": "gemv"}, "of version `gemv`"),
], ids=str.split("scale scale-of-ordered order no-order zero lacks scales zeros text-bits no-bits group short-group unsaid-group symmetric no-zeros unsaid-zeros dynamic flag beside orphan bits format version"))
def test_what_has_no_place_in_the_layout_is_refused(method, tensors, said, says, tmp_path):
    folder = spoiled(legacy.Model(method=method).write(tmp_path / "model"), tensors, said)
    for command in (["quantize", folder, tmp_path / "copy", "-s", "COPY"], ["dequantize", folder, tmp_path / "dense"]):
        ended = cli.run(*command)
        # An ordered layer is no copy, whatever its scales are.
        ordered = "nor a block holds" if "COPY" in command else "the scale of channel 5 and group 1 is inf"
        cli.check_refusal(ended, 3, says or ordered)
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "copy", "dense"}
    assert not any((tmp_path / made / "config.json").exists() for made in ("copy", "dense"))


QUANTIZE = ["quantize", "{model}", "{made}", "-s", "W8A16/g64", "--on-error", "continue"]
DEQUANTIZE = ["dequantize", "{model}", "{made}"]
THERE = ["--server", "{server}"]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("command", [["measure", "{model}", "{model}"], QUANTIZE, QUANTIZE + THERE, DEQUANTIZE + THERE], ids=["measure", "quantize", "quantize there", "dequantize there"])
def test_scales_that_are_not_finite_are_faults_of_the_source(command, ordered, server, tmp_path):
    """Whoever reads the layer: a scale of nothing is no number of a layer that would be quantized without it."""
    folder = spoiled(legacy.Model(ordered=ordered).write(tmp_path / "model"), lambda t: t[f"{Q}.scales"].__setitem__((1, 5), np.nan))
    ended = cli.run(*(argument.format(model=folder, made=tmp_path / "made", server=server.location) for argument in command))
    cli.check_refusal(ended, 3, f"layer `{Q}`: the scale of channel 5 and group 1 is NaN: expected a finite number")
    assert not (tmp_path / "made/config.json").exists()


def test_a_scale_that_is_not_finite_in_the_layout_is_a_fault_of_the_source(server, tmp_path):
    folder = legacy.Model().write(tmp_path / "model")
    cli.quantize(folder, tmp_path / "copy", "-s", "COPY")
    file = cli.read(tmp_path / "copy/model.safetensors")
    tensors = {name: array.copy() for name, array in file.tensors.items()}
    tensors[f"{Q}.weight_scale"][5, 1] = np.nan
    cli.write(tmp_path / "copy/model.safetensors", tensors, {"format": "pt"})
    for command in (QUANTIZE, DEQUANTIZE, ["measure", "{model}", "{model}"], QUANTIZE + THERE, DEQUANTIZE + THERE):
        made = tmp_path / command[0]
        ended = cli.run(*(argument.format(model=tmp_path / "copy", made=made, server=server.location) for argument in command))
        cli.check_refusal(ended, 3, "[source_malformed]", f"layer `{Q}`: a scale is NaN, expected a finite number")


def test_groups_that_no_configuration_says_are_those_of_the_columns(tmp_path):
    folder = spoiled(legacy.Model(group=96, ordered=True).write(tmp_path / "model"), said={"group_size": None})
    assert set(cli.done("inspect", folder, "--json").json["schemes"].values()) == {"int4-asym/g96"}


def test_a_group_beyond_the_columns_is_all_of_them(tmp_path):
    model = legacy.Model(group=256, symmetric=True)
    folder = spoiled(model.write(tmp_path / "model"), lambda t: [t.pop(name) for name in list(t) if "down_proj" in name], {"group_size": 2**40})
    cli.quantize(folder, tmp_path / "copy", "-s", "COPY")
    made = cli.read(tmp_path / "copy/model.safetensors").tensors
    np.testing.assert_array_equal(made[f"{Q}.weight_packed"], legacy.packed(model.layers()[Q], 4)["weight_packed"])


def test_a_layer_over_two_files_is_refused(tmp_path):
    folder = legacy.Model().write(tmp_path / "model")
    tensors = cli.read(folder / "model.safetensors").tensors
    (folder / "model.safetensors").unlink()
    parts = {"a.safetensors": {name: array for name, array in tensors.items() if not name.endswith("qzeros")}}
    parts["b.safetensors"] = {name: array for name, array in tensors.items() if name.endswith("qzeros")}
    for file, held in parts.items():
        cli.write(folder / file, held)
    homes = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    for command in (["quantize", folder, tmp_path / "copy", "-s", "COPY"], ["dequantize", folder, tmp_path / "dense"]):
        cli.check_refusal(cli.run(*command), 3, "its `qzeros` is in `", "this version wants both in one file")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_says_that_a_model_is_gptq_is_not_copied(tmp_path):
    folder = legacy.Model().write(tmp_path / "model")
    (folder / "quantize_config.json").write_text("{}")
    cli.quantize(folder, tmp_path / "copy", "-s", "COPY")
    assert not (tmp_path / "copy/quantize_config.json").exists() and (tmp_path / "copy/tokenizer.model").exists()


def test_a_copy_of_the_layout_keeps_what_its_configuration_says(tmp_path):
    """What no tensor tells, as activations."""
    folder = legacy.Model().family.write(tmp_path / "dense")
    cli.quantize(folder, tmp_path / "quantized", "-s", "W8A8")
    file = cli.read(tmp_path / "quantized/model.safetensors")
    cli.write(tmp_path / "quantized/model.safetensors", file.tensors, {"format": "pt"})
    cli.quantize(tmp_path / "quantized", tmp_path / "copy", "-s", "COPY")
    assert (tmp_path / "copy/config.json").read_text() == (tmp_path / "quantized/config.json").read_text()
    assert cli.read(tmp_path / "copy/model.safetensors").tensors.keys() == file.tensors.keys()


def test_a_copy_of_deepseeks_layout_is_refused(tmp_path):
    """Its scales have another name, and loaders of the layout would find none."""
    folder = legacy.Model().family.write(tmp_path / "dense")
    cli.quantize(folder, tmp_path / "quantized", "-s", "FP8_BLOCK")
    tensors = cli.read(tmp_path / "quantized/model.safetensors").tensors
    renamed = {name.replace("weight_scale", "weight_scale_inv"): array for name, array in tensors.items()}
    renamed = {name: array.astype(np.float32) if name.endswith("_inv") else array for name, array in renamed.items()}
    cli.write(tmp_path / "quantized/model.safetensors", renamed)
    cli.check_refusal(cli.run("quantize", tmp_path / "quantized", tmp_path / "copy", "-s", "COPY"), 3, "DeepSeek's layout")


@pytest.mark.parametrize("flags, says", [
    (["--group-size", "32"], "`group_size` has no effect on `COPY` here"), (["--sqnr-db-min", "20"], "`COPY` measures nothing"),
    (["--on-error", "continue"], "`on_error` has no effect on `COPY` here"), (["--arith", "weight-dtype"], "`arith` has no effect on `COPY` here"),
    (["--ignore", "x"], "`--ignore` and `--no-standard` have no effect"),
])
def test_a_copy_has_no_options(flags, says, folders, tmp_path):
    cli.check_refusal(cli.run("quantize", folders["awq"], tmp_path / "copy", "-s", "COPY", *flags), 2, says)


def test_there_must_be_something_to_copy(tmp_path):
    folder = legacy.Model().family.write(tmp_path / "dense")
    cli.check_refusal(cli.run("quantize", folder, tmp_path / "copy", "-s", "COPY"), 3, "has no quantized layers")
