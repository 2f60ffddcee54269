"""The same bits for a layer however it is cut, whoever shares its stream, and whatever computes it.

The reference is one row, on one thread, with scalar code. Everything else must equal it: codes, scales, zero points,
a global scale, the layer's metrics, and what all that decodes to.
"""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from harness import wire
from harness.command import dequantize, quantize
from harness.server import Server

SCHEMES = [
    "int8", "int8-asym", "int8/tensor", "int4-asym/tensor", "int3", "int5-asym/g32", "W4A16", "W4A16_ASYM", "W8A16",
    "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "fp8/b96x100", "NVFP4A16", "NVFP4A16 amax", "MXFP4A16", "MXFP6A16", "MXFP8A16",
    "MXFP4A16;mx=rceil", "MXFP6A16;mx=floor", "MXFP8A16;mx=floor", "int4/g128;solver=mse", "int3-asym/tensor;solver=mse",
    "int4-asym/g64;solver=hqq", "int4/tensor;solver=hqq", "nf4;double_quant=true",
    "Q8_0", "Q4_1", "Q3_K", "Q4_K", "IQ4_NL", "NVFP4",
]
# Above all numbers of all layers here, and not what a layer would have by itself.
AMAX = 1000.0
# More than two blocks of 1 MiB, and no whole number of spans of 128 or 96 channels.
SHAPE = (700, 1024)
FEATURES = {"scalar": [], "avx2": ["avx2", "bmi2"], "avx512": ["avx512f", "avx512bw", "avx512dq", "avx512vl"]}
HARDWARE = [(level, threads) for level in FEATURES for threads in (1, 2)]


def weights(dtype="f32", seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(SHAPE) * np.exp2(rng.integers(-6, 7, (SHAPE[0], 1)))
    return array.astype(np.float32).astype(wire.BINARY_DTYPES[dtype])


def random_runs(seed) -> list[int]:
    """Channel counts that add up to the layer."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, SHAPE[0]), 12, replace=False))
    return np.diff([0, *cuts, SHAPE[0]]).tolist()


DECODED = ("f32", "bf16", "f16")
ARRAYS = {dtype: weights(dtype) for dtype in ("f32", "bf16", "f16")}
# How the rows are cut, and how rows share batches.
CHUNKINGS = {
    "one row": (None, 1),
    "a row a channel, one batch": (1, 10**6),
    "a row a channel, a batch each": (1, 1),
    "random runs, a batch each": (random_runs(1), 1),
    "random runs, five a batch": (random_runs(2), 5),
    "two halves": (350, 1),
}


def batches(name, dtype, cut, rows_per_batch):
    whole = wire.layer_batch(name, ARRAYS[dtype], channels_per_row=cut)
    return [whole.slice(at, rows_per_batch) for at in range(0, whole.num_rows, rows_per_batch)]


def how(scheme: str) -> dict:
    """The command; `NVFP4A16 amax` is the scheme with a greatest magnitude that is given."""
    name, _, amax = scheme.partition(" ")
    return quantize(name, **{"amax": AMAX} if amax else {})


def decoded(server, answer, dtype) -> bytes:
    reply = wire.exchange(server.location, dequantize(dtype=dtype), answer.batches, schema=answer.schema)
    values = reply.table["weights"]
    return pc.list_flatten(values).to_numpy().tobytes() if dtype == "f32" else b"".join(values.to_pylist())


def bits(layer) -> tuple:
    return (*layer.bits, layer.extra_tensors, layer.metrics, layer.table["scheme"].unique().to_pylist())


@pytest.fixture(scope="module")
def reference():
    """Bits of every scheme and element type: one row, one thread, scalar."""
    server = Server.start("--cpu-level", "scalar", "--threads", 1)

    def computed(scheme, dtype):
        return bits(wire.exchange(server.location, how(scheme), batches("x", dtype, None, 1)).layer("x"))

    found = {(scheme, dtype): computed(scheme, dtype) for scheme in SCHEMES for dtype in ARRAYS}
    server.end()
    return found


@pytest.fixture(scope="module")
def reference_values():
    """What a layer decodes to, in one row, on one thread, scalar."""
    server = Server.start("--cpu-level", "scalar", "--threads", 1)
    found = {}
    for scheme in SCHEMES:
        answer = wire.exchange(server.location, how(scheme), batches("x", "f32", None, 1))
        found |= {(scheme, dtype): decoded(server, answer, dtype) for dtype in DECODED}
    server.end()
    return found


@pytest.fixture(scope="module", params=HARDWARE, ids=lambda given: f"{given[0]}-{given[1]}")
def hardware(request):
    """A server for each CPU level and thread count."""
    level, threads = request.param
    known = Path("/proc/cpuinfo").read_text().split()
    missing = [feature for feature in FEATURES[level] if feature not in known]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    server = Server.start("--cpu-level", level, "--threads", threads)
    yield server
    server.end()


@pytest.mark.parametrize("dtype", ARRAYS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layers_bits_do_not_depend_on_its_cutting_nor_on_the_hardware(hardware, reference, scheme, dtype):
    for name, (cut, rows_per_batch) in CHUNKINGS.items():
        reply = wire.exchange(hardware.location, how(scheme), batches("x", dtype, cut, rows_per_batch))
        assert bits(reply.layer("x")) == reference[scheme, dtype], name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoded_bits_do_not_depend_on_the_cutting_nor_on_the_hardware(hardware, reference_values, scheme):
    for cut in (1, random_runs(5)):
        answer = wire.exchange(hardware.location, how(scheme), batches("x", "f32", cut, 7))
        for dtype in DECODED:
            assert decoded(hardware, answer, dtype) == reference_values[scheme, dtype], (cut, dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layers_bits_do_not_depend_on_the_others_in_its_stream(server, reference, scheme):
    small = np.linspace(-1, 1, 3 * 1024, dtype=np.float32).reshape(3, 1024)
    sent = [
        wire.layer_batch("before", small, channels_per_row=1), *batches("x", "f32", 100, 3),
        wire.layer_batch("between", small), *batches("y", "f32", None, 1), wire.layer_batch("after", small),
    ]
    reply = wire.exchange(server.location, how(scheme), sent)
    assert bits(reply.layer("x")) == bits(reply.layer("y")) == reference[scheme, "f32"]
    alone = wire.exchange(server.location, how(scheme), [wire.layer_batch("between", small)]).layer("between")
    for name in ("before", "between", "after"):
        assert bits(reply.layer(name)) == bits(alone), name


@pytest.mark.parametrize("scheme", ["int8", "W4A16_ASYM", "FP8_DYNAMIC", "MXFP4A16", "MXFP6A16", "NVFP4A16 amax"])
def test_each_batch_is_answered_before_the_next_is_sent(server, reference, scheme):
    reply = wire.lockstep(server.location, how(scheme), batches("x", "f32", random_runs(3), 2))
    assert bits(reply.layer("x")) == reference[scheme, "f32"]


@pytest.mark.parametrize("scheme, span", [
    ("FP8_BLOCK", 128), ("fp8/b96x100", 96), ("int8/tensor", SHAPE[0]), ("NVFP4A16", SHAPE[0]), ("NVFP4A16 amax", 1)])
def test_a_span_is_answered_when_it_is_complete(server, reference, scheme, span):
    sent = batches("x", "f32", span, 1)
    reply = wire.lockstep(server.location, how(scheme), sent)
    assert bits(reply.layer("x")) == reference[scheme, "f32"]


def test_a_scale_stands_in_the_first_row_that_it_covers(server):
    def lengths(scheme):
        reply = wire.exchange(server.location, how(scheme), batches("x", "f32", 50, 4))
        return [len(row["scales"]) for row in reply.layer("x").rows]

    assert lengths("int8") == [50] * 14
    assert lengths("W4A16") == [50 * 8] * 14
    assert lengths("int8/tensor") == [1] + [0] * 13
    assert lengths("NVFP4A16") == lengths("NVFP4A16 amax") == [50 * 64] * 14
    assert lengths("MXFP6A16") == [50 * 32] * 14
    # A block row of 8 scales begins at channels 0, 128, 256, 384, 512, 640.
    assert lengths("FP8_BLOCK") == [8, 0, 8, 0, 0, 8, 0, 8, 0, 0, 8, 0, 8, 0]


def test_runs_of_a_layer_carry_their_own_metrics(server):
    reply = wire.exchange(server.location, quantize("int8"), batches("x", "f32", random_runs(4), 1))
    rows = reply.layer("x").rows
    elements = [row["metrics"]["elements"] for row in rows]
    assert sum(elements) == rows[-1]["layer_metrics"]["elements"] == ARRAYS["f32"].size
    errors = sum(row["metrics"]["mse"] * count for row, count in zip(rows, elements, strict=True))
    assert errors / ARRAYS["f32"].size == pytest.approx(rows[-1]["layer_metrics"]["mse"], rel=1e-9)
