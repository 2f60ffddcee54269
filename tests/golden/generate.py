"""Writes files/: what compressed-tensors 0.20 makes of adversarial inputs, of real weights and of whole checkpoints.

`make golden` runs it. Every number of the output comes out of compressed-tensors, torch or torchao (microscaling.py); the
inputs do not (cases.py, minilm.py, checkpoints.py). Nothing in the output depends on time, machine or order of a dict, so
that running it again changes no byte.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_args import round_to_quantized_type_dtype
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range, maybe_pad_tensor_for_block_quant
from safetensors import deserialize
from safetensors.numpy import load_file, save
from safetensors.torch import save as save_torch

import cases
import checkpoints
import microscaling
import minilm

FILES = Path(__file__).resolve().parent / "files"
CHECKPOINTS = FILES / "checkpoints"
# On f32 and f64 the two modes are one.
ARITHS = {"f32": ["f32"], "f64": ["f32"], "bf16": ["f32", "weight-dtype"], "f16": ["f32", "weight-dtype"]}
REAL_SCHEMES = [
    *cases.PRESETS, "int2/g32", "int3/channel", "int5-asym/g32", "int6/tensor", "int8-asym/channel", "fp8/b64x32",
    *cases.MICROSCALED, *cases.RULED,
]


@dataclass
class Quantized:
    """One layer. `codes`: bytes as compressed-tensors stores them. `scales` f32, `zero_points` i32: [channels, groups].

    `global_scale`: f32, [1], of NVFP4 alone.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    global_scale: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        return {name: array for name, array in vars(self).items() if array is not None}


def main():
    torch.set_num_threads(2)
    shutil.rmtree(FILES, ignore_errors=True)
    CHECKPOINTS.mkdir(parents=True)
    write_adversarial()
    write_fused()
    write_real()
    write_checkpoints()


# -- files ------------------------------------------------------------------------------------------------------------

def write_adversarial():
    """inputs.safetensors, and for each dtype and arithmetic `DTYPE-ARITH.safetensors`, keys `SCHEME@CASE@TENSOR`."""
    found = cases.cases()
    inputs = {f"{case.name}@{dtype}": on_disk(w) for case in found for dtype, w in case.weights.items()}
    (FILES / "inputs.safetensors").write_bytes(save(inputs))
    for dtype, ariths in ARITHS.items():
        for arith in ariths:
            expected = {
                f"{scheme}@{case.name}@{kind}": tensor
                for case in found if dtype in case.weights
                for scheme in case.schemes if answers(scheme, dtype, arith)
                for kind, tensor in oracle(case.weights[dtype], scheme, arith).tensors().items()
            }
            (FILES / f"{dtype}-{arith}.safetensors").write_bytes(save(expected))


def answers(scheme: str, dtype: str, arith: str) -> bool:
    """Whether there is an oracle. In f16 as it is the scales of NVFP4 and MX overflow or vanish; torchao computes in f32."""
    if arith == "weight-dtype" and scheme in cases.RULED:
        return False
    return (dtype, arith) != ("f16", "weight-dtype") or scheme not in cases.MICROSCALED


def write_fused():
    """fused.safetensors: NVFP4 layers that share a global scale, keys `DTYPE-ARITH@CASE@TENSOR`."""
    found = {case.name: case for case in cases.cases() if case.name in cases.FUSED}
    expected = {}
    for dtype, ariths in ARITHS.items():
        for arith in ariths if dtype != "f64" else []:
            if answers("NVFP4A16", dtype, arith):
                layers = {name: case.weights[dtype] for name, case in found.items()}
                for name, layer in fused(layers, arith).items():
                    expected |= {f"{dtype}-{arith}@{name}@{kind}": tensor for kind, tensor in layer.tensors().items()}
    (FILES / "fused.safetensors").write_bytes(save(expected))


def write_real():
    """real.json: `dtype -> arith -> scheme -> tensor -> kind -> sha256`, and the hash of each input."""
    inputs, expected = {}, {}
    for dtype in minilm.STORED:
        weights = minilm.tensors(dtype)
        inputs[dtype] = {name: minilm.sha256(array.tobytes()) for name, array in weights.items()}
        expected[dtype] = {
            arith: {
                scheme: {name: hashes(oracle(array, scheme, arith)) for name, array in weights.items()}
                for scheme in REAL_SCHEMES if answers(scheme, dtype, arith)
            }
            for arith in ARITHS[dtype]
        }
    document = {"package": minilm.PACKAGE, "inputs": inputs, "expected": expected}
    (FILES / "real.json").write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def hashes(quantized: Quantized) -> dict[str, str]:
    return {kind: minilm.sha256(tensor.tobytes()) for kind, tensor in quantized.tensors().items()}


def write_checkpoints():
    """The small model and some of what becomes of it; expected.json: `dtype, shape, sha256` of every tensor."""
    made = {}
    for dtype, ariths in checkpoints.MADE.items():
        model = checkpoints.tensors(dtype)
        (CHECKPOINTS / f"source-{dtype}.safetensors").write_bytes(checkpoint_file(model))
        made[dtype] = {arith: {} for arith in ariths}
        for arith, schemes in ariths.items():
            for scheme in schemes:
                file = checkpoint_file(compressed(model, checkpoints.QUANTIZED, scheme, arith))
                made[dtype][arith][scheme] = summaries(file)
                if (dtype, arith) == ("bf16", "f32") and scheme in checkpoints.KEPT_WHOLE:
                    (CHECKPOINTS / f"{dtype}-{arith}-{scheme}.safetensors").write_bytes(file)
    minilm_file = minilm.fetched()
    model = load_file(minilm_file)
    modules = [name.removesuffix(".weight") for name in model if checkpoints.MINILM_QUANTIZED.fullmatch(name)]
    document = {
        "small": made,
        "minilm": {
            "package": minilm.PACKAGE,
            "source": minilm.sha256(minilm_file.read_bytes()),
            "made": {
                scheme: summaries(checkpoint_file(compressed(model, modules, scheme, "f32")))
                for scheme in checkpoints.MINILM_SCHEMES
            },
        },
    }
    (CHECKPOINTS / "expected.json").write_text(one_tensor_a_line(document) + "\n")


def checkpoint_file(tensors: dict) -> bytes:
    """As transformers saves it: by safetensors, `pt` in the metadata."""
    return save_torch({name: as_torch(tensor).contiguous() for name, tensor in tensors.items()}, {"format": "pt"})


def summaries(file: bytes) -> dict[str, dict]:
    return {
        name: {"dtype": tensor["dtype"], "shape": tensor["shape"], "sha256": minilm.sha256(tensor["data"])}
        for name, tensor in deserialize(file)
    }


def one_tensor_a_line(value, depth: int = 1) -> str:
    """JSON with sorted keys, in which an object that holds no other stands on one line."""
    if not isinstance(value, dict) or not any(isinstance(inner, dict) for inner in value.values()):
        return json.dumps(value, sort_keys=True)
    indent = " " * depth
    lines = [f"{indent}{json.dumps(key)}: {one_tensor_a_line(value[key], depth + 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent[1:]}}}"


def on_disk(weights: np.ndarray) -> np.ndarray:
    """bf16 as its bits in u16, which plain numpy can load."""
    return weights.view(np.uint16) if weights.dtype.name == "bfloat16" else weights


# -- the oracle -------------------------------------------------------------------------------------------------------

def oracle(weights: np.ndarray, scheme: str, arith: str, amax: float | None = None) -> Quantized:
    """`amax`: the greatest magnitude among the layers that share an NVFP4 global scale, if others do."""
    args = quantization_args(scheme)
    x = as_torch(weights).flatten(1)
    if scheme in cases.MICROSCALED + cases.RULED:
        return microscaled(x, scheme, arith, amax)
    scales, points, codes = {"f32": in_f32, "weight-dtype": in_weight_dtype}[arith](x, args)
    assert scales.isfinite().all() and (scales != 0).all(), f"{scheme} has no answer here"
    if args.type == "int" and not plain_bytes(scheme):
        codes = pack_to_int32(codes, args.num_bits)
    return Quantized(
        codes=codes.contiguous().view(torch.uint8).numpy(),
        scales=scales.float().numpy(),
        zero_points=None if args.symmetric else points.to(torch.int32).numpy(),
    )


def microscaled(x: torch.Tensor, scheme: str, arith: str, amax: float | None) -> Quantized:
    args = quantization_args(scheme)
    computed = x.float() if arith == "f32" else x
    if scheme == "NVFP4A16":
        made = microscaling.nvfp4(computed, args, None if amax is None else torch.tensor(amax, dtype=computed.dtype))
    else:
        made = microscaling.mx(computed, args, rule=scheme.partition(";mx=")[2] or "even")
        if x.dtype == torch.bfloat16 and scheme in cases.MX:
            as_it_is = microscaling.mx(x, args, rule="even")
            assert torch.equal(made.codes, as_it_is.codes) and torch.equal(made.scales, as_it_is.scales.float())
    assert made.scales.isfinite().all() and (made.scales != 0).all(), f"{scheme} has no answer here"
    return Quantized(
        codes=made.codes.numpy(),
        scales=made.scales.float().numpy(),
        global_scale=None if made.global_scale is None else made.global_scale.numpy(),
    )


def fused(layers: dict[str, np.ndarray], arith: str) -> dict[str, Quantized]:
    """NVFP4 of layers that share a global scale: that of the greatest magnitude among them."""
    magnitudes = {name: float(as_torch(weights).float().abs().max()) for name, weights in layers.items()}
    made = {name: oracle(weights, "NVFP4A16", arith, max(magnitudes.values())) for name, weights in layers.items()}
    # It is the least of their own, but for the 1.0 of an empty layer, which stands for an infinite one.
    least = min(oracle(layers[name], "NVFP4A16", arith).global_scale for name, greatest in magnitudes.items() if greatest)
    assert all(layer.global_scale == least for layer in made.values())
    return made


def in_weight_dtype(x: torch.Tensor, args: QuantizationArgs):
    """compressed-tensors on CPU as it is, with no zero point when symmetric."""
    scales, points = calculate_qparams(*extrema(x, args), args)
    return scales, points, quantize(x, scales, None if args.symmetric else points, args, dtype=args.pytorch_dtype())


def in_f32(x: torch.Tensor, args: QuantizationArgs):
    """The scale from the range in f32, rounded to the stored type and back; zero point and codes from that scale."""
    stored = torch.float32 if x.dtype == torch.float64 else x.dtype
    x = x.float()
    low, high = extrema(x, args)
    # `scale_dtype` makes compressed-tensors round the scale, and replace zero by the epsilon of that type.
    scales, points = calculate_qparams(low, high, args.model_copy(update={"scale_dtype": stored}))
    if not args.symmetric:
        points = points_from_stored_scale(low, high, scales, stored, args)
    return scales, points, quantize(x, scales, None if args.symmetric else points, args, dtype=args.pytorch_dtype())


def points_from_stored_scale(low, high, scales, stored, args):
    """The lines of `calculate_qparams`, which takes the scale before it is rounded, with the scale after it."""
    code_min, code_max = calculate_range(args, low.device)
    low, high = low.clamp(max=0), high.clamp(min=0)
    rounded = ((high - low) / (code_max - code_min)).to(stored).float()
    assert torch.equal(torch.where(rounded == 0, torch.finfo(stored).eps, rounded), scales)
    points = torch.clamp(code_min - low / rounded, code_min, code_max)
    # 0 / 0: what casting NaN to int8 makes on x86, said aloud.
    return round_to_quantized_type_dtype(points.nan_to_num(0), args.zp_dtype, cast_to_original_dtype=False)


def extrema(x: torch.Tensor, args: QuantizationArgs):
    """Least and greatest element per scale, in the shape that compressed-tensors gives that scale."""
    match args.strategy:
        case "tensor":
            parts, dims, keep = x.reshape(1, -1), 1, False
        case "channel":
            parts, dims, keep = x, 1, True
        case "group":
            parts, dims, keep = x.unflatten(-1, (-1, args.group_size)), 2, False
        case "block":
            height, width = args.block_structure
            padded = maybe_pad_tensor_for_block_quant(x, (height, width))
            parts = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
            dims, keep = (1, 3), False
    return parts.amin(dims, keepdim=keep), parts.amax(dims, keepdim=keep)


def as_torch(weights: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(weights, torch.Tensor):
        return weights
    if weights.dtype.name == "bfloat16":
        return torch.from_numpy(weights.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(weights)


# -- checkpoints ------------------------------------------------------------------------------------------------------

def compressed(model: dict[str, np.ndarray], modules, scheme: str, arith: str) -> dict:
    """The checkpoint with what compressed-tensors stores for each of `modules`, unless a group does not divide it."""
    group = quantization_args(scheme).group_size or 1
    written = dict(model)
    for module in modules:
        partners = next((found for found in checkpoints.FUSED if module in found), [module])
        amax = max(float(np.abs(model[f"{partner}.weight"].astype(np.float32)).max()) for partner in partners)
        if model[f"{module}.weight"].shape[1] % group == 0:
            state = {name.removeprefix(f"{module}."): model[name] for name in model if name.startswith(f"{module}.")}
            for name in state:
                del written[f"{module}.{name}"]
            written |= {f"{module}.{name}": tensor for name, tensor in compress(state, scheme, arith, amax).items()}
    return written


def compress(state: dict[str, np.ndarray], scheme: str, arith: str, amax: float) -> dict[str, torch.Tensor]:
    """A module's tensors by the `compress` of its format's compressor, given the oracle's scales and zero points.

    That quantizes in the type of the weights it is given: in `f32` they are widened, and the scale goes back to its
    stored type. `amax`: of all modules that share an NVFP4 global scale with this one, or its own.
    """
    expected = oracle(state["weight"], scheme, arith, amax)
    state = {name: as_torch(tensor) for name, tensor in state.items()}
    stored = state["weight"].dtype
    computed = torch.float32 if arith == "f32" else stored
    state |= {"weight": state["weight"].to(computed), "weight_scale": torch.from_numpy(expected.scales).to(computed)}
    if expected.zero_points is not None:
        state["weight_zero_point"] = torch.from_numpy(expected.zero_points).to(quantization_args(scheme).zp_dtype)
    if expected.global_scale is not None:
        state["weight_global_scale"] = torch.from_numpy(expected.global_scale)
    compressor = BaseCompressor.get_value_from_registry(compression_format(scheme))
    written = compressor.compress(state, quantization_scheme(scheme))
    if scheme not in cases.MICROSCALED:
        written["weight_scale"] = written["weight_scale"].to(stored)

    codes = written.get("weight", written.get("weight_packed")).contiguous().view(torch.uint8)
    assert np.array_equal(codes.numpy(), expected.codes), f"{scheme}: `compress` and `quantize` differ"
    scales = written["weight_scale"]
    scales = microscaling.as_scales(scales.int()) if scheme in cases.MX else scales.float()
    assert np.array_equal(scales.numpy(), expected.scales)
    return written


def compression_format(scheme: str) -> str:
    """A preset's by compressed-tensors' own rules, which know no plain int8 or FP8 for weights alone. Quarrel does."""
    if scheme in checkpoints.PRESETS:
        return infer_module_format(torch.nn.Linear, quantization_scheme(scheme)).value
    if scheme.startswith("fp8"):
        return "float-quantized"
    return "int-quantized" if plain_bytes(scheme) else "pack-quantized"


# -- schemes ----------------------------------------------------------------------------------------------------------

def quantization_args(scheme: str) -> QuantizationArgs:
    return quantization_scheme(scheme).weights


def quantization_scheme(scheme: str) -> QuantizationScheme:
    """A preset by compressed-tensors' own definition; `intN[-asym]/PART` and `fp8/PART` by the same words.

    The rule for an MX scale, `;mx=RULE`, is no word of compressed-tensors.
    """
    scheme = scheme.partition(";mx=")[0]
    plain = re.fullmatch(r"(?:int(?P<bits>\d)(?P<asym>-asym)?|fp8)/(?P<part>\w+)", scheme)
    if not plain:
        return preset_name_to_scheme(scheme, ["Linear"])
    part = plain["part"]
    if part in ("tensor", "channel"):
        granularity = {"strategy": part}
    elif part[0] == "g":
        granularity = {"strategy": "group", "group_size": int(part[1:])}
    else:
        granularity = {"strategy": "block", "block_structure": [int(side) for side in part[1:].split("x")]}
    args = QuantizationArgs(
        num_bits=int(plain["bits"] or 8), type="int" if plain["bits"] else "float", symmetric=not plain["asym"], **granularity
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def plain_bytes(scheme: str) -> bool:
    """Whether the codes are bytes of their own, as the format `int-quantized` has them, and not `pack-quantized`."""
    return scheme in ("W8A8", "INT8") or scheme.startswith("int8")


if __name__ == "__main__":
    main()
