"""compressed-tensors reads what `quarrel quantize` writes: its own decompression gives our `quarrel dequantize`, bit for bit.

That the files are what it would write itself is held by tests/golden/test_checkpoints.py. `make test-interop`.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from safetensors.torch import load_file

from harness.server import binary

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
sys.path.append(str(GOLDEN))
import generate  # noqa: E402

SCHEMES = ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "int3/channel", "int2/g32", "int8-asym/channel"]


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_decompression_is_our_dequantization(tmp_path, scheme, dtype):
    source = GOLDEN / f"files/checkpoints/source-{dtype}.safetensors"
    quantized, dense = tmp_path / "quantized.safetensors", tmp_path / "dense.safetensors"
    subprocess.run([binary(), "quantize", source, quantized, "--scheme", scheme, "--quiet"], check=True)
    subprocess.run([binary(), "dequantize", quantized, dense, "--quiet"], check=True)
    codes, ours = load_file(quantized), load_file(dense)
    modules = sorted({name.rpartition(".")[0] for name in codes if name.endswith(".weight_scale")})
    assert modules
    for module in modules:
        prefix = f"{module}."
        state = {name.removeprefix(prefix): value for name, value in codes.items() if name.startswith(prefix)}
        state.pop("bias", None)
        compressor = BaseCompressor.get_value_from_registry(generate.compression_format(scheme))
        theirs = compressor.decompress(state, generate.quantization_scheme(scheme))["weight"]
        assert torch.equal(theirs.view(torch.uint8), ours[f"{module}.weight"].view(torch.uint8)), module
