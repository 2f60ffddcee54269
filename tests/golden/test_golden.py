"""The server's bytes equal compressed-tensors', bit for bit: codes, scales, zero points and NVFP4's global scales.

README.md says what the files hold and how they were made.
"""

import json
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from golden import minilm
from harness import wire

FILES = Path(__file__).resolve().parent / "files"
KINDS = ("codes", "scales", "zero_points", "global_scale")
# A real layer comes in several rows, whole blocks of FP8_BLOCK each, so that no message grows past a few MiB of results.
CHANNELS_PER_ROW = 4096


def adversarial():
    """(dtype, arith, scheme); f32 in both modes against one file, because there they are one."""
    for path in sorted(FILES.glob("*-*.safetensors")):
        dtype, made_by = path.stem.split("-", 1)
        for arith in ("f32", "weight-dtype") if dtype == "f32" else (made_by,):
            for scheme in sorted({key.split("@")[0] for key in load(path)}):
                yield pytest.param(dtype, arith, scheme, id=f"{dtype}-{arith}-{scheme}")


def real():
    """(dtype, arith, scheme), as above."""
    for dtype, ariths in document()["expected"].items():
        for arith in ("f32", "weight-dtype"):
            for scheme in ariths.get(arith, ariths["f32"]):
                yield pytest.param(dtype, arith, scheme, id=f"{dtype}-{arith}-{scheme}")


def fused():
    """(dtype, arith) of the layers that share a global scale; f32 as above."""
    for made_by in sorted({key.split("@")[0] for key in load(FILES / "fused.safetensors")}):
        dtype, arith = made_by.split("-", 1)
        for arith in ("f32", "weight-dtype") if dtype == "f32" else (arith,):
            yield pytest.param(dtype, arith, id=f"{dtype}-{arith}")


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    return load_file(path)


@cache
def document() -> dict:
    return json.loads((FILES / "real.json").read_text())


@pytest.mark.parametrize("dtype, arith, scheme", list(adversarial()))
def test_adversarial_layers_equal_compressed_tensors(server, dtype, arith, scheme):
    made_by = "f32" if dtype == "f32" else arith
    expected = {}
    for key, tensor in load(FILES / f"{dtype}-{made_by}.safetensors").items():
        of_scheme, case, kind = key.split("@")
        if of_scheme == scheme:
            expected.setdefault(case, {})[kind] = tensor
    layers = {case: adversarial_input(case, dtype) for case in expected}

    found = quantized(server, {"scheme": scheme, "arith": arith}, layers)

    for case, tensors in expected.items():
        for kind in KINDS:
            check(f"{case}, {dtype}, {arith}, {scheme}: {kind}", found[case][kind], tensors.get(kind))


@pytest.mark.parametrize("dtype, arith", list(fused()))
def test_layers_with_a_common_amax_equal_those_that_compressed_tensors_fuses(server, dtype, arith):
    made_by = "f32" if dtype == "f32" else arith
    expected = {}
    for key, tensor in load(FILES / "fused.safetensors").items():
        of, case, kind = key.split("@")
        if of == f"{dtype}-{made_by}":
            expected.setdefault(case, {})[kind] = tensor
    layers = {case: adversarial_input(case, dtype) for case in expected}
    amax = max(float(np.abs(weights.astype(np.float32)).max()) for weights in layers.values())

    found = quantized(server, {"scheme": "NVFP4A16", "arith": arith, "amax": amax}, layers)

    for case, tensors in expected.items():
        for kind in KINDS:
            check(f"{case}, {dtype}, {arith}, amax {amax}: {kind}", found[case][kind], tensors.get(kind))


@pytest.mark.parametrize("dtype, arith, scheme", list(real()))
def test_real_layers_equal_compressed_tensors(server, dtype, arith, scheme):
    ariths = document()["expected"][dtype]
    expected = ariths.get(arith, ariths["f32"])[scheme]
    layers = real_inputs(dtype)
    assert set(layers) == set(expected)

    found = quantized(server, {"scheme": scheme, "arith": arith}, layers, channels_per_row=CHANNELS_PER_ROW)

    for layer, hashes in expected.items():
        for kind in KINDS:
            got = found[layer][kind]
            got = None if got is None else minilm.sha256(got.tobytes())
            assert got == hashes.get(kind), f"{layer}, {dtype}, {arith}, {scheme}: {kind} differ"


def adversarial_input(case: str, dtype: str) -> np.ndarray:
    weights = load(FILES / "inputs.safetensors")[f"{case}@{dtype}"]
    return weights.view(ml_dtypes.bfloat16) if dtype == "bf16" else weights


@cache
def real_inputs(dtype: str) -> dict[str, np.ndarray]:
    """The weights, known to be those that the golden hashes were made from."""
    weights = minilm.tensors(dtype)
    hashes = {name: minilm.sha256(array.tobytes()) for name, array in weights.items()}
    assert hashes == document()["inputs"][dtype], "not the weights that real.json was made from"
    return weights


def quantized(server, quantize: dict, layers, **rows) -> dict[str, dict]:
    """All layers through one exchange: arrays by layer and kind, None for null."""
    batches = [wire.layer_batch(name, weights, **rows) for name, weights in layers.items()]
    reply = wire.exchange(server.location, {"quantize": quantize}, batches)
    found = {}
    for name in layers:
        layer = reply.layer(name)
        for row in layer.rows:
            assert row["status"] == "quantized", f"{name}: {row['status']}, {row['reason']}, {row['message']}"
        symmetric = all(row["zero_points"] is None for row in layer.rows)
        found[name] = {
            "codes": np.frombuffer(layer.codes, np.uint8),
            "scales": layer.scales,
            "zero_points": None if symmetric else layer.zero_points,
            "global_scale": global_scale(layer),
        }
    return found


def global_scale(layer: wire.Layer) -> np.ndarray | None:
    """What the first row of a layer carries beside its codes and scales, and no other row does."""
    first, *others = [row["extra_tensors"] for row in layer.rows]
    assert not any(others), "extra_tensors on a row that does not begin the layer"
    if not first:
        return None
    tensor, = first
    assert (tensor["name"], tensor["dtype"], tensor["shape"]) == ("weight_global_scale", "f32", [1])
    return np.frombuffer(tensor["data"], "<f4")


def check(what: str, got: np.ndarray | None, expected: np.ndarray | None):
    """Equal bits, or a failure that names the first index that differs."""
    if expected is None or got is None:
        assert got is expected, f"{what} are {got}, expected {expected}"
        return
    assert got.dtype == expected.dtype and got.size == expected.size, (
        f"{what} are {got.size} of {got.dtype}, expected {expected.size} of {expected.dtype}"
    )
    got = got.reshape(expected.shape)
    bits = np.dtype(f"u{expected.itemsize}")
    different = np.argwhere(got.view(bits) != expected.view(bits))
    if len(different):
        first = tuple(int(index) for index in different[0])
        pytest.fail(
            f"{what} differ at {len(different)} of {expected.size}, first at {list(first)}: "
            f"{got[first]!r}, expected {expected[first]!r}",
            pytrace=False,
        )
