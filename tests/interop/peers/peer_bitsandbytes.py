"""transformers loads what `quarrel quantize` writes in bitsandbytes' formats, as it loads what it quantizes and saves itself: the same tensors, the
same configuration, the same logits. `make test-interop`.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from harness.server import binary

TOKENS = torch.arange(48).reshape(2, 24) * 7 % 512


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def dense(request, tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, dtype=request.param,
    )
    folder = tmp_path_factory.mktemp("dense") / "model"
    LlamaForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(folder, max_shard_size="1MB")
    return folder


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_model_of_four_bits_is_the_one_that_transformers_saves(scheme, dense, tmp_path):
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme, "bnb_4bit_compute_dtype": getattr(torch, dense_type(dense))}
    compare(scheme, options, Linear4bit, dense, tmp_path)


def test_a_model_of_int8_rows_is_the_one_that_transformers_saves(dense, tmp_path):
    """Its weights are f16 before they are int8, whatever they were."""
    if dense_type(dense) != "float16":
        pytest.skip("other types are rounded to f16 by transformers, and not here")
    compare("int8_rowwise", {"load_in_8bit": True}, Linear8bitLt, dense, tmp_path)


def compare(scheme: str, options: dict, kind: type, dense: Path, tmp_path: Path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run("quantize", dense, ours, "--scheme", scheme)
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(theirs)
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype and torch.equal(found[name], values), name
    assert configuration(ours) == configuration(theirs) | {"llm_int8_skip_modules": configuration(ours)["llm_int8_skip_modules"]}
    loaded = load(ours)
    converted = [name for name, module in loaded.named_modules() if isinstance(module, kind)]
    assert len(converted) == 14 and "lm_head" not in converted
    assert torch.equal(logits(loaded), logits(load(theirs)))
    assert not torch.equal(logits(loaded), logits(load(dense)))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_model_of_double_quantization_is_one_that_transformers_saves_but_for_the_mean(scheme, dense, tmp_path):
    """Its mean is torch's, and its bytes are looked up by 16 bits on a CPU: so scales may be neighbours. Byte for byte: tests/golden/test_bnb.py."""
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": scheme, "bnb_4bit_compute_dtype": getattr(torch, dense_type(dense)), "bnb_4bit_use_double_quant": True}
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run("quantize", dense, ours, "--scheme", f"{scheme};double_quant=true")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto", quantization_config=BitsAndBytesConfig(**options))
    model.save_pretrained(theirs)
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        if "quant_state" in name:
            mine, his = (json.loads(bytes(state.tolist())) for state in (found[name], values))
            assert mine.pop("nested_offset") == pytest.approx(his.pop("nested_offset"), rel=1e-6) and mine == his
            continue
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        if name.endswith(".nested_absmax"):
            torch.testing.assert_close(found[name], values, rtol=1e-5, atol=0)
        elif name.endswith(".absmax"):
            away = (found[name].int() - values.int()).abs()
            assert away.max() <= 1 and (away > 0).float().mean() < 0.02, name
        else:
            assert torch.equal(found[name], values), name
    assert configuration(ours) == configuration(theirs) | {"llm_int8_skip_modules": configuration(ours)["llm_int8_skip_modules"]}
    loaded = load(ours)
    assert len([name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)]) == 14
    mine, his = logits(loaded).float(), logits(load(theirs)).float()
    assert (mine - his).norm() / his.norm() < 1e-2
    run("dequantize", theirs, tmp_path / "read")
    run("dequantize", ours, tmp_path / "made")
    read, made = tensors(tmp_path / "read"), tensors(tmp_path / "made")
    for name, values in read.items():
        assert (values.float() - made[name].float()).norm() <= 1e-2 * values.float().norm(), name


@pytest.mark.parametrize("scheme", ["nf4/g32", "nf4/g256", "fp4/g128", "nf4/g128;double_quant=true"])
def test_logits_of_other_blocks_are_those_of_the_dequantized_model(scheme, dense, tmp_path):
    """transformers makes blocks of 64 alone, and reads all."""
    run("quantize", dense, tmp_path / "ours", "--scheme", scheme)
    run("dequantize", tmp_path / "ours", tmp_path / "expected", "--dtype", {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dense_type(dense)])
    found, expected = logits(load(tmp_path / "ours")).float(), logits(load(tmp_path / "expected")).float()
    # Its CPU kernel multiplies in another order, or in bf16.
    assert (found - expected).norm() / expected.norm() < 2e-2


def dense_type(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["dtype"]


def configuration(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def run(*args):
    subprocess.run([binary(), *args, "--quiet"], check=True)
