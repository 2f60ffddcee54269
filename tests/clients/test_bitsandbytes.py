"""bitsandbytes' formats as users meet them: the command line and the Python package. Their bytes: tests/golden/test_bnb.py; that transformers loads
them: tests/interop/peers/peer_bitsandbytes.py.
"""

import json

import ml_dtypes
import numpy as np
import pytest
import quarrel

from golden import bnb
from harness import cli
from harness.model import write_model

SCHEMES = ("nf4", "fp4/g32", "int8_rowwise", "nf4;double_quant=true", "fp4/g128;double_quant=true")
STATE = "quant_state.bitsandbytes__"


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as client:
        yield client


@pytest.fixture(scope="module")
def array():
    return np.random.default_rng(5).normal(0, 0.02, (6, 512)).astype(np.float32)


@pytest.mark.parametrize("book", bnb.BOOKS)
def test_codes_are_places_in_the_codebook(book, client, array):
    layer = client.quantize({"x": array}, scheme=f"{book}/g128").collect()["x"]
    values = json_book(book)
    assert layer.codes.shape == array.shape and layer.codes.dtype == np.uint8 and layer.scales.shape == (6, 4)
    decoded = values[layer.codes].reshape(6, 4, 128) * layer.scales[..., None]
    np.testing.assert_array_equal(decoded.reshape(array.shape), layer.dequantize())
    np.testing.assert_array_equal(layer.scales, np.abs(array.reshape(6, 4, 128)).max(axis=2))
    assert layer.metrics.bits_per_weight == 4 + 32 / 128


def json_book(book: str) -> np.ndarray:
    if book == "nf4":
        return bnb.NF4
    above = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
    return np.concatenate([above, -above])


@pytest.mark.parametrize("book", bnb.BOOKS)
def test_scales_are_quantized_too(book, client, array):
    """Of 6 x 512 / 32 = 96 scales, and in runs of one channel, which all wait for the last."""
    tables = {"plain": f"{book}/g32", "double": f"{book}/g32;double_quant=true"}
    plain, double = (client.quantize({"x": array}, scheme=scheme).collect()["x"] for scheme in tables.values())
    np.testing.assert_array_equal(plain.codes, double.codes)
    assert plain.nested_scales is None and set(plain.to_numpy()) == {"codes", "scales"}
    assert set(double.to_numpy()) == {"codes", "scales", "absmax", "nested_absmax", "nested_offset"}
    nested = double.nested_scales
    assert (nested["absmax"].dtype, nested["absmax"].shape, nested["nested_absmax"].shape) == (np.uint8, (96,), (1,))
    assert nested["nested_offset"] == [bnb.mean(plain.scales.reshape(-1))]
    # A byte is no more than 2 of 128 parts of the greatest distance from the mean away.
    away = np.abs(double.scales - plain.scales).max()
    assert 0 < away < nested["nested_absmax"][0] / 64
    decoded = json_book(book)[double.codes].reshape(6, 16, 32) * double.scales[..., None]
    np.testing.assert_array_equal(decoded.reshape(array.shape), double.dequantize())
    assert double.metrics.bits_per_weight == pytest.approx(4 + 8 / 32 + 64 / array.size)
    assert plain.metrics.sqnr_db - 0.5 < double.metrics.sqnr_db < plain.metrics.sqnr_db + 0.1
    assert double.metrics.max_abs_error == pytest.approx(np.abs(array - double.dequantize()).max())


def test_where_one_layer_fails_no_scale_of_it_is_there(client, array):
    spoiled = array.copy()
    spoiled[3, 7] = np.nan
    result = client.quantize({"x": array, "y": spoiled, "z": array}, scheme="nf4;double_quant=true", on_error="continue").collect()
    assert [result[name].status for name in "xyz"] == ["quantized", "failed", "quantized"]
    np.testing.assert_array_equal(result["x"].scales, result["z"].scales)


def test_double_quantization_is_of_blocks(client, array):
    for scheme in ("W4A16;double_quant=true", "int8_rowwise;double_quant=true", "nf4;double_quant=yes", "nf4;mx=even;double_quant=true"):
        with pytest.raises(quarrel.InvalidInputError, match="double_quant=true") as raised:
            client.quantize({"x": array}, scheme=scheme).collect()
        assert raised.value.reason == "scheme_unknown"
    assert client.quantize({"x": array}, scheme="nf4;double_quant=false").collect()["x"].scheme == "nf4"


def test_rows_of_int8(client, array):
    layer = client.quantize({"x": array}, scheme="int8_rowwise").collect()["x"]
    assert layer.codes.dtype == np.int8 and np.abs(layer.codes).max(axis=1).tolist() == [127] * 6
    np.testing.assert_array_equal(layer.scales[:, 0], np.abs(array).max(axis=1))
    np.testing.assert_array_equal(layer.codes * layer.scales * np.float32(1 / 127), layer.dequantize())


def test_blocks_that_cross_rows_and_sizes_that_there_are_not_are_refused(client):
    with pytest.raises(quarrel.InvalidInputError, match="group size 64 does not divide 96 columns") as raised:
        client.quantize({"x": np.ones((2, 96), np.float32)}, scheme="nf4").collect()
    assert raised.value.reason == "group_size_indivisible"
    assert client.quantize({"x": np.ones((2, 96), np.float32)}, scheme="nf4/g32").collect()["x"].status == "quantized"
    for size in (16, 48, 8192):
        with pytest.raises(quarrel.InvalidInputError, match=f"`nf4` is {size}: expected 32, 64"):
            client.quantize({"x": np.ones((2, 96), np.float32)}, scheme="nf4", group_size=size).collect()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("bitsandbytes") / "model")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_becomes_one_of_bitsandbytes_and_comes_back(scheme, model, client, tmp_path):
    cli.quantize(model, tmp_path / "made", "-s", scheme)
    dense, made = all_tensors(model), all_tensors(tmp_path / "made")
    said = json.loads((tmp_path / "made/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "bitsandbytes" and said["load_in_8bit"] == (scheme == "int8_rowwise")
    assert said["bnb_4bit_use_double_quant"] == ("double_quant" in scheme)
    told = cli.done("inspect", tmp_path / "made", "--json").json
    assert set(told["schemes"].values()) == {scheme}
    layers = [f"{module}.weight" for module in told["schemes"]]
    assert len(layers) > 5 and not {name.removesuffix(".weight") for name in layers} & set(said["llm_int8_skip_modules"])
    quantized = client.quantize({name: dense[name] for name in layers}, scheme=scheme).collect()
    for name in layers:
        check_stored(name, quantized[name], made, scheme)
    kept = set(dense) - set(layers)
    assert {name for name in made if name in dense} == kept | set(layers)
    for name in kept:
        assert made[name].tobytes() == dense[name].tobytes()
    cli.done("dequantize", tmp_path / "made", tmp_path / "back", "--dtype", "f32")
    back = all_tensors(tmp_path / "back")
    assert set(back) == set(dense) and "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    for name in layers:
        np.testing.assert_array_equal(back[name], quantized[name].dequantize())


def check_stored(name: str, layer, made: dict, scheme: str):
    module = name.removesuffix(".weight")
    assert made[name].tobytes() == layer.packed.tobytes()
    if scheme == "int8_rowwise":
        assert (made[name].shape, made[name].dtype) == (layer.shape, np.int8)
        np.testing.assert_array_equal(made[f"{module}.SCB"], layer.scales.reshape(-1))
        assert made[f"{module}.weight_format"].tolist() == 0
        return
    book = scheme[:3]
    assert (made[name].shape, made[name].dtype) == ((np.prod(layer.shape) // 2, 1), np.uint8)
    nested = layer.nested_scales
    np.testing.assert_array_equal(made[f"{name}.absmax"], nested["absmax"] if nested else layer.scales.reshape(-1))
    np.testing.assert_array_equal(made[f"{name}.quant_map"], json_book(book))
    state = json.loads(made[f"{name}.{STATE}{book}"].tobytes())
    words = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    block = np.prod(layer.shape) // layer.scales.size
    expected = {"quant_type": book, "blocksize": block, "dtype": words[layer.dtype], "shape": list(layer.shape)}
    if nested:
        np.testing.assert_array_equal(made[f"{name}.nested_absmax"], nested["nested_absmax"])
        values = made[f"{name}.nested_quant_map"]
        assert values.shape == (256,) and (np.diff(values) > 0).all() and values[[0, 127, 255]].tolist() == [np.float32(-0.99296875), 0, 1]
        expected |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(nested["nested_offset"][0])}
    assert state == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_is_a_source_like_any_other(scheme, model, tmp_path):
    cli.quantize(model, tmp_path / "made", "-s", scheme)
    cli.done("dequantize", tmp_path / "made", tmp_path / "dense")
    cli.quantize(tmp_path / "made", tmp_path / "again", "-s", "W8A8")
    cli.quantize(tmp_path / "dense", tmp_path / "expected", "-s", "W8A8")
    found, expected = all_tensors(tmp_path / "again"), all_tensors(tmp_path / "expected")
    assert {name: array.tobytes() for name, array in found.items()} == {name: array.tobytes() for name, array in expected.items()}
    measured = cli.done("measure", tmp_path / "made", model, "--json").json
    assert {layer["first"] for layer in measured["layers"] if layer["metrics"]["mse"]} == {scheme}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_estimate_foretells_it(scheme, model, tmp_path):
    told = cli.done("estimate", model, "-s", scheme, "--json").json["layers"]
    cli.quantize(model, tmp_path / "made", "-s", scheme)
    stored = sum(array.nbytes for array in all_tensors(tmp_path / "made").values())
    assert [sum(layer["destination_bytes"][end] for layer in told) for end in (0, 1)] == [stored, stored]
    report = json.loads((tmp_path / "made/quarrel.report.json").read_text())["layers"]
    bits = {layer["name"]: layer["metrics"]["bits_per_weight"] for layer in report if layer["scheme"]}
    assert {layer["name"]: layer["bits_per_weight"] for layer in told if layer["schemes"]} == pytest.approx(bits)


def test_a_configuration_names_one_method(model, tmp_path):
    for other in ("int8", "fp4", "int8_rowwise"):
        recipe = {"rules": [{"targets": ["*q_proj*"], "scheme": "nf4"}, {"targets": ["*"], "scheme": other}]}
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        refused = cli.run("quantize", model, tmp_path / "made", "--recipe", tmp_path / "recipe.json")
        assert refused.code and "option_conflict" in refused.err and "`nf4`" in refused.err and f"`{other}`" in refused.err
        assert not (tmp_path / "made").exists()


def spoiled(folder, change):
    """The one file of a folder, with other tensors."""
    file = cli.read(folder / "model.safetensors")
    tensors = dict(file.tensors)
    change(tensors)
    cli.write(folder / "model.safetensors", tensors)


LAYER = "model.layers.0.mlp.up_proj.weight"
MODULE = LAYER.removesuffix(".weight")
BOOK_STATE = f"{LAYER}.{STATE}nf4"


def said(**changed):
    def change(tensors):
        state = json.loads(tensors[BOOK_STATE].tobytes()) | changed
        tensors[BOOK_STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return change


def text(words: bytes):
    return lambda tensors: tensors.update({BOOK_STATE: np.frombuffer(words, np.uint8)})


WRONG = {
    "no JSON": (text(b"{"), "is no state"),
    "a long state": (text(b" " * 5000), "at most 4096"),
    "another type": (said(quant_type="af4"), "af4"),
    "another scheme": (said(quant_type="int4"), "says `int4`: expected `nf4`"),
    "the other book": (said(quant_type="fp4"), "says `fp4`: expected `nf4`"),
    "two states": (lambda tensors: tensors.update({BOOK_STATE.replace("nf4", "fp4"): tensors[BOOK_STATE]}), "it has both"),
    "scales of compressed-tensors": (lambda tensors: tensors.update({f"{MODULE}.weight_scale": np.ones((512, 1), np.float32)}), "two layouts"),
    "scales of rows": (lambda tensors: tensors.update({f"{MODULE}.SCB": np.ones(512, np.float32)}), "two layouts"),
    "codes stored as another type": (lambda tensors: tensors.update({LAYER: np.ones((32768, 1), np.float16)}), "bnb_4bit_quant_storage"),
    "a huge block": (said(blocksize=2**31, shape=[1, 2**47]), "nf4/g2147483648"),
    "another block": (said(blocksize=48), "nf4/g48"),
    "blocks that cross rows": (said(blocksize=4096), "cross the rows"),
    "another dtype": (said(dtype="int8"), "`int8`"),
    "another shape": (said(shape=[2, 64]), "expected U8 [64, 1]"),
    "a shape that overflows": (said(shape=[2**40, 2**40]), "2^48"),
    "rank 1": (said(shape=[64]), "two dimensions"),
    "negative": (said(shape=[-1, 64]), "is no state"),
    "a half of double quantization": (said(nested_blocksize=256), "`nested_offset` none: expected 256 and a number"),
    "double quantization of other blocks": (said(nested_blocksize=64, nested_offset=0.5), "`nested_blocksize` 64"),
    "double quantization without its bytes": (said(nested_blocksize=256, nested_offset=0.5), "nested_absmax"),
    "another codebook": (lambda tensors: tensors.update({f"{LAYER}.quant_map": np.arange(16, dtype=np.float32)}), "is not the codebook"),
    "no state": (lambda tensors: tensors.pop(BOOK_STATE), "quant_state"),
    "too few scales": (lambda tensors: tensors.update({f"{LAYER}.absmax": np.ones(3, np.float32)}), "absmax` is F32 [3]"),
}


def refuse_spoiled(tmp_path, scheme: str, change, word: str):
    """A model of that scheme, changed so, is refused by name; nothing is written."""
    folder = write_model(tmp_path / "model", shards=1)
    cli.quantize(folder, tmp_path / "made", "-s", scheme)
    spoiled(tmp_path / "made", change)
    refused = cli.run("dequantize", tmp_path / "made", tmp_path / "out")
    assert refused.code and word in refused.err and MODULE in refused.err, refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", WRONG)
def test_a_state_that_is_not_one_is_refused_by_name(case, tmp_path):
    _, word = WRONG[case]
    refuse_spoiled(tmp_path, "nf4", *WRONG[case])
    assert word in cli.done("inspect", tmp_path / "made").out


NESTED_WRONG = {
    "no distances": (lambda tensors: tensors.pop(f"{LAYER}.nested_absmax"), "it has no `"),
    "too few distances": (lambda tensors: tensors.update({f"{LAYER}.nested_absmax": np.ones(3, np.float32)}), "nested_absmax` is F32 [3]"),
    "scales that are none": (lambda tensors: tensors.update({f"{LAYER}.absmax": np.ones(2048, np.float32)}), "absmax` is F32 [2048]: expected U8"),
    "another codebook": (lambda tensors: tensors.update({f"{LAYER}.nested_quant_map": np.arange(256, dtype=np.float32)}), "is not a codebook of 256"),
    "a codebook of another type": (lambda tensors: tensors.update({f"{LAYER}.nested_quant_map": np.ones(512, np.float16)}), "is not a codebook"),
    "another type of scales": (said(nested_dtype="float16"), "`nested_dtype` `float16`: expected `float32`"),
    "no number": (said(nested_offset="much"), "is no state"),
    "too large a number": (said(nested_offset=1e300), "a number of f32"),
}


@pytest.mark.parametrize("case", NESTED_WRONG)
def test_scales_of_scales_that_are_none_are_refused_by_name(case, tmp_path):
    refuse_spoiled(tmp_path, "nf4;double_quant=true", *NESTED_WRONG[case])


def test_a_files_own_codebook_of_scales_counts(tmp_path):
    """torch rounds some of it otherwise on a CPU without FMA, and so it is in the files of who has one."""
    folder = write_model(tmp_path / "model", shards=1)
    cli.quantize(folder, tmp_path / "made", "-s", "nf4;double_quant=true")
    def change(tensors):
        tensors[f"{LAYER}.nested_quant_map"] = np.nextafter(tensors[f"{LAYER}.nested_quant_map"], np.float32(0))
    before = all_tensors(tmp_path / "made")
    spoiled(tmp_path / "made", change)
    cli.done("dequantize", tmp_path / "made", tmp_path / "back", "--dtype", "f32")
    values = np.nextafter(before[f"{LAYER}.nested_quant_map"], np.float32(0))
    nested, state = before[f"{LAYER}.nested_absmax"], json.loads(before[BOOK_STATE].tobytes())
    codes = before[f"{LAYER}.absmax"]
    scales = values[codes] * nested.repeat(256)[: codes.size] + np.float32(state["nested_offset"])
    packed = before[LAYER].reshape(-1)
    decoded = json_book("nf4")[np.stack([packed >> 4, packed & 15], 1)].reshape(-1, 64) * scales[:, None]
    np.testing.assert_array_equal(all_tensors(tmp_path / "back")[LAYER].reshape(-1), decoded.reshape(-1))


def test_a_model_may_be_doubly_quantized_in_part(model, tmp_path):
    recipe = {"rules": [{"targets": ["*q_proj*"], "scheme": "nf4"}, {"targets": ["Linear"], "scheme": "nf4;double_quant=true"}], "ignore": ["@standard"]}
    for name, rules in {"one": recipe["rules"], "other": [{**recipe["rules"][0], "scheme": "nf4;double_quant=true"}, {**recipe["rules"][1], "scheme": "nf4"}]}.items():
        (tmp_path / "recipe.json").write_text(json.dumps(recipe | {"rules": rules}))
        cli.quantize(model, tmp_path / name, "--recipe", tmp_path / "recipe.json")
        assert json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["bnb_4bit_use_double_quant"] is True


ROWS_WRONG = {
    "columns first": (lambda tensors: tensors.update({f"{MODULE}.weight_format": np.array(1, np.uint8)}), "row by row"),
    "too few scales": (lambda tensors: tensors.update({f"{MODULE}.SCB": np.ones(3, np.float32)}), "one for each row"),
    "scales of another type": (lambda tensors: tensors.update({f"{MODULE}.SCB": np.ones(512, np.float16)}), "expected F32"),
    "codes of another type": (lambda tensors: tensors.update({LAYER: np.ones((512, 256), np.uint8)}), "expected I8"),
}


@pytest.mark.parametrize("case", ROWS_WRONG)
def test_rows_that_are_none_are_refused_by_name(case, tmp_path):
    refuse_spoiled(tmp_path, "int8_rowwise", *ROWS_WRONG[case])


def test_what_is_said_to_be_of_bitsandbytes_and_lies_otherwise_is_refused(tmp_path):
    folder = write_model(tmp_path / "model", shards=1)
    cli.quantize(folder, tmp_path / "made", "-s", "MXFP4A16")
    file = cli.read(tmp_path / "made/model.safetensors")
    metadata = {key: text.replace("MXFP4A16", "nf4/g32") for key, text in file.metadata.items()}
    assert metadata != file.metadata
    cli.write(tmp_path / "made/model.safetensors", file.tensors, metadata)
    refused = cli.run("dequantize", tmp_path / "made", tmp_path / "out")
    assert refused.code and "said to be `nf4/g32`" in refused.err, refused.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_of_any_rank_and_magnitude_come_back(scheme, tmp_path):
    rng = np.random.default_rng(3)
    layers = {
        "conv.weight": rng.standard_normal((4, 8, 4, 4)), "experts.weight": rng.standard_normal((2, 4, 128)),
        "large.weight": rng.standard_normal((4, 128)) * 1e30, "small.weight": rng.standard_normal((4, 128)) * 1e-30,
    }
    layers = {name: array.astype(np.float32) for name, array in layers.items()}
    cli.write(tmp_path / "in.safetensors", layers)
    cli.quantize(tmp_path / "in.safetensors", tmp_path / "made.safetensors", "-s", scheme, "--ignore", "nothing")
    cli.done("dequantize", tmp_path / "made.safetensors", tmp_path / "back.safetensors")
    back = cli.read(tmp_path / "back.safetensors").tensors
    for name, array in layers.items():
        assert back[name].dtype == np.float32 and back[name].shape == array.shape
        assert np.abs(back[name] - array).max() < 0.2 * np.abs(array).max(), name
    measured = cli.done("measure", tmp_path / "made.safetensors", tmp_path / "in.safetensors", "--json").json["layers"]
    assert all(layer["metrics"]["sqnr_db"] > 10 for layer in measured)


def all_tensors(folder) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in cli.read(file).tensors.items()}
