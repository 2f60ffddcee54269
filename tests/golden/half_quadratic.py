"""Writes files/hqq.json: the errors of what HQQ makes of layers, after its 20 iterations: with real zero points, where integers stand beside here; and
of torchao's HQQ of scales alone, for symmetric schemes.

`make golden` runs it, on requirements.txt and half_quadratic.txt. tests/golden/test_half_quadratic.py holds `;solver=hqq` against it.
"""

import json
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  numpy knows bfloat16 by it
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "tests"))

from golden import bnb, cases, minilm  # noqa: E402

FILE = Path(__file__).resolve().parent / "files" / "hqq.json"
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
SHAPE = (256, 1024)
DTYPES = ("f32", "bf16")


def main():
    import hqq
    import torchao
    document = {"packages": [f"hqq {hqq.__version__}", f"torchao {torchao.__version__}"], "layers": {}}
    for name, weights in layers().items():
        document["layers"][name] = {scheme(bits, group, asymmetric): reference(weights, bits, group, asymmetric)
                                    for bits in BITS for group in GROUPS for asymmetric in (True, False)}
    FILE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def scheme(bits: int, group: int, asymmetric: bool) -> str:
    return f"int{bits}{'-asym' if asymmetric else ''}/g{group}"


def layers() -> dict[str, np.ndarray]:
    """Those of distributions, and MiniLM's, as it has them and rounded to bf16."""
    def draw(name):
        return cases.generator(f"hqq {name}")

    made = {
        "normal": cases.normal(draw("normal"), SHAPE) * 0.02,
        "normal, large": cases.normal(draw("large"), SHAPE) * 2,
        "normal, shifted": cases.normal(draw("shifted"), SHAPE) * 0.02 + 0.03,
        "products": cases.normal(draw("one"), SHAPE) * cases.normal(draw("other"), SHAPE) * 0.02,
        "uniform": draw("uniform").random(SHAPE, np.float32) * 0.04 - 0.02,
    }
    found = {name: np.ascontiguousarray(weights, np.float32) for name, weights in made.items()}
    for dtype in DTYPES:
        found |= {f"{name}@{dtype}": weights for name, weights in bnb.real(dtype).items() if weights.shape[-1] % 128 == 0 and "layer.0" in name}
    return found


def reference(weights: np.ndarray, bits: int, group: int, asymmetric: bool) -> list[float]:
    import torch
    from hqq.core.quantize import Quantizer
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq
    tensor = torch.from_numpy(weights.astype(np.float32))
    if not asymmetric:
        half = 2 ** (bits - 1)
        codes, scales = _choose_qparams_and_quantize_scale_only_hqq(tensor, [1, group], -half, half - 1)
        return errors(weights, (codes * scales.repeat_interleave(group, 1)).numpy())
    codes, meta = Quantizer.quantize(tensor, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32)
    return errors(weights, Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32}).numpy())


def errors(weights: np.ndarray, values: np.ndarray) -> list[float]:
    """Means of |x - y|, by which HQQ ends its iterations; of |x - y|^0.7, which they are to make small; and of squares."""
    away = np.abs(weights.astype(np.float64) - values)
    return [float(f"{mean:.9g}") for mean in (away.mean(), (away ** 0.7).mean(), (away ** 2).mean())]


if __name__ == "__main__":
    main()
