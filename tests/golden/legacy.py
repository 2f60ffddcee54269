"""Models in the layouts of GPTQ and AWQ, by their formulas in numpy. Shared by tests of the command line and of test-interop."""

import json
from dataclasses import dataclass

import numpy as np

from golden import cases, llamas
from harness import cli

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True)
class Layer:
    codes: np.ndarray  # [out, in], from zero
    zeros: np.ndarray  # [out, groups]
    scales: np.ndarray  # [out, groups], f16
    order: np.ndarray  # [in]: the group of each column

    @property
    def values(self) -> np.ndarray:
        """What it stands for, in f32."""
        zeros, scales = (array[:, self.order] for array in (self.zeros, self.scales.astype(np.float32)))
        return (self.codes - zeros).astype(np.float32) * scales


def draw(name: str, shape: tuple[int, int], bits: int, group: int, symmetric: bool, least: int = 0, ordered: bool = False) -> Layer:
    draws = cases.generator(f"legacy {name} {shape} {bits}")
    groups = -(-shape[1] // group)
    codes = draws.integers(0, 2**bits, shape)
    zeros = np.full((shape[0], groups), 2 ** (bits - 1)) if symmetric else draws.integers(least, 2**bits, (shape[0], groups))
    scales = (draws.integers(1, 1000, (shape[0], groups)) / 2**16).astype(np.float16)
    order = np.arange(shape[1]) // group
    return Layer(codes, zeros, scales, draws.permutation(order) if ordered else order)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as 32-bit words, the first in the lowest bits: those of 3 bits may lie over two words."""
    split = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(split.reshape(codes.shape[0], -1).astype(np.uint8), axis=1, bitorder="little").view(np.int32)


def gptq(layer: Layer, bits: int, version: int) -> dict[str, np.ndarray]:
    """Packed along the input; zero points less one in version 1."""
    stored = layer.zeros - (1 if version == 1 else 0)
    return {
        "qweight": np.ascontiguousarray(words(layer.codes, bits).T), "qzeros": words(np.ascontiguousarray(stored.T), bits),
        "scales": np.ascontiguousarray(layer.scales.T), "g_idx": layer.order.astype(np.int32),
    }


def awq(layer: Layer) -> dict[str, np.ndarray]:
    """Packed along the output, eight channels interleaved."""
    def packed(codes):
        return words(codes.reshape(codes.shape[0], -1, 8)[:, :, AWQ_ORDER].reshape(codes.shape), 4)

    return {"qweight": packed(np.ascontiguousarray(layer.codes.T)), "qzeros": packed(np.ascontiguousarray(layer.zeros.T)),
            "scales": np.ascontiguousarray(layer.scales.T)}


def packed(layer: Layer, bits: int) -> dict[str, np.ndarray]:
    """The same in the layout of compressed-tensors."""
    found = {"weight_packed": words(layer.codes, bits), "weight_scale": layer.scales, "weight_shape": np.array(layer.codes.shape, np.int64)}
    if (layer.zeros != 2 ** (bits - 1)).any():
        found["weight_zero_point"] = np.ascontiguousarray(words(np.ascontiguousarray(layer.zeros.T), bits).T)
    return found


@dataclass(frozen=True)
class Model:
    method: str = "gptq"
    bits: int = 4
    group: int = 64
    symmetric: bool = False
    version: int = 1
    ordered: bool = False
    unsaid: tuple[str, ...] = ()
    family: llamas.Family = llamas.Family(layers=1)

    def layers(self) -> dict[str, Layer]:
        """By module; zero points that version 1 of GPTQ can store."""
        least = 1 if self.method == "gptq" and self.version == 1 else 0
        return {name.removesuffix(".weight"): draw(name, shape, self.bits, self.group, self.symmetric, least, self.ordered)
                for name, shape in self.family.shapes().items() if "_proj.weight" in name}

    def said(self) -> dict:
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group}
        if self.method == "awq":
            return common | {"version": "gemm", "zero_point": True}
        return common | {"desc_act": self.ordered, "sym": self.symmetric, "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2"}

    def write(self, folder):
        self.family.write(folder)
        (folder / "config.json").write_text(json.dumps(self.family.config() | {"quantization_config": self.said()}))
        layers = self.layers()
        tensors = {name: array for name, array in self.family.tensors().items() if name.removesuffix(".weight") not in layers}
        for name, layer in layers.items():
            parts = gptq(layer, self.bits, self.version) if self.method == "gptq" else awq(layer)
            tensors |= {f"{name}.{part}": array for part, array in parts.items() if part not in self.unsaid}
        cli.write(folder / "model.safetensors", tensors, {"format": "pt"})
        return folder


MODELS = {
    "gptq": Model(), "gptq symmetric": Model(symmetric=True, group=128), "gptq v2": Model(version=2), "gptq 8 bits": Model(bits=8, group=32, symmetric=True),
    "gptq 2 bits": Model(bits=2, version=2), "awq": Model(method="awq"), "awq symmetric": Model(method="awq", symmetric=True, group=128),
}
# Of which compressed-tensors' layout has no codes.
DECODED = {
    "ordered": Model(ordered=True), "ordered, symmetric": Model(ordered=True, symmetric=True, group=128), "3 bits": Model(bits=3, version=2),
    "3 bits, ordered": Model(bits=3, ordered=True, group=32), "3 bits, symmetric": Model(bits=3, symmetric=True), "8 bits with zero points": Model(bits=8),
    "a short last group": Model(group=96), "a short last group, no order": Model(group=96, symmetric=True, unsaid=("g_idx",)),
}
