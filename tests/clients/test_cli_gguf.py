"""GGUF files on the command line: what is read, what is refused with a sentence, and what becomes of it. Their bytes beside llama.cpp's: tests/golden/test_gguf_files.py."""

import json
import struct

import numpy as np
import pytest

from golden import ggufs
from golden.ggufs import Llama, text
from harness import cli

SMALL = Llama(layers=1, hidden=64, inter=96, vocab=260)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return SMALL.write(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_inspect_shows_tensors_and_what_the_file_says(source):
    told = cli.done("inspect", source, "--json").json
    assert [(line["name"], line["shape"], line["dtype"]) for line in told["tensors"]] == [
        (name, list(array.shape), "F32" if array.ndim == 1 else "F16") for name, array in SMALL.tensors().items()]
    assert told["metadata"]["llama.block_count"] == "1" and told["metadata"]["tokenizer.ggml.tokens"] == "[260 values]"
    assert told["metadata"]["llama.attention.layer_norm_rms_epsilon"] == "0.00001" and told["schemes"] == {}


def test_inspect_shows_blocks_by_their_type(source, tmp_path):
    cli.quantize(source, tmp_path / "made.gguf", "-s", "Q8_0")
    told = cli.done("inspect", tmp_path / "made.gguf", "--json").json
    matrices = {name.removesuffix(".weight") for name, array in SMALL.tensors().items() if array.ndim > 1}
    assert told["schemes"] == dict.fromkeys(matrices, "Q8_0")
    assert {line["dtype"] for line in told["tensors"]} == {"Q8_0", "F32"}


def test_values_are_those_that_measure_says(source, tmp_path):
    """Decoded to safetensors they are read without our code."""
    cli.quantize(source, tmp_path / "made.gguf", "-s", "Q8_0")
    cli.done("dequantize", tmp_path / "made.gguf", tmp_path / "dense.safetensors")
    decoded = cli.read(tmp_path / "dense.safetensors").tensors
    told = cli.done("measure", source, tmp_path / "made.gguf", "--json").json
    report = json.loads((tmp_path / "made.gguf.report.json").read_bytes())
    for layer in told["layers"]:
        weights, values = SMALL.tensors()[layer["name"]].astype(np.float64), decoded[layer["name"]].astype(np.float64)
        error = ((weights - values) ** 2).mean()
        assert layer["metrics"]["mse"] == pytest.approx(error, rel=1e-6), layer["name"]
    quantized = {layer["name"]: layer["metrics"]["sqnr_db"] for layer in report["layers"] if layer["status"] == "quantized"}
    assert quantized == {layer["name"]: pytest.approx(layer["metrics"]["sqnr_db"], abs=1e-5) for layer in told["layers"]
                         if layer["name"] in quantized}


def test_a_file_becomes_safetensors_in_other_schemes(source, tmp_path):
    cli.quantize(source, tmp_path / "made.gguf", "-s", "Q4_0")
    cli.quantize(tmp_path / "made.gguf", tmp_path / "made.safetensors", "-s", "int8")
    made = cli.read(tmp_path / "made.safetensors")
    assert made.tensors["blk.0.attn_q.weight"].dtype == np.int8
    assert set(made.metadata) == {"format", "quarrel.schemes"}


def test_a_recipe_says_the_type_of_each_tensor(source, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"targets": ["*attn_v*"], "scheme": "Q8_0"}, {"targets": ["blk.*"], "scheme": "IQ4_NL"}]}))
    cli.quantize(source, tmp_path / "made.gguf", "--recipe", recipe)
    told = cli.done("inspect", tmp_path / "made.gguf", "--json").json
    types = {line["name"]: line["dtype"] for line in told["tensors"]}
    assert types["blk.0.attn_v.weight"] == "Q8_0" and types["blk.0.ffn_down.weight"] == "IQ4_NL"
    assert types["token_embd.weight"] == "F16" and types["blk.0.attn_norm.weight"] == "F32"
    assert told["metadata"]["general.file_type"] == "25"


def test_a_vector_that_a_rule_names_is_refused(source, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"targets": ["blk.0.attn_norm.weight"], "scheme": "Q8_0"}]}))
    for asked in (["quantize", source, tmp_path / "made.gguf"], ["estimate", "--gguf", source]):
        cli.check_refusal(cli.run(*asked, "--recipe", recipe), 3, "[rank_unsupported] layer `blk.0.attn_norm.weight`", "[64]")
    assert [left.name for left in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("ending", ["gguf", "arrow", "parquet"])
def test_dequantize_writes_safetensors_under_no_other_name(ending, source, tmp_path):
    cli.quantize(source, tmp_path / "made.gguf", "-s", "Q8_0")
    ended = cli.run("dequantize", tmp_path / "made.gguf", tmp_path / f"dense.{ending}")
    cli.check_refusal(ended, 2, "[option_invalid]", f"dense.{ending}", "`dequantize` writes safetensors")
    assert not (tmp_path / f"dense.{ending}").exists()


def test_sizes_are_those_of_the_files_tensors(source, tmp_path):
    """Also where their numbers get another type."""
    before = cli.done("inspect", source, "--json").json["bytes"]
    told = cli.done("estimate", source, "--gguf", "-s", "F32", "--json").json
    cli.quantize(source, tmp_path / "made.gguf", "-s", "F32")
    totals = json.loads((tmp_path / "made.gguf.report.json").read_bytes())["totals"]
    assert told["source_bytes"] == totals["source_bytes"] == before < told["destination_bytes"][0]


def test_a_mix_is_of_a_whole_file(source, tmp_path):
    cli.write(tmp_path / "dense.safetensors", {"a.weight": np.ones((4, 256), np.float32)})
    for asked in (["quantize", tmp_path / "dense.safetensors", tmp_path / "made.safetensors"], ["estimate", tmp_path / "dense.safetensors"]):
        cli.check_refusal(cli.run(*asked, "-s", "Q4_K_M"), 2, "[scheme_unknown] scheme `Q4_K_M` is of a whole GGUF file", "`.gguf`", "`--gguf`")
    assert "Q4_K_M" in cli.done("schemes").out
    # A GGUF file becomes another one.
    cli.quantize(source, tmp_path / "made.gguf", "-s", "Q4_K_M")
    told = cli.done("estimate", source, "-s", "Q4_K_M", "--json").json
    assert told["destination_bytes"] == [cli.done("inspect", tmp_path / "made.gguf", "--json").json["bytes"]] * 2


def test_estimate_foretells_the_file(source, tmp_path):
    told = cli.done("estimate", source, "--gguf", "-s", "Q4_K_M", "--json").json
    cli.quantize(source, tmp_path / "made.gguf", "-s", "Q4_K_M")
    made = cli.done("inspect", tmp_path / "made.gguf", "--json").json
    assert told["destination_bytes"] == [made["bytes"]] * 2
    schemes = {layer["name"].removesuffix(".weight"): layer["schemes"] for layer in told["layers"] if layer["schemes"]}
    assert schemes == {name: [scheme] for name, scheme in made["schemes"].items()}


@pytest.mark.parametrize("arguments, says", [
    (["-s", "W4A16"], "[scheme_unknown] scheme `W4A16` is none of a whole GGUF file: expected F32, F16"),
    (["-s", "Q4_K_M", "--group-size", "32"], "`group_size` has no effect on `Q4_K_M` here"),
    (["-s", "Q4_K_M", "--ignore", "output"], "`--ignore` and `--no-standard` have no effect"),
    (["--profile", "local"], "scheme `W4A16` is of no type of GGUF"),
])
def test_what_has_no_meaning_for_gguf_is_refused(arguments, says, source, tmp_path):
    ended = cli.run("quantize", source, tmp_path / "made.gguf", *arguments)
    cli.check_refusal(ended, 2, says)
    assert not list(tmp_path.iterdir())


def head(version=3, tensors=1, keys=(), infos=None) -> bytes:
    infos = [info()] if infos is None else infos
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(keys)) + b"".join(keys) + b"".join(infos)


def info(name="a.weight", shape=(32, 2), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)


def key(name: str, value) -> bytes:
    return text(name) + ggufs.packed(value)


@pytest.mark.parametrize("content, says", [
    (head(version=1), "its version is 1: that is not read, expected 2 or 3"),
    (head(version=3 << 24), "it is of a machine of the other byte order"),
    (b"GGUF" + bytes(3), "its 7 bytes do not begin with `GGUF`"),
    (head()[:40], "it ends, at 40 bytes, within its head"),
    (head(tensors=2**63), "it claims 9223372036854775808 tensors: expected at most 65536"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "keys: expected at most 65536"),
    (head(keys=[text("k" * 65536) + struct.pack("<IB", 7, 1)]), "a key has 65536 bytes: expected at most 65535"),
    (head(keys=[text("k" * 65535) + struct.pack("<I", 13)]), "has a value of kind 13"),
    (head(keys=[text("k") + struct.pack("<IIQ", 9, 8, 2**63)]), "within its head"),
    (head(keys=[text("k") + struct.pack("<IIQ", 9, 4, 2**62)]), "within its head"),
    (head(keys=[text("k") + struct.pack("<IIQ", 9, 9, 1)]), "key `k` is of values of kind 9"),
    (head(keys=[text("k") + struct.pack("<I", 13)]), "key `k` has a value of kind 13"),
    (head(keys=[key("k", 1), key("k", 2)]), "key `k` is there twice"),
    (head(keys=[key("general.alignment", 24)]), "its `general.alignment` is no power of two"),
    (head(keys=[key("general.alignment", "32")]), "its `general.alignment` is no power of two"),
    (head(keys=[struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 7, 1)]), "a key is no UTF-8"),
    (head(infos=[info("n" * 64)]), "has a name of 64 bytes: at most 63"),
    (head(infos=[info(shape=(1,) * 5)]), "has 5 dimensions: at most 4"),
    (head(infos=[info(kind=4)]), "is of type 4, which this version does not know"),
    (head(infos=[info(shape=(31, 2), kind=8)]), "tensor `a.weight` of Q8_0 cannot have shape [2, 31]"),
    (head(infos=[info(shape=(2**40, 2**40))]), "cannot have shape"),
    (head(infos=[info(offset=32)]), "begins at 32: expected 0"),
    (head(tensors=2, infos=[info(), info()]), "tensor `a.weight` is there twice"),
    (head(tensors=2, infos=[info(), info("b", offset=64)]), "tensor `b` begins at 64: expected 256"),
    (head(), "bytes: its head says"),
], ids=str.split("version byte-order short cut tensors keys key long-key texts numbers lists kind twice alignment alignment-text utf8 name rank type columns shape "
                 "offset tensor-twice gap data"))
def test_a_damaged_file_is_refused_with_a_sentence(content, says, tmp_path):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    for command in (["inspect", path], ["quantize", path, tmp_path / "made.gguf", "-s", "Q8_0"]):
        cli.check_refusal(cli.run(*command), 3, says)
    assert [left.name for left in tmp_path.iterdir()] == ["damaged.gguf"]


def test_types_of_others_are_copied_and_not_decoded(tmp_path):
    """A block of IQ2_XXS, 66 bytes for 256 columns, beside a matrix of f32."""
    blocks, matrix = bytes(range(66)), np.arange(64, dtype=np.float32)
    infos = head(tensors=2, keys=[key("general.architecture", "llama")],
                 infos=[info("a.weight", (256, 1), 16), info("b.weight", (32, 2), 0, 96)])
    path = tmp_path / "other.gguf"
    path.write_bytes(infos + bytes(-len(infos) % 32) + blocks + bytes(30) + matrix.tobytes())
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"targets": ["b.weight"], "scheme": "Q8_0"}]}))
    cli.quantize(path, tmp_path / "made.gguf", "--recipe", recipe)
    assert blocks in (tmp_path / "made.gguf").read_bytes()
    cli.check_refusal(cli.run("dequantize", path, tmp_path / "dense.safetensors"), 3, "IQ2_XXS")


def test_a_type_that_a_tensor_is_not_given_may_be_anybodys(tmp_path):
    """Others are not decoded, and not in the way."""
    infos = head(tensors=2, keys=[key("general.architecture", "llama")], infos=[info("a.weight", (256, 2), 16), info("b.weight", (32, 2), 8, 160)])
    path = tmp_path / "other.gguf"
    path.write_bytes(infos + bytes(-len(infos) % 32) + bytes(132) + bytes(28) + bytes(68) + bytes(28))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"targets": ["b.weight"], "scheme": "Q4_0"}]}))
    cli.quantize(path, tmp_path / "made.gguf", "--recipe", recipe)
    told = cli.done("inspect", tmp_path / "made.gguf", "--json").json
    assert {line["name"]: line["dtype"] for line in told["tensors"]} == {"a.weight": "IQ2_XXS", "b.weight": "Q4_0"}


def test_one_of_several_files_is_no_model(tmp_path):
    ggufs.write(tmp_path / "m-00001-of-00002.gguf", SMALL.keys() | {"split.no": 0, "split.count": 2}, SMALL.tensors())
    for command in (["quantize", "-s", "Q8_0", tmp_path / "made.gguf"], ["quantize", "-s", "int8", tmp_path / "made.safetensors"],
                    ["dequantize", tmp_path / "made.safetensors"]):
        ended = cli.run(*command[:-1], tmp_path / "m-00001-of-00002.gguf", command[-1])
        cli.check_refusal(ended, 3, "it is one of 2 files of a model")


@pytest.mark.parametrize("value, says", [(70000.0, "70000 becomes F16, in which it is not finite"), (np.nan, "NaN becomes F16")])
def test_numbers_that_another_type_does_not_hold_are_no_infinities(value, says, tmp_path):
    model = Llama(dtype="f32", layers=1, hidden=64, inter=96, vocab=260)
    tensors = model.tensors()
    tensors["blk.0.ffn_up.weight"][2, 1] = value
    ggufs.write(tmp_path / "source.gguf", model.keys(), tensors)
    ended = cli.run("quantize", tmp_path / "source.gguf", tmp_path / "made.gguf", "-s", "F16")
    cli.check_refusal(ended, 3, "tensor `blk.0.ffn_up.weight`", says)
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_a_report_says_what_became_of_numbers(source, tmp_path):
    cli.quantize(source, tmp_path / "made.gguf", "-s", "F32")
    report = json.loads((tmp_path / "made.gguf.report.json").read_bytes())
    assert report["command"]["quantize"]["scheme"] == "F32" and report["totals"]["quantized"] == 0
    said = {layer["name"]: layer["message"] for layer in report["layers"]}
    assert said["output.weight"] == "tensor `output.weight`: its numbers of F16 become F32, rounded and not measured"


def test_a_file_is_aligned_as_it_says(tmp_path):
    """llama.cpp's own tool keeps the key and does otherwise: nobody reads that."""
    keys = SMALL.keys() | {"general.alignment": 64}
    tensors = {"odd.bias": np.ones(3, np.float32), "even.weight": np.ones((4, 32), np.float32)}
    infos = head(tensors=2, keys=[key(*pair) for pair in keys.items()], infos=[info("odd.bias", (3,)), info("even.weight", (32, 4), 0, 64)])
    data = tensors["odd.bias"].tobytes() + bytes(52) + tensors["even.weight"].tobytes()
    (tmp_path / "source.gguf").write_bytes(infos + bytes(-len(infos) % 64) + data)
    cli.quantize(tmp_path / "source.gguf", tmp_path / "made.gguf", "-s", "Q8_0")
    made = ggufs.read(tmp_path / "made.gguf")
    assert made.tensors["odd.bias"][2] == tensors["odd.bias"].tobytes() and "general.alignment" not in made.keys


def test_integers_stay_what_they_are(tmp_path):
    infos = head(keys=[key("general.architecture", "llama")], infos=[info("a.weight", (2, 2), 26)])
    (tmp_path / "source.gguf").write_bytes(infos + bytes(-len(infos) % 32) + bytes(range(16)) + bytes(16))
    for scheme in ("F32", "Q8_0"):
        cli.quantize(tmp_path / "source.gguf", tmp_path / f"{scheme}.gguf", "-s", scheme)
        told = cli.done("inspect", tmp_path / f"{scheme}.gguf", "--json").json
        assert told["tensors"][0]["dtype"] == "I32"


def test_numbers_that_are_none_leave_no_file(tmp_path):
    tensors = SMALL.tensors()
    tensors["blk.0.attn_q.weight"][3, 5] = np.nan
    ggufs.write(tmp_path / "bad.gguf", SMALL.keys(), tensors)
    ended = cli.run("quantize", tmp_path / "bad.gguf", tmp_path / "made.gguf", "-s", "Q4_0")
    cli.check_refusal(ended, 3, "blk.0.attn_q.weight", "197")
    assert not (tmp_path / "made.gguf").exists()
    assert cli.run("quantize", tmp_path / "bad.gguf", tmp_path / "made.gguf", "-s", "Q4_0", "--on-error", "continue").code == 6
    told = cli.done("inspect", tmp_path / "made.gguf", "--json").json
    types = {line["name"]: line["dtype"] for line in told["tensors"]}
    assert types["blk.0.attn_q.weight"] == "F16" and types["blk.0.attn_k.weight"] == "Q4_0"
