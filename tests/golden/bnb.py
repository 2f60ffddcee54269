"""Writes files/bitsandbytes.json: digests of what bitsandbytes makes of hard layers and of MiniLM, and of the values that it reads in them.

`make golden` runs it, on requirements.txt. Its CPU backend is the oracle: torch operations for `nf4`, `fp4` and `int8_rowwise`
(LLM.int8), its C library where it has one. But not of double quantization's eight bits: the library looks them up by 16 bits of a number, which
puts one of a thousand elsewhere, so they are of its torch operations. The mean is ours, put into its functions: torch's own depends on how
many threads there are.
"""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "tests"))

from golden import cases, minilm  # noqa: E402

FILE = Path(__file__).resolve().parent / "files" / "bitsandbytes.json"
BOOKS = ("nf4", "fp4")
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ROWS = "int8_rowwise"
DOUBLE = ";double_quant=true"
NESTED_BLOCK = 256
SHAPE = (6, 4096)
DTYPES = ("f32", "bf16", "f16")


def main():
    import bitsandbytes
    document = {"package": f"bitsandbytes {bitsandbytes.__version__}", "layers": {}}
    for dtype in DTYPES:
        for name, weights in (layers(dtype) | real(dtype)).items():
            document["layers"][f"{name}@{dtype}"] = {scheme: made(scheme, weights) for scheme in schemes(weights, dtype)}
    FILE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def schemes(weights: np.ndarray, dtype: str) -> list[str]:
    """Those whose blocks divide the rows; rows of int8 are made of f16."""
    found = [f"{book}/g{size}" for book in BOOKS for size in SIZES if weights.shape[1] % size == 0]
    return found + [scheme + DOUBLE for scheme in found] + [ROWS] * (dtype == "f16")


def layers(dtype: str) -> dict[str, np.ndarray]:
    """By case, rounded once to the type."""
    def draw(name):
        return cases.normal(cases.generator(f"bitsandbytes {name}"), SHAPE)

    exponents = np.round(draw("exponents")[:, ::32] * 3).repeat(32, axis=1).astype(np.int32)
    # Half-way between neighbours of both codebooks, and the next numbers, in blocks whose greatest is a power of two.
    middles = np.concatenate([middle for book in CODEBOOKS.values() for middle in around(book)])
    ties = np.resize(middles.astype(np.float32), SHAPE) * np.ldexp(1.0, exponents)
    ties[:, ::32] = np.ldexp(1.0, exponents[:, ::32])
    found = {
        "normal": draw("normal") * 0.02,
        "cubed": draw("cubed") ** 3,
        "ties": ties,
        "scaled": draw("scaled") * np.ldexp(1.0, np.clip(exponents, -4, 4) if dtype == "f16" else exponents * 9),
        "zeros": np.where(draw("signs") > 0, 0.0, -0.0),
        "sparse": np.where(draw("sparse") > 1.9, draw("values"), -0.0) * (np.arange(SHAPE[1]) // 32 % 3 > 0),
        "constant": np.repeat(draw("constant")[:, ::64], 64, axis=1),
    }
    if dtype != "f16":
        # Below and around 1e-38, by which bitsandbytes divides at the least.
        found["tiny"] = draw("tiny") * np.ldexp(1.0, exponents - 127)
        found["large"] = draw("large") * 1e37
    found["pieces"] = np.where(np.abs(draw("pieces")) < 1, np.nextafter(np.float32(1), np.float32(0)), 1) * np.sign(draw("signs"))
    return {name: np.ascontiguousarray(values, np.float32).astype(minilm.STORED[dtype]) for name, values in found.items()}


def real(dtype: str) -> dict[str, np.ndarray]:
    return {name: weights for name, weights in minilm.tensors(dtype).items() if "word_embeddings" not in name}


NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)
FP4 = np.array([-12, -8, -6, -4, -3, -2, -0.0625, 0, 0.0625, 2, 3, 4, 6, 8, 12], np.float32) / np.float32(12)
CODEBOOKS = {"nf4": NF4, "fp4": FP4}


def around(book: np.ndarray):
    middles = (book[:-1] + book[1:]) / np.float32(2)
    return middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(-9)), book


def made(scheme: str, weights: np.ndarray) -> str:
    """Codes, scales, and the values as bitsandbytes reads them."""
    import bitsandbytes.functional as bnb
    import torch
    tensor = torch.from_numpy(weights.view(np.uint16)).view(torch.bfloat16) if weights.dtype.name == "bfloat16" else torch.from_numpy(weights)
    if scheme == ROWS:
        codes, scales, _ = bnb.int8_vectorwise_quant(tensor.clone())
        values = bnb.int8_vectorwise_dequant(codes, scales)
    else:
        book, _, size = scheme.removesuffix(DOUBLE).partition("/g")
        codes, state = bnb.quantize_4bit(tensor, quant_type=book, blocksize=int(size))
        scales = state.absmax
        # Of f32 weights its values are f32.
        state.dtype = torch.float32
        if scheme.endswith(DOUBLE):
            state.offset = torch.tensor(mean(scales.numpy()))
            # Its state first, then the bytes in it.
            state.absmax, state.state2 = bnb.quantize_blockwise(scales - state.offset, blocksize=NESTED_BLOCK)
            quantize = torch_operations()["bitsandbytes::quantize_blockwise"]
            state.absmax, state.state2.absmax = quantize(scales - state.offset, state.state2.code, NESTED_BLOCK)
            state.nested = True
            nested = state.absmax.numpy(), state.state2.absmax.numpy(), state.offset.numpy()
            return digest(codes.numpy(), *nested, bnb.dequantize_4bit(codes, state).to(torch.float32).numpy())
        values = bnb.dequantize_4bit(codes, state)
    return digest(codes.numpy(), scales.numpy(), values.to(torch.float32).numpy())


@cache
def torch_operations() -> dict:
    """What it computes with where it has no library: as it registers them."""
    from bitsandbytes import _ops
    from bitsandbytes.backends.default import ops
    found = {}
    with mock.patch.object(_ops, "register_kernel", lambda name, _: lambda kernel: found.setdefault(name, kernel)):
        spec = importlib.util.spec_from_file_location("bitsandbytes.backends.default.again", ops.__file__)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return found


def mean(scales: np.ndarray) -> np.float32:
    """As `proto/SPEC.md` says: of the sum in f64, in order."""
    return np.float32(np.add.accumulate(scales, dtype=np.float64)[-1] / scales.size)


def digest(*parts: np.ndarray) -> str:
    """Of a layer's codes, scales and values together."""
    return minilm.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))[:32]


if __name__ == "__main__":
    main()
