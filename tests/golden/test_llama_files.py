"""A model of the Llama family becomes the GGUF file that llama.cpp's own converter makes of it. `llama_files.py` says how the digests were made."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from golden import ggufs, llamas
from golden.llama_files import told
from harness import cli

DOCUMENT = json.loads((Path(__file__).resolve().parent / "files" / "llama_files.json").read_text())["models"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamas")
    return {name: model.write(folder / name) for name, model in llamas.MODELS.items()}


@pytest.mark.parametrize("name", llamas.MODELS)
def test_a_model_becomes_what_the_converter_makes(name, folders, tmp_path):
    cli.quantize(folders[name], tmp_path / "made.gguf", "-s", llamas.MODELS[name].dtype.upper())
    made = told(ggufs.read(tmp_path / "made.gguf"))
    assert made["tensors"] == DOCUMENT[name]["tensors"]
    assert made["keys"] == DOCUMENT[name]["keys"]


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q8_0", "IQ4_NL"])
@pytest.mark.parametrize("name", llamas.MODELS)
def test_in_one_step_it_becomes_what_it_becomes_in_two(name, mix, folders, tmp_path):
    """The second being llama-quantize's, by test_gguf_files.py."""
    cli.quantize(folders[name], tmp_path / "dense.gguf", "-s", llamas.MODELS[name].dtype.upper())
    cli.quantize(tmp_path / "dense.gguf", tmp_path / "two.gguf", "-s", mix)
    cli.quantize(folders[name], tmp_path / "one.gguf", "-s", mix)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


@pytest.mark.parametrize("name", llamas.MODELS)
def test_metadata_may_come_of_a_file_of_the_same_model(name, folders, tmp_path):
    """Without a tokenizer, and of one file even without a configuration."""
    cli.quantize(folders[name], tmp_path / "dense.gguf", "-s", "F16")
    cli.quantize(tmp_path / "dense.gguf", tmp_path / "expected.gguf", "-s", "F32")
    bare = shutil.copytree(folders[name], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    if llamas.MODELS[name].shards == 1 and name != "llama 3":
        bare = bare / "model.safetensors"
    cli.quantize(bare, tmp_path / "made.gguf", "-s", "F16", "--metadata", tmp_path / "expected.gguf")
    made, expected = ggufs.read(tmp_path / "made.gguf"), ggufs.read(tmp_path / "dense.gguf")
    assert made == expected and list(made.keys) == list(expected.keys)


def test_a_quantized_model_becomes_what_it_decodes_to(folders, tmp_path):
    cli.quantize(folders["llama"], tmp_path / "quantized", "-s", "W8A16")
    cli.done("dequantize", tmp_path / "quantized", tmp_path / "dense")
    cli.quantize(tmp_path / "quantized", tmp_path / "made.gguf", "-s", "Q6_K")
    cli.quantize(tmp_path / "dense", tmp_path / "expected.gguf", "-s", "Q6_K")
    assert ggufs.read(tmp_path / "made.gguf").tensors == ggufs.read(tmp_path / "expected.gguf").tensors


def test_scores_are_made_of_merges_where_they_are_gone(tmp_path):
    """`tokenizer.json` alone: what is merged first is preferred, so llama.cpp cuts as transformers does."""
    llamas.Family(layers=1, tokenizer="fallback").write(tmp_path / "model")
    cli.quantize(tmp_path / "model", tmp_path / "made.gguf", "-s", "F16")
    keys = ggufs.read(tmp_path / "made.gguf").keys
    tokens, scores, kinds = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert keys["tokenizer.ggml.model"] == "llama" and len(tokens) == len(scores) == len(kinds) == 320
    assert [scores[tokens.index(text)] for text in ("▁t", "he", "▁the", "▁")] == [0, -1, -2, -3]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[-1] == 5 and tokens[-1] == "[PAD319]"


def spoiled(folder: Path, spoil) -> Path:
    config = json.loads((folder / "config.json").read_text())
    spoil(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("spoil, says", [
    (lambda config: config.update(architectures=["Qwen2ForCausalLM"]), "its architecture is `Qwen2ForCausalLM`"),
    (lambda config: config.pop("rms_norm_eps"), "has no number `rms_norm_eps`"),
    (lambda config: config.update(num_attention_heads=3), "is not of 3 heads"),
    (lambda config: config.update(rope_scaling={"rope_type": "longrope", "factor": 2.0}), "its rope scaling is `longrope`"),
    (lambda config: config.pop("vocab_size"), "has no number `vocab_size`"),
    (lambda config: config.update(num_key_value_heads="2"), "has `num_key_value_heads` \"2\": expected a whole number"),
    (lambda config: config.update(num_key_value_heads=2**40), "has `num_key_value_heads` 1099511627776: expected a whole number"),
    (lambda config: config.update(head_dim=1.5), "has `head_dim` 1.5: expected a whole number"),
    (lambda config: config.update(num_hidden_layers=0), "has `num_hidden_layers` 0: expected a whole number from 1"),
    (lambda config: config.update(rope_theta=-1), "has `rope_theta` -1: expected a number above zero"),
    (lambda config: config.update(rope_scaling="linear"), "has `rope_scaling` \"linear\": expected an object"),
    (lambda config: config.update(rope_scaling={"rope_type": "linear", "factor": "2"}), "has `factor` \"2\""),
    (lambda config: config.update(rope_scaling={"rope_type": "llama3", "low_freq_factor": 4}), "expected rising ones"),
    (lambda config: config.update(num_hidden_layers=2), "it has no `blk.1.attn_k.weight`"),
    (lambda config: config.update(vocab_size=999), "`token_embd.weight` has shape [320, 256]: its metadata say [999, 256]"),
    (lambda config: config.update(intermediate_size=480), "has shape [512, 256]: its metadata say [480, 256]"),
], ids=str.split("architecture epsilon heads rope vocabulary text large fraction none negative no-object no-number falling layers rows columns"))
def test_what_is_not_known_of_a_model_is_said(spoil, says, tmp_path):
    folder = spoiled(llamas.Family(layers=1).write(tmp_path / "model"), spoil)
    cli.check_refusal(cli.run("quantize", folder, tmp_path / "made.gguf", "-s", "Q8_0"), 3, says)
    assert not (tmp_path / "made.gguf").exists()


def test_a_tensor_that_lacks_or_is_too_many_is_named(tmp_path):
    model = llamas.Family(layers=1)
    tensors = model.tensors()
    for name, spoil, says in [
        ("lacks", lambda: tensors.pop("model.layers.0.mlp.up_proj.weight"), "it has no `blk.0.ffn_up.weight`"),
        ("unknown", lambda: tensors.update({"model.layers.0.mlp.extra.weight": tensors["lm_head.weight"]}), "`model.layers.0.mlp.extra.weight` has no name in GGUF"),
        ("twice", lambda: tensors.update({"norm.weight": tensors["model.norm.weight"]}), "two of its tensors are `output_norm.weight`"),
        ("beyond", lambda: tensors.update({"model.layers.9.input_layernorm.weight": tensors["model.norm.weight"]}), "`blk.9.attn_norm.weight` of shape"),
    ]:
        folder = model.write(tmp_path / name)
        tensors = model.tensors()
        spoil()
        cli.write(folder / "model.safetensors", tensors)
        cli.check_refusal(cli.run("quantize", folder, tmp_path / "made.gguf", "-s", "Q8_0"), 3, says)


def test_templates_and_ends_of_text_are_those_of_the_converter(tmp_path):
    """Several templates have names; a text that ends with another token than `eos_token` makes that the end of a turn."""
    folder = llamas.Family(layers=1, tokenizer="bytes").write(tmp_path / "model")
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said["chat_template"] = [{"name": "default", "template": "one"}, {"name": "tool use", "template": "two"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    single = tokenizer["post_processor"]["processors"][1]["single"]
    single.append({"SpecialToken": {"id": "<|eot_id|>", "type_id": 0}})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    cli.quantize(folder, tmp_path / "made.gguf", "-s", "Q8_0")
    keys = ggufs.read(tmp_path / "made.gguf").keys
    assert keys["tokenizer.chat_template"] == "one" and keys["tokenizer.chat_template.tool_use"] == "two"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"], keys["tokenizer.ggml.add_eos_token"]) == (265, 264, True)


def test_a_tokenizer_that_is_not_known_can_be_given(tmp_path):
    folder = llamas.Family(layers=1, tokenizer="bytes").write(tmp_path / "model")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("{1,3}", "{1,2}"))
    ended = cli.run("quantize", folder, tmp_path / "made.gguf", "-s", "Q8_0")
    cli.check_refusal(ended, 3, "the way its tokenizer.json cuts text before BPE is none of those", "Or give a GGUF file of the model")
    (folder / "tokenizer.json").write_text(text)
    cli.quantize(folder, tmp_path / "known.gguf", "-s", "Q8_0")
    cli.quantize(folder, tmp_path / "made.gguf", "-s", "Q8_0", "--metadata", tmp_path / "known.gguf")
    assert (tmp_path / "made.gguf").read_bytes() == (tmp_path / "known.gguf").read_bytes()


def test_metadata_of_another_model_are_refused(folders, tmp_path):
    cli.quantize(folders["mixtral"], tmp_path / "other.gguf", "-s", "Q8_0")
    asked = ["quantize", folders["llama"], tmp_path / "made.gguf", "-s", "Q8_0", "--metadata"]
    cli.check_refusal(cli.run(*asked, tmp_path / "other.gguf"), 3, "its metadata say")
    cli.check_refusal(cli.run(*asked, folders["llama"] / "model.safetensors"), 3, "it is safetensors")
    asked = ["quantize", folders["llama"], tmp_path / "made", "-s", "W4A16", "--metadata", tmp_path / "other.gguf"]
    cli.check_refusal(cli.run(*asked), 2, "`metadata` has no effect here")


@pytest.mark.parametrize("scheme, kind", [("MXFP4A16", "MXFP4"), ("NVFP4A16", "NVFP4"), ("W8A16/g32", "Q8_0")])
def test_blocks_hold_the_numbers_of_a_quantized_model(scheme, kind, tmp_path):
    """Codes and scales are moved: what they decode to is the same, but for NVFP4's scale of a layer, by which one divides and the other multiplies."""
    model = llamas.Family(dtype="bf16" if kind != "Q8_0" else "f16", tied=True)
    model.write(tmp_path / "model")
    cli.quantize(tmp_path / "model", tmp_path / "quantized", "-s", scheme)
    cli.quantize(tmp_path / "quantized", tmp_path / "made.gguf", "-s", "COPY")
    made = ggufs.read(tmp_path / "made.gguf")
    kinds = {name: tensor[0] for name, tensor in made.tensors.items()}
    assert {kinds[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")} == {kind}
    assert kinds["token_embd.weight"] == model.dtype.upper() and kinds["blk.0.attn_norm.weight"] == "F32"
    assert made.keys["general.file_type"] == {"MXFP4": 38, "NVFP4": 39, "Q8_0": 7}[kind]
    assert [name for name in kinds if name.endswith(".scale")] == [
        f"blk.{layer}.{name}.scale" for layer in range(2) for name in sorted(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))
        if kind == "NVFP4"]
    cli.done("dequantize", tmp_path / "quantized", tmp_path / "dense", "--dtype", "f32")
    cli.quantize(tmp_path / "dense", tmp_path / "expected.gguf", "-s", "F32")
    cli.quantize(tmp_path / "made.gguf", tmp_path / "found.gguf", "-s", "F32")
    expected, found = ggufs.read(tmp_path / "expected.gguf").tensors, ggufs.read(tmp_path / "found.gguf").tensors
    for name, (_, _, data) in expected.items():
        one, other = np.frombuffer(data, np.float32), np.frombuffer(found[name][2], np.float32)
        if scale := found.get(name.replace(".weight", ".scale")):
            # It stays beside the blocks, whatever they become, and llama.cpp multiplies by it.
            other = other * np.frombuffer(scale[2], np.float32)
        np.testing.assert_allclose(other, one, rtol=2**-22 if kind == "NVFP4" else 0, atol=0, err_msg=name)
    # With metadata of the dense model's file, and the other way.
    cli.quantize(tmp_path / "quantized", tmp_path / "again.gguf", "-s", "COPY", "--metadata", tmp_path / "expected.gguf")
    assert ggufs.read(tmp_path / "again.gguf").tensors == made.tensors
    cli.quantize(tmp_path / "dense", tmp_path / "other.gguf", "-s", "F32", "--metadata", tmp_path / "made.gguf")
    assert ggufs.read(tmp_path / "other.gguf").tensors == expected


@pytest.mark.parametrize("scheme", ["W4A16", "int8", "FP8_DYNAMIC"])
def test_numbers_that_no_block_holds_are_no_copy(scheme, tmp_path):
    llamas.Family(layers=1).write(tmp_path / "model")
    cli.quantize(tmp_path / "model", tmp_path / "quantized", "-s", scheme)
    ended = cli.run("quantize", tmp_path / "quantized", tmp_path / "made.gguf", "-s", "COPY")
    cli.check_refusal(ended, 3, "no block of ggml holds the numbers of `", "model.layers.0.")


@pytest.mark.parametrize("spoil, says", [
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight_global_scale": np.array([np.inf], np.float32)}), "its global scale is inf"),
    (lambda t: t["model.layers.0.self_attn.q_proj.weight_scale"].view(np.uint8).__setitem__((0, 0), 0xb8), "is no finite number above zero"),
], ids=["global", "sign"])
def test_scales_that_blocks_do_not_hold_are_refused(spoil, says, tmp_path):
    llamas.Family(layers=1, dtype="bf16").write(tmp_path / "model")
    cli.quantize(tmp_path / "model", tmp_path / "quantized", "-s", "NVFP4A16")
    file = cli.read(tmp_path / "quantized/model.safetensors")
    tensors = {name: array.copy() for name, array in file.tensors.items()}
    spoil(tensors)
    cli.write(tmp_path / "quantized/model.safetensors", tensors, file.metadata)
    ended = cli.run("quantize", tmp_path / "quantized", tmp_path / "made.gguf", "-s", "COPY")
    cli.check_refusal(ended, 3, "model.layers.0.self_attn.q_proj", says)
    assert not (tmp_path / "made.gguf").exists()


def test_a_scale_beside_blocks_multiplies_what_they_decode_to(folders, tmp_path):
    cli.quantize(folders["llama"], tmp_path / "made.gguf", "-s", "F16")
    made = ggufs.read(tmp_path / "made.gguf")
    tensors = {name: np.frombuffer(data, {"F16": np.float16, "F32": np.float32}[kind]).reshape(shape) for name, (kind, shape, data) in made.tensors.items()}
    ggufs.write(tmp_path / "scaled.gguf", made.keys, tensors | {"blk.0.attn_v.scale": np.array([2], np.float32)})
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"rules": [{"targets": ["blk.0.attn_v.weight"], "scheme": "Q8_0"}]}))
    cli.quantize(tmp_path / "scaled.gguf", tmp_path / "blocks.gguf", "--recipe", recipe)
    cli.quantize(tmp_path / "blocks.gguf", tmp_path / "made.safetensors", "-s", "int8", "--ignore", "blk.0.attn_v.weight")
    decoded = cli.read(tmp_path / "made.safetensors").tensors
    weights = tensors["blk.0.attn_v.weight"].astype(np.float32)
    assert "blk.0.attn_v.scale" not in decoded
    np.testing.assert_allclose(decoded["blk.0.attn_v.weight"], 2 * weights, atol=2 * np.abs(weights).max() / 127)
    cli.check_refusal(cli.run("quantize", tmp_path / "scaled.gguf", tmp_path / "back.safetensors", "-s", "COPY"), 3, "blk.0.attn_v.scale")


@pytest.mark.parametrize("heads", [2**63, 2**64 - 1, 0])
def test_a_number_of_heads_that_is_none_is_refused(heads, folders, tmp_path):
    cli.quantize(folders["llama"], tmp_path / "made.gguf", "-s", "Q8_0")
    data = (tmp_path / "made.gguf").read_bytes()
    key = ggufs.text("llama.attention.head_count")
    at = data.index(key + ggufs.packed(4)) + len(key)
    (tmp_path / "made.gguf").write_bytes(data[:at] + struct.pack("<IQ", 10, heads) + data[at + 8 :])
    for command in (["quantize", tmp_path / "made.gguf", tmp_path / "back.safetensors", "-s", "COPY"],
                    ["quantize", folders["llama"], tmp_path / "other.gguf", "-s", "Q8_0", "--metadata", tmp_path / "made.gguf"]):
        cli.check_refusal(cli.run(*command), 3)


def test_a_copy_of_a_file_has_its_tensors(folders, tmp_path):
    cli.quantize(folders["llama"], tmp_path / "made.gguf", "-s", "Q4_K_M")
    cli.quantize(tmp_path / "made.gguf", tmp_path / "copy.gguf", "-s", "COPY")
    assert (tmp_path / "copy.gguf").read_bytes() == (tmp_path / "made.gguf").read_bytes()


@pytest.mark.parametrize("scheme", ["MXFP4A16", "NVFP4A16", "W8A16/g32"])
def test_a_copy_comes_back_as_it_was(scheme, tmp_path):
    """To GGUF and back: every tensor of the quantized model, but norms and biases, which are f32 there."""
    model = llamas.Family(dtype="bf16" if scheme != "W8A16/g32" else "f16", bias=True)
    model.write(tmp_path / "model")
    cli.quantize(tmp_path / "model", tmp_path / "quantized", "-s", scheme)
    cli.quantize(tmp_path / "quantized", tmp_path / "there.gguf", "-s", "COPY")
    cli.quantize(tmp_path / "there.gguf", tmp_path / "back.safetensors", "-s", "COPY")
    expected, found = (cli.read(path).tensors for path in (tmp_path / "quantized/model.safetensors", tmp_path / "back.safetensors"))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if array.ndim == 1 and name.endswith((".bias", "norm.weight")):
            array = array.astype(np.float32)
        if name.endswith("weight_global_scale"):
            # Over one, and over one again.
            np.testing.assert_allclose(found[name], array, rtol=2**-23)
            continue
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
    schemes = cli.done("inspect", tmp_path / "back.safetensors", "--json").json["schemes"]
    assert len(schemes) == 14 and schemes == cli.done("inspect", tmp_path / "quantized", "--json").json["schemes"]


@pytest.mark.parametrize("scheme, says", [("Q4_K_M", "does not hold blocks of Q6_K"), ("NVFP4", "it has no scale of its own"), ("F16", "has no quantized layers")])
def test_blocks_that_the_layout_does_not_hold_do_not_come_back(scheme, says, folders, tmp_path):
    how = ["-s", scheme]
    if scheme == "NVFP4":
        (tmp_path / "recipe.json").write_text(json.dumps({"rules": [{"targets": ["blk.0.attn_q.weight"], "scheme": "NVFP4"}]}))
        how = ["--recipe", tmp_path / "recipe.json"]
    cli.quantize(folders["llama"], tmp_path / "made.gguf", *how)
    cli.check_refusal(cli.run("quantize", tmp_path / "made.gguf", tmp_path / "back.safetensors", "-s", "COPY"), 3, says)
    assert not (tmp_path / "back.safetensors").exists()
