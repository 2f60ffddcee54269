"""transformers loads what `quarrel quantize FOLDER FOLDER` writes, and computes with it what the dense model of its dequantized weights
computes: logits equal, bit for bit, in bf16. `make test-interop`.

The dense model is loaded by `from_pretrained` too: `.to(bfloat16)` would cast what is computed in f32.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from harness.server import binary

INDEX = "model.safetensors.index.json"
TOKENS = torch.arange(48).reshape(2, 24) * 7 % 512
MIXED = {
    "rules": [{"targets": ["re:.*self_attn"], "scheme": "W4A16"}, {"targets": ["re:.*mlp"], "scheme": "FP8_DYNAMIC"},
              {"targets": ["lm_head"], "scheme": "W8A16"}],
    "ignore": ["re:.*embed"],
}
SCHEMES = ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16", "int3/channel"]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def dense(request, tmp_path_factory):
    """A small Llama in bf16, in several files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param, dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("dense") / "model"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    assert (folder / INDEX).is_file()
    return folder


@pytest.mark.parametrize("scheme", [*SCHEMES, "mixed"])
def test_logits_are_those_of_the_dequantized_dense_model(scheme, dense, tmp_path):
    quantized = tmp_path / "quantized"
    how = ["--scheme", scheme]
    if scheme == "mixed":
        if json.loads((dense / "config.json").read_text())["tie_word_embeddings"]:
            pytest.skip("its lm_head has no weights of its own")
        (tmp_path / "recipe.json").write_text(json.dumps(MIXED))
        how = ["--recipe", tmp_path / "recipe.json"]
    run("quantize", dense, quantized, *how)
    assert any("weight_scale" in name for name in tensors(quantized)), "nothing was quantized"
    run("dequantize", quantized, tmp_path / "expected", "--dtype", "bf16")
    expected = logits(tmp_path / "expected")
    assert tensors(tmp_path / "expected").keys() == tensors(dense).keys()
    assert torch.equal(logits(quantized), expected)
    assert not torch.equal(expected, logits(dense))


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    for module in model.modules():
        # Of activations, which the dense model has none of.
        if getattr(getattr(module, "quantization_scheme", None), "input_activations", None):
            module.quantization_enabled = False
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def tensors(folder: Path) -> dict:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def run(*args):
    subprocess.run([binary(), *args, "--quiet"], check=True)
