"""bitsandbytes: its blocks of four bits, and rows of int8, on its CPU backend."""

from collections.abc import Iterable

import bitsandbytes.functional as bnb
import torch

from peer import DEQUANTIZE, QUANTIZE, Peer, size

NAME = "bitsandbytes"
FORMATS = ("nf4", "fp4", "int8_rowwise")


def peers(format: str, weights: torch.Tensor) -> Iterable[Peer]:
    if format == "int8_rowwise":
        made = bnb.int8_vectorwise_quant(weights)[:2]
        yield Peer(NAME, format, QUANTIZE, lambda: bnb.int8_vectorwise_quant(weights)[:2], weights.nbytes)
        yield Peer(NAME, format, DEQUANTIZE, lambda: [bnb.int8_vectorwise_dequant(*made)], size(made))
        return
    codes, state = bnb.quantize_4bit(weights, quant_type=format, blocksize=64)

    def quantize() -> list[torch.Tensor]:
        codes, state = bnb.quantize_4bit(weights, quant_type=format, blocksize=64)
        return [codes, state.absmax]

    yield Peer(NAME, format, QUANTIZE, quantize, weights.nbytes)
    yield Peer(NAME, format, DEQUANTIZE, lambda: [bnb.dequantize_4bit(codes, state)], size([codes, state.absmax]))
