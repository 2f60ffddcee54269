"""Schemes as a reader of answers must know them: how codes lie in bytes, and the shape of scales.

The grammar and the layouts are those of `proto/SPEC.md`, section Schemes. Nothing is validated here: the server did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quarrel.errors import UnsupportedError

_SCHEME = re.compile(
    r"(?P<name>[^/;]+)(?:/(?:(?P<tensor>tensor)|channel|g(?P<group>\d+)|b(?P<high>\d+)x(?P<wide>\d+)))?"
    r"(?:;channel_dims=(?P<dims>\d+))?(?:;double_quant=(?:false|true))?(?:;mx=(?:floor|rceil|even))?(?:;solver=(?:absmax|mse|hqq))?"
)
_INTEGERS = re.compile(r"int(?P<bits>[2-8])(?:-asym)?")
# Schemes whose codes are numbers with an exponent, or stand for given values, by the start of their names in lower case.
_FLOATS = ("fp8", "nvfp4", "mxfp", "nf4", "fp4")
# Bits of a code, whether it is dense, and what shares a scale: a group's columns, a block's sides, the tensor.
_PRESETS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "W4A16": (4, True, {"group": 128}),
    "W4A16_ASYM": (4, True, {"group": 128}),
    "W8A16": (8, True, {"group": 128}),
    "W8A8": (8, False, {}),
    "INT8": (8, False, {}),
    "FP8": (8, False, {"tensor": True}),
    "FP8_DYNAMIC": (8, False, {}),
    "FP8_BLOCK": (8, False, {"block": (128, 128)}),
    "NVFP4A16": (4, True, {"group": 16}),
    "MXFP4A16": (4, True, {"group": 32}),
    "MXFP6A16": (6, True, {"group": 32}),
    "MXFP8A16": (8, False, {"group": 32}),
    "fp8": (8, False, {}),
    "nf4": (4, True, {"group": 64, "high_first": True}),
    "fp4": (4, True, {"group": 64, "high_first": True}),
    "int8_rowwise": (8, False, {}),
}
# ggml's types: bits of a code, and elements and bytes of a block, which holds its own scales.
_BLOCKS: dict[str, tuple[int, int, int]] = {
    "Q8_0": (8, 32, 34),
    "Q4_0": (4, 32, 18),
    "Q4_1": (4, 32, 20),
    "Q5_0": (5, 32, 22),
    "Q5_1": (5, 32, 24),
    "Q2_K": (2, 256, 84),
    "Q3_K": (3, 256, 110),
    "Q4_K": (4, 256, 144),
    "Q5_K": (5, 256, 176),
    "Q6_K": (6, 256, 210),
    "IQ4_NL": (4, 32, 18),
    "MXFP4": (4, 32, 17),
    "NVFP4": (4, 64, 36),
}
_PRESETS |= {name: (bits, False, {"group": size, "block_bytes": held}) for name, (bits, size, held) in _BLOCKS.items()}
UNPACKED_CODES = 1 << 20
"""Codes unpacked at a time: what is held besides the result is a few times as many bytes."""


@dataclass(frozen=True)
class Layout:
    """What a scheme means for the arrays of a layer."""

    bits: int
    dense: bool
    floats: bool
    channel_dims: int = 1
    group: int | None = None
    block: tuple[int, int] | None = None
    tensor: bool = False
    high_first: bool = False
    """Of bitsandbytes' four bits: the first of two codes is the upper half of its byte."""
    block_bytes: int | None = None
    """Of ggml's types, whose groups are blocks with the scales inside."""

    @classmethod
    def of(cls, scheme: str) -> Layout:
        """Of a canonical scheme, as answers name it.

        Raises:
            UnsupportedError: a later server's, unknown here.
        """
        found = _SCHEME.fullmatch(scheme)
        name = found["name"] if found else ""
        integer = _INTEGERS.fullmatch(name)
        if found is None or not (integer or name in _PRESETS):
            raise UnsupportedError(
                f"scheme `{scheme}` is not known to this client", advice="Update the package, or read `packed`."
            )
        bits, dense, shares = (int(integer["bits"]), integer["bits"] != "8", {}) if integer else _PRESETS[name]
        if found["group"]:
            shares = shares | {"group": int(found["group"])}
        elif found["high"]:
            shares = {"block": (int(found["high"]), int(found["wide"]))}
        elif found["tensor"]:
            shares = {"tensor": True}
        return cls(bits, dense, name.lower().startswith(_FLOATS), int(found["dims"] or 1), **shares)

    def channels(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The dimensions that are channels; a layer of rank 1 is one channel."""
        return shape[: self.channel_dims] if len(shape) > 1 else (1,)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[1], [channels, 1], [channels, groups], or [rows, columns] of blocks, after dimensions of matrices. [channels, 0] of
        ggml's types, whose scales are in the codes."""
        if self.tensor:
            return (1,)
        channels = self.channels(shape)
        if self.block_bytes:
            return *channels, 0
        columns = math.prod(shape) // max(math.prod(channels), 1)
        if self.block:
            high, wide = self.block
            return *channels[:-1], -(-channels[-1] // high), -(-columns // wide)
        return *channels, columns // self.group if self.group else 1

    def unpack(self, packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Codes in the layer's shape: int8, or the bits of NF4, FP4, FP6 and FP8 as uint8. ggml's types: the bytes of each channel's blocks."""
        if self.block_bytes:
            return packed.reshape(*self.channels(shape), -1)
        kind = np.dtype(np.uint8 if self.floats else np.int8)
        if not self.dense:
            return packed.view(kind).reshape(shape)
        channels = math.prod(self.channels(shape))
        columns = math.prod(shape) // max(channels, 1)
        codes = np.empty((channels, columns), kind)
        rows = packed.reshape(channels, -1)
        # Code i lies in bits [i*b, i*b+b) of its channel: in one byte and perhaps the next, little-endian.
        first = np.arange(columns) * self.bits
        if self.high_first:
            first ^= self.bits
        byte, shift = first >> 3, (first & 7).astype(np.uint8)
        offset = np.uint8(0 if self.floats else 1 << (self.bits - 1))
        step = max(1, UNPACKED_CODES // max(columns, 1))
        for start in range(0, channels, step):
            low = rows[start : start + step, byte] >> shift
            if 8 % self.bits:
                following = np.minimum(byte + 1, rows.shape[1] - 1)
                low |= (rows[start : start + step, following].astype(np.uint16) << (8 - shift)).astype(np.uint8)
            unsigned = low & np.uint8((1 << self.bits) - 1)
            codes[start : start + step] = (unsigned - offset).view(kind)
        return codes.reshape(shape)


def has_groups(schemes: Iterable[str]) -> bool:
    """Whether any of these, as a caller writes them, has groups that might not divide a layer's columns."""
    found = (_SCHEME.fullmatch(scheme) for scheme in schemes)
    return any(
        match and (match["group"] or "group" in _PRESETS.get(match["name"], (0, False, {}))[2]) for match in found
    )
