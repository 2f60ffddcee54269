"""The server's blocks equal ggml's, bit for bit, and so do the values that it reads in them. `ggml.py` says how the digests were made."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from golden import blocks, minilm
from harness import wire

DOCUMENT = json.loads((Path(__file__).resolve().parent / "files" / "ggml.json").read_text())
GOLDEN = DOCUMENT["layers"]
BY_IMPORTANCE = DOCUMENT["by_importance"]


@cache
def hard(dtype: str) -> dict[str, np.ndarray]:
    found = blocks.layers()
    if dtype != "f32":
        found = {"cubed": found["cubed"].astype(minilm.STORED[dtype])}
    return {f"{name}@{dtype}": weights for name, weights in found.items()}


@cache
def real() -> dict[str, np.ndarray]:
    return {f"{name}@f32": weights for name, weights in minilm.tensors("f32").items()}


def test_every_layer_and_type_has_its_digests():
    every = {name for dtype in ("f32", *blocks.NARROW) for name in hard(dtype)}
    assert set(GOLDEN) == every | set(real())
    assert all(set(GOLDEN[name]) == set(blocks.TYPES) for name in every)


@pytest.mark.parametrize("kind", blocks.TYPES)
@pytest.mark.parametrize("dtype", ["f32", *blocks.NARROW])
def test_hard_layers_become_ggmls_blocks(server, dtype, kind):
    check(server, hard(dtype), kind)


@pytest.mark.parametrize("kind", blocks.TYPES)
def test_real_layers_become_ggmls_blocks(server, kind):
    check(server, {name: weights for name, weights in real().items() if kind in GOLDEN[name]}, kind)


@pytest.mark.parametrize("kind", blocks.TYPES)
def test_any_blocks_read_as_ggml_reads_them(server, kind):
    foreign = blocks.any_blocks(kind)
    answered = wire.exchange(server.location, {"quantize": {"scheme": kind}}, [wire.layer_batch("x", np.ones((64, 2560), np.float32))])
    row, = answered.rows
    row |= {"quantized_data": foreign.tobytes(), "checksum": None}
    batch = pa.RecordBatch.from_pylist([row], schema=answered.schema)
    back = wire.exchange(server.location, {"dequantize": {}}, [batch])
    values = np.concatenate([weights.values.to_numpy() for batch in back.batches for weights in batch["weights"]])
    assert blocks.digest(blocks.numbers(values)) == DOCUMENT["any_values"][kind]


@pytest.mark.parametrize("kind", blocks.BY_IMPORTANCE)
@pytest.mark.parametrize("name", blocks.importances(1))
def test_hard_layers_become_ggmls_blocks_by_importance(server, name, kind):
    check_by_importance(server, blocks.layers(), kind, name, BY_IMPORTANCE[name][kind])


@pytest.mark.parametrize("kind", blocks.BY_IMPORTANCE)
def test_real_layers_become_ggmls_blocks_by_importance(server, kind):
    check_by_importance(server, minilm.tensors("f32"), kind, "squares", BY_IMPORTANCE["real"][kind])


def check_by_importance(server, layers: dict[str, np.ndarray], kind: str, name: str, expected: str):
    layers = blocks.fitting(kind, layers)
    batches = [
        wire.layer_batch(layer, weights, channels_per_row=4096, importance=blocks.importances(weights.shape[1])[name])
        for layer, weights in layers.items()
    ]
    reply = wire.exchange(server.location, {"quantize": {"scheme": kind}}, batches)
    values = decoded(server, reply)
    digest = blocks.digest(np.concatenate([np.frombuffer(bytes(reply.layer(layer).codes), np.uint8) for layer in layers]))
    for layer, weights in layers.items():
        check_quality(layer, reply.layer(layer), weights.reshape(-1), values[layer])
    assert digest == expected


def check(server, layers: dict[str, np.ndarray], kind: str):
    """Blocks, the values read in them, and what is said of those."""
    assert layers
    batches = [wire.layer_batch(name, weights, channels_per_row=4096) for name, weights in layers.items()]
    reply = wire.exchange(server.location, {"quantize": {"scheme": kind}}, batches)
    values = decoded(server, reply)
    for name, weights in layers.items():
        layer = reply.layer(name)
        for row in layer.rows:
            assert (row["status"], row["scheme"], row["scales"]) == ("quantized", kind, None), row["message"]
        assert minilm.sha256(bytes(layer.codes)) == GOLDEN[name][kind]["blocks"], f"{name}: other blocks"
        assert blocks.digest(values[name]) == GOLDEN[name][kind]["values"], f"{name}: other values"
        check_quality(name, layer, weights.astype(np.float32).reshape(-1), values[name])


def decoded(server, reply) -> dict[str, np.ndarray]:
    back = wire.exchange(server.location, {"dequantize": {}}, reply.batches)
    values = {}
    for batch in back.batches:
        for at, name in enumerate(batch["layer_name"].to_pylist()):
            values.setdefault(name, []).append(batch["weights"][at].values.to_numpy())
    return {name: np.concatenate(runs) for name, runs in values.items()}


def check_quality(name: str, layer, weights: np.ndarray, values: np.ndarray):
    """What is said of a layer follows from these very values."""
    said = layer.rows[-1]["layer_metrics"]
    x, y = weights.astype(np.float64), values.astype(np.float64)
    signal, noise = (x * x).sum(), ((x - y) ** 2).sum()
    assert said["elements"] == x.size, name
    assert said["max_abs_error"] == pytest.approx(np.abs(weights - values).max(), rel=1e-6), name
    assert said["mse"] == pytest.approx(noise / x.size, rel=1e-5), name
    if signal > 0 and noise > 0:
        assert said["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), abs=1e-4), name
    assert said["bits_per_weight"] == len(layer.codes) * 8 / x.size, name
