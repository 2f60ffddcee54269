"""Models of GPTQ and AWQ that `quarrel quantize --scheme COPY` has put in the layout of compressed-tensors: its own converter makes the same tensors of AWQ, and
transformers computes with them what it computes with the dense model that they stand for. `make test-interop`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2]))

from golden import legacy  # noqa: E402
from harness.server import binary  # noqa: E402

TOKENS = torch.arange(48).reshape(2, 24) * 7 % 320
MODELS = {name: model for name, model in legacy.MODELS.items() if model.bits in (4, 8)}


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.method == "awq"])
def test_a_copy_of_awq_is_what_compressed_tensors_converts(name, tmp_path):
    MODELS[name].write(tmp_path / "model")
    run("quantize", tmp_path / "model", tmp_path / "copy", "--scheme", "COPY")
    expected = AutoAWQConverter(group_size=MODELS[name].group).process(load_file(tmp_path / "model/model.safetensors"))
    found = load_file(tmp_path / "copy/model.safetensors")
    if MODELS[name].symmetric:
        # Whose zero points are all zero, and are left out.
        expected = {tensor: values for tensor, values in expected.items() if not tensor.endswith("weight_zero_point")}
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        assert found[tensor].dtype == values.dtype and torch.equal(found[tensor], values), tensor


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.symmetric])
def test_transformers_computes_with_a_copy_what_it_computes_with_the_dense_model(name, tmp_path):
    MODELS[name].write(tmp_path / "model")
    for file in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "model" / file).unlink()
    run("quantize", tmp_path / "model", tmp_path / "copy", "--scheme", "COPY")
    run("dequantize", tmp_path / "model", tmp_path / "dense", "--dtype", "f16")
    assert torch.equal(logits(tmp_path / "copy"), logits(tmp_path / "dense"))


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(TOKENS).logits


def run(*args):
    subprocess.run([binary(), *args, "--quiet"], check=True)
