"""Layers that are hard on ggml's types, and how their bytes are told apart. Shared by ggml.py and test_ggml.py."""

import numpy as np

from golden import cases
from golden.minilm import sha256

# ggml's number, elements and bytes of a block, by name.
TYPES = {
    "Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
}
# Those whose searches go by the importance of columns.
BY_IMPORTANCE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
SHAPE = (24, 1280)
# Two dtypes beside f32, which ggml gets widened.
NARROW = ("bf16", "f16")


def layers() -> dict[str, np.ndarray]:
    """f32 by case. Nothing so large that a scale is beyond f16."""
    def draw(name):
        return cases.normal(cases.generator(f"blocks {name}"), SHAPE)

    def chosen(name, share):
        return draw(name) > share

    def per_group(name, size, low, high):
        """Powers of two from 2^low to 2^high, the same for each `size` columns."""
        groups = cases.normal(cases.generator(f"blocks {name}"), (SHAPE[0], SHAPE[1] // size))
        exponents = np.clip(np.floor(groups * (high - low) / 4 + (low + high) / 2), low, high).astype(np.int32)
        return np.repeat(np.ldexp(1.0, exponents), size, axis=1)

    signed_zeros = np.where(chosen("signs", 0), 0.0, -0.0)
    columns = np.arange(SHAPE[1])
    found = {
        "normal": draw("normal") * 0.02,
        "cubed": draw("cubed") ** 3,
        "ties": np.round(draw("ties") * 4) * 0.5,
        "below-two": np.nextafter(np.float32(1), np.float32(0)) * per_group("below-two", 32, -30, 14)
        * np.where(chosen("below-two places", 0.5), 1, draw("below-two rest") / 8),
        "alike": np.where(chosen("alike signs", 0), 1, -1) * (1 + draw("alike") * 1e-6),
        "negative": -np.abs(draw("negative")) - 0.1,
        "positive": np.abs(draw("positive")) + 3,
        "constant": np.repeat(draw("constant")[:, ::16], 16, axis=1),
        "zeros": signed_zeros,
        "sparse": np.where(chosen("sparse", 1.9), draw("sparse values"), signed_zeros),
        "outliers": draw("outliers") * np.where(columns % 97 == 41, 1e4, 1),
        "scales": draw("scales") * per_group("scales exponents", 16, -30, 13),
        "around-1e-15": draw("around-1e-15") * per_group("around-1e-15 exponents", 16, -56, -42),
        "tiny": draw("tiny") * 2.0**-66,
        "subnormal": draw("subnormal") * 2.0**-130,
        "large": draw("large") * 1e4,
    }
    return {name: np.ascontiguousarray(values, np.float32) for name, values in found.items()}


def importances(columns: int) -> dict[str, np.ndarray]:
    """A number for each column: mean squares of activations as they come, and edges."""
    drawn = cases.normal(cases.generator(f"importance {columns}"), (columns,))
    found = {
        "squares": drawn**2 * np.where(np.arange(columns) % 113 == 7, 1e4, 1),
        # Whole groups of 16 and 32 that count for nothing, and single columns.
        "zeros": np.where((np.arange(columns) // 32 % 3 == 1) | (drawn > 1), 0, np.abs(drawn)),
        "nothing": np.zeros(columns),
        # So few that a solution is nearly singular.
        "one of 16": np.arange(columns) % 16 == 5,
        "two of 256": (np.arange(columns) % 256 == 37) | (np.arange(columns) % 256 == 201),
        "some": np.where(drawn > 1.2, drawn, 0),
        "wide": np.ldexp(1.0, np.clip(np.round(drawn * 20), -60, 49).astype(np.int32)),
    }
    return {name: np.ascontiguousarray(values, np.float32) for name, values in found.items()}


def fitting(kind: str, layers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those that blocks of a type divide."""
    return {name: layer for name, layer in layers.items() if layer.shape[1] % TYPES[kind][1] == 0}


def any_blocks(kind: str) -> np.ndarray:
    """Bytes that nobody quantized: rows of 2,560 columns that begin with every byte there is."""
    _, elements, size = TYPES[kind]
    drawn = cases.generator(f"blocks any {kind}").integers(0, 256, (64, 2560 // elements * size), dtype=np.uint8)
    first = np.resize(np.arange(256, dtype=np.uint8), (64, 4))
    drawn[:, :4] = first
    return drawn


def numbers(values: np.ndarray) -> np.ndarray:
    """The same with one NaN for all."""
    return np.where(np.isnan(values), np.float32(np.nan), values)


def digest(blocks: np.ndarray) -> str:
    """Of the bytes of a layer, or of its values."""
    return sha256(np.ascontiguousarray(blocks).tobytes())
