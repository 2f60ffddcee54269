"""torchao: the tensors that its configurations for weights put into a model, made of one weight and turned back."""

from collections.abc import Callable, Iterable

import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow

from peer import DEQUANTIZE, QUANTIZE, Peer, size

NAME = "torchao"
MX_BLOCK = 32
# compressed-tensors' rule for the exponent, by torchao's name for it.
MX_RULE = ScaleCalculationMode.EVEN
MX = {"MXFP4A16": torch.float4_e2m1fn_x2, "MXFP6A16": DTYPE_FP6_E2M3, "MXFP8A16": torch.float8_e4m3fn}


def peers(format: str, weights: torch.Tensor) -> Iterable[Peer]:
    row = Mx(weights, MX[format]) if format in MX else Subclass(weights, SUBCLASSES[format])
    yield Peer(NAME, format, QUANTIZE, row.quantize, weights.nbytes)
    yield Peer(NAME, format, DEQUANTIZE, row.dequantize, size(row.quantize()))


class Subclass:
    """A subclass of Tensor, which holds its codes as `qdata` and its scales as `scale`."""

    def __init__(self, weights: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]):
        self.weights, self.make, self.made = weights, make, make(weights)

    def quantize(self) -> list[torch.Tensor]:
        made = self.make(self.weights)
        return [made.qdata, made.scale]

    def dequantize(self) -> list[torch.Tensor]:
        return [self.made.dequantize(self.weights.dtype)]


def int8(weights: torch.Tensor) -> Int8Tensor:
    return Int8Tensor.from_hp(weights, PerRow())


def fp8(weights: torch.Tensor) -> Float8Tensor:
    return Float8Tensor.from_hp(weights, granularity=PerRow())


def nvfp4(weights: torch.Tensor) -> NVFP4Tensor:
    return NVFP4Tensor.to_nvfp4(weights, per_tensor_scale=per_tensor_amax_to_scale(weights.abs().amax()))


class Mx:
    """`to_mx` leaves each FP6 in a byte of its own: that row does not pack."""

    def __init__(self, weights: torch.Tensor, elements: torch.dtype | str):
        self.weights, self.elements = weights, elements
        self.codes, self.scales = self.quantize()

    def quantize(self) -> list[torch.Tensor]:
        scales, codes = to_mx(self.weights, self.elements, MX_BLOCK, MX_RULE)
        return [codes, scales]

    def dequantize(self) -> list[torch.Tensor]:
        return [to_dtype(self.codes, self.scales, self.elements, MX_BLOCK, self.weights.dtype)]


SUBCLASSES = {"W8A8": int8, "FP8_DYNAMIC": fp8, "NVFP4A16": nvfp4}
FORMATS = (*SUBCLASSES, *MX)
