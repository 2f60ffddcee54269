"""compressed-tensors: `calculate_qparams`, and `compress` of the format's compressor, in the type of the weights.

The arithmetic that its own CPU path has, as the golden files' `weight-dtype`. The ranges are `amin` and `amax`, as in
its `compute_dynamic_scales_and_zp`; `torch.aminmax` takes several times as long on CPU.
"""

import re
from collections.abc import Iterable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from peer import DEQUANTIZE, QUANTIZE, Peer, size

NAME = "compressed-tensors"
FORMATS = (
    "W8A8", "W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16",
    "int2", "int3", "int4", "int5", "int6", "int7",
)


def peers(format: str, weights: torch.Tensor) -> Iterable[Peer]:
    row = Compressed(weights, scheme(format))
    yield Peer(NAME, format, QUANTIZE, row.quantize, weights.nbytes)
    if row.decompresses_to_its_own_type():
        yield Peer(NAME, format, DEQUANTIZE, row.dequantize, size(row.state.values()))


class Compressed:
    def __init__(self, weights: torch.Tensor, scheme: QuantizationScheme):
        self.weights, self.scheme = weights, scheme
        self.compressor = BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)
        self.state: dict[str, torch.Tensor] = {}
        self.quantize()

    def quantize(self) -> list[torch.Tensor]:
        args = self.scheme.weights
        low, high = extrema(self.weights, args)
        state = {"weight": self.weights}
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
        scale, points = calculate_qparams(low, high, args, state.get("weight_global_scale"))
        state["weight_scale"] = scale
        if not args.symmetric:
            state["weight_zero_point"] = points
        self.state = self.compressor.compress(state, self.scheme)
        codes = "weight" if "weight" in self.state else "weight_packed"
        return [self.state[codes], *(tensor for name, tensor in self.state.items() if name != codes)]

    def dequantize(self) -> list[torch.Tensor]:
        return [self.compressor.decompress(self.state, self.scheme)["weight"]]

    def decompresses_to_its_own_type(self) -> bool:
        """FP4, FP6 and MX come back as bf16, whatever they came from."""
        return self.dequantize()[0].dtype == self.weights.dtype


def extrema(weights: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest element per scale, in the shape that compressed-tensors gives that scale."""
    match args.strategy:
        case "channel":
            parts, dims, keep = weights, 1, True
        case "group" | "tensor_group":
            parts, dims, keep = weights.unflatten(-1, (-1, args.group_size)), 2, False
        case "block":
            height, width = args.block_structure
            parts, dims, keep = weights.unflatten(1, (-1, width)).unflatten(0, (-1, height)), (1, 3), False
    return parts.amin(dims, keepdim=keep), parts.amax(dims, keepdim=keep)


def scheme(format: str) -> QuantizationScheme:
    plain = re.fullmatch(r"int(\d)", format)
    if not plain:
        return preset_name_to_scheme(format, ["Linear"])
    args = QuantizationArgs(num_bits=int(plain[1]), type="int", symmetric=True, strategy="channel")
    return QuantizationScheme(targets=["Linear"], weights=args)
