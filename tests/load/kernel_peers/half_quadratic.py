"""hqq: 4 bits in groups of 64 along the rows, its 20 iterations, on the CPU."""

from collections.abc import Iterable

import torch
from hqq.core.quantize import Quantizer

from peer import QUANTIZE, Peer

NAME = "hqq"
FORMATS = ("int4-asym/g64;solver=hqq",)


def peers(format: str, weights: torch.Tensor) -> Iterable[Peer]:
    def quantize() -> list[torch.Tensor]:
        codes, meta = Quantizer.quantize(weights, nbits=4, group_size=64, axis=1, device="cpu")
        return [codes, meta["scale"], meta["zero"]]

    yield Peer(NAME, format, QUANTIZE, quantize, weights.nbytes)
