"""Codes, scales and values of bitsandbytes' formats equal its own, bit for bit. `bnb.py` says how the digests were made."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from golden import bnb
from harness import wire

GOLDEN = json.loads((Path(__file__).resolve().parent / "files" / "bitsandbytes.json").read_text())["layers"]


SIZES = [f"{book}/g{size}{double}" for double in ("", bnb.DOUBLE) for book in bnb.BOOKS for size in bnb.SIZES]
SCHEMES = [*SIZES, bnb.ROWS]


@cache
def layers(dtype: str) -> dict[str, np.ndarray]:
    return bnb.layers(dtype) | bnb.real(dtype)


def test_every_layer_has_its_digests():
    for dtype in bnb.DTYPES:
        for name, weights in layers(dtype).items():
            assert set(GOLDEN[f"{name}@{dtype}"]) == set(bnb.schemes(weights, dtype)), name


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", bnb.DTYPES)
def test_layers_become_what_bitsandbytes_makes_of_them(server, dtype, scheme):
    fitting = {name: weights for name, weights in layers(dtype).items() if scheme in GOLDEN[f"{name}@{dtype}"]}
    if not fitting:
        pytest.skip("LLM.int8 is of f16 alone")
    batches = [wire.layer_batch(name, weights, channels_per_row=100) for name, weights in fitting.items()]
    reply = wire.exchange(server.location, {"quantize": {"scheme": scheme}}, batches)
    back = wire.exchange(server.location, {"dequantize": {}}, reply.batches)
    values = {}
    for batch in back.batches:
        for at, name in enumerate(batch["layer_name"].to_pylist()):
            values.setdefault(name, []).append(batch["weights"][at].values.to_numpy())
    for name, weights in fitting.items():
        layer = reply.layer(name)
        assert {row["status"] for row in layer.rows} == {"quantized"}
        found = np.concatenate(values[name])
        check_quality(name, layer, weights.astype(np.float32).reshape(-1), found)
        codes = np.frombuffer(bytes(layer.codes), np.uint8)
        scales = np.asarray(layer.scales, np.float32)
        stored = nested(layer, scales) if scheme.endswith(bnb.DOUBLE) else [scales]
        assert bnb.digest(codes, *stored, found) == GOLDEN[f"{name}@{dtype}"][scheme], name


def nested(layer, scales: np.ndarray) -> list[np.ndarray]:
    """The layer's first row has the scales as they are stored; what its rows have is what these stand for."""
    first, *others = layer.rows
    assert not any(row["extra_tensors"] for row in others)
    names = [(tensor["name"], tensor["dtype"]) for tensor in first["extra_tensors"]]
    assert names == [("absmax", "u8"), ("nested_absmax", "f32"), ("nested_offset", "f32")]
    types = {"u8": np.uint8, "f32": np.float32}
    absmax, nested_absmax, offset = (np.frombuffer(tensor["data"], types[tensor["dtype"]]) for tensor in first["extra_tensors"])
    assert [tensor["shape"] for tensor in first["extra_tensors"]] == [[scales.size], [-(-scales.size // bnb.NESTED_BLOCK)], [1]]
    assert absmax.size == scales.size
    return [absmax, nested_absmax, offset]


def check_quality(name: str, layer, weights: np.ndarray, values: np.ndarray):
    """What is said of a layer follows from these very values; no number lies outside of the codes."""
    said = layer.rows[-1]["layer_metrics"]
    assert (said["elements"], said["saturated"]) == (weights.size, 0), name
    assert said["max_abs_error"] == pytest.approx(np.abs(weights - values).max(), rel=1e-6), name
    scales = np.asarray(layer.scales).size
    beside = 8 * scales + 32 * -(-scales // bnb.NESTED_BLOCK) + 32 if bnb.DOUBLE in layer.rows[0]["scheme"] else 32 * scales
    stored = len(layer.codes) * 8 + beside
    assert said["bits_per_weight"] == pytest.approx(stored / weights.size), name


