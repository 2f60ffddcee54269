"""torch as one would write it by hand: int8 and FP8 with a scale a channel, each step into a buffer made before.

Twice: on the whole tensor, and on blocks of rows whose temporaries stay in the L2 cache, which is torch at its best.
"""

from collections.abc import Callable, Iterable

import torch

from peer import DEQUANTIZE, QUANTIZE, Peer

WHOLE, BLOCKS = "torch", "torch-blocks"
BLOCK_ROWS = 128  # the best of 8 .. 512 with 1 MiB of L2 cache: smaller ones pay for Python
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def peers(format: str, weights: torch.Tensor) -> Iterable[Peer]:
    for name, rows in ((WHOLE, len(weights)), (BLOCKS, BLOCK_ROWS)):
        row = FORMATS[format](weights, rows)
        yield Peer(name, format, QUANTIZE, row.quantize, weights.nbytes)
        yield Peer(name, format, DEQUANTIZE, row.dequantize, row.codes.nbytes + row.scales.nbytes)


class Channels:
    """A scale for each channel: its largest magnitude over `divisor`."""

    codes_dtype: torch.dtype
    divisor: float

    def __init__(self, weights: torch.Tensor, rows: int):
        self.codes = torch.empty(weights.shape, dtype=self.codes_dtype)
        self.scales = weights.new_empty(len(weights), 1)
        self.values = torch.empty_like(weights)
        self.scaled = torch.empty_like(weights[:rows])  # what one block is computed in
        self.blocks = [
            tuple(tensor[start:start + rows] for tensor in (weights, self.codes, self.scales, self.values))
            for start in range(0, len(weights), rows)
        ]

    def quantize(self) -> list[torch.Tensor]:
        for weights, codes, scales, _ in self.blocks:
            torch.amax(torch.abs(weights, out=self.scaled), 1, keepdim=True, out=scales).div_(self.divisor)
            codes.copy_(self.coded(torch.div(weights, scales, out=self.scaled)))
        return [self.codes, self.scales]

    def dequantize(self) -> list[torch.Tensor]:
        for _, codes, scales, values in self.blocks:
            values.copy_(codes).mul_(scales)
        return [self.values]

    coded: Callable[[torch.Tensor], torch.Tensor]


class Int8(Channels):
    codes_dtype, divisor = torch.int8, 127.5

    def coded(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round_().clamp_(-128, 127)


class Fp8(Channels):
    codes_dtype, divisor = torch.float8_e4m3fn, FP8_MAX

    def coded(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.clamp_(-FP8_MAX, FP8_MAX)  # the copy into the codes rounds


FORMATS = {"W8A8": Int8, "FP8_DYNAMIC": Fp8}
