"""What is timed: a function of one peer that makes one format's tensors, or the weights out of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

QUANTIZE, DEQUANTIZE = "quantize", "dequantize"


@dataclass(frozen=True)
class Peer:
    """`run` does the work once and returns the tensors that it made: for `quantize` the codes first."""

    name: str
    format: str
    op: str
    run: Callable[[], Iterable[torch.Tensor]]
    bytes_in: int


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
