"""The oracle for NVFP4 and MX: small floats under scales that are small floats too.

Codes, and scales by the rule that a preset's name means, are compressed-tensors'. The scales of `;mx=floor` and
`;mx=rceil` are torchao's, with a correction told in `torchao_scales`.
"""

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_mx

# By bits of an element: torchao's name of it, and its largest number.
ELEMENTS = {4: (torch.float4_e2m1fn_x2, 6.0), 6: ("fp6_e2m3", 7.5), 8: (torch.float8_e4m3fn, 448.0)}
MODES = {"floor": ScaleCalculationMode.FLOOR, "rceil": ScaleCalculationMode.RCEIL}


@dataclass
class Microscaled:
    """One layer. `scales`: [channels, groups], the numbers themselves, in f32 or the type of the weights."""

    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None = None


def nvfp4(x: torch.Tensor, args: QuantizationArgs, amax: torch.Tensor | None) -> Microscaled:
    """As llm-compressor has it: the global scale from the greatest magnitude, of the layer or of all that share it.

    In the type of `x`. That is only where the global scale and `absmax / 6` are made: the global scale comes as f32, and
    what it is multiplied with or divides becomes f32.
    """
    amax = x.abs().amax() if amax is None else amax
    global_scale = generate_gparam(-amax, amax)
    scales, _ = calculate_qparams(*extrema(x, args), args, global_scale=global_scale)
    codes = pack_fp4_to_uint8(quantize(x, scales, None, args, global_scale=global_scale))
    return Microscaled(codes, scales, global_scale)


def mx(x: torch.Tensor, args: QuantizationArgs, rule: str) -> Microscaled:
    """In the type of `x`, which makes no difference between bf16 and f32: generate.py looks."""
    scales = calculate_qparams(*extrema(x, args), args)[0] if rule == "even" else torchao_scales(x, args, rule)
    # compressed-tensors casts MXFP8 only when told to what.
    codes = quantize(x, scales, None, args, dtype=args.pytorch_dtype() if args.num_bits == 8 else None)
    return Microscaled(packed(codes, args), scales)


def extrema(x: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.unflatten(-1, (-1, args.group_size))
    return groups.amin(2), groups.amax(2)


def packed(codes: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    match args.num_bits:
        case 4:
            return pack_fp4_to_uint8(codes)
        case 6:
            return pack_fp6_to_uint8(codes)
        case 8:
            return codes.view(torch.uint8)


def torchao_scales(x: torch.Tensor, args: QuantizationArgs, rule: str) -> torch.Tensor:
    """torchao's scales. Its own codes must be those that compressed-tensors makes with them, as far as torchao goes.

    - `rceil` is ceil(log2(absmax / largest)), and torchao takes that logarithm in f32: of a number just above 2^n it is n,
      if n is large enough. In f64 it is right for every f32; only such groups may differ.
    - Where the scale is 2^-127, torchao divides by another: those codes are not looked at.
    - Its FP4 has a code for -0.0; compressed-tensors' has one for what is below zero.
    """
    element, largest = ELEMENTS[args.num_bits]
    exponents, codes = to_mx(x.contiguous(), element, args.group_size, MODES[rule])
    exponents = exponents.view(torch.uint8).int()
    scales = as_scales(exponents)
    theirs = {4: unpack_uint4, 6: lambda codes: codes, 8: lambda codes: codes.view(torch.uint8)}[args.num_bits](codes)
    ours = quantize(x, scales, None, args)
    if args.num_bits == 4:
        scaled = x.unflatten(-1, (-1, args.group_size)) / scales[:, :, None]
        theirs = torch.where((scaled == 0).flatten(1), 0, theirs)
    normal = (exponents > 0).repeat_interleave(args.group_size, 1)
    assert torch.equal(unpacked(ours, args)[normal], theirs[normal]), f"{rule} codes of {args.num_bits} bits differ"

    if rule == "rceil":
        quotients = torch.maximum(*(end.abs() for end in extrema(x, args))) / largest
        exact = (torch.ceil(torch.log2(quotients.double())).clamp(min=-127) + 127).int()
        above = torch.frexp(quotients)[0] * 2
        assert ((exact == exponents) | (exact == exponents + 1) & (above > 1) & (above < 1 + 2**-18)).all()
        scales = as_scales(exact)
    return scales


def as_scales(exponents: torch.Tensor) -> torch.Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents - 127).float()


def unpacked(values: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """A code in a byte each, of numbers that compressed-tensors rounded to elements."""
    if args.num_bits == 8:
        return values.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = packed(values, args)
    if args.num_bits == 4:
        return unpack_uint4(codes)
    words = codes.int().unflatten(-1, (-1, 3))
    word = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16
    return torch.stack([word >> shift & 0x3F for shift in (0, 6, 12, 18)], -1).flatten(1).to(torch.uint8)
