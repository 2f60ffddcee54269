"""Element types: the wire's words, and what numpy and torch call them."""

from __future__ import annotations

from typing import Any

import numpy as np

from quarrel.errors import UnsupportedError

WORDS = {
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
    "bfloat16": "bf16",
    "float8_e4m3fn": "f8_e4m3",
    "float8_e5m2": "f8_e5m2",
}
"""Those that can be sent, by the names that numpy (with ml_dtypes) and torch give them."""

# FP8 is given as its bits; the rest are tensors of a checkpoint that are no floats.
_NUMPY = {
    "f16": "<f2", "f32": "<f4", "f64": "<f8", "f8_e4m3": "u1", "f8_e5m2": "u1",
    "bool": "?", "u8": "u1", "i8": "i1", "u16": "<u2", "i16": "<i2", "u32": "<u4", "i32": "<i4", "u64": "<u8",
    "i64": "<i8", "c64": "<c8",
}  # fmt: skip


def numpy_type(word: str) -> np.dtype[Any]:
    """The type of arrays that we give for a word of the wire.

    Raises:
        UnsupportedError: numpy has none, or for `bf16` ml_dtypes is not installed.
    """
    if word == "bf16":
        try:
            import ml_dtypes
        except ImportError:
            raise UnsupportedError(
                "numpy has no bfloat16 of its own", advice="Install ml_dtypes, or `quarrel-flight[bf16]`."
            ) from None
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if word not in _NUMPY:
        raise UnsupportedError(f"numpy has no type for `{word}`", advice="Read the bytes from `to_arrow()`.")
    return np.dtype(_NUMPY[word])
