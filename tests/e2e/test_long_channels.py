"""Channels that the engine cuts: more than two stretches of 262,144 columns, and a last one that is no whole number of tiles."""

import numpy as np
import pyarrow.compute as pc
import pytest

from harness import oracle, wire
from harness.command import dequantize, quantize

COLUMNS = 2 * 262_144 + 2048 + 13 * 128
SCHEMES = {
    "int8": lambda x: oracle.integers(x, 8),
    "int3": lambda x: oracle.integers(x, 3),
    "int5-asym/tensor": lambda x: oracle.integers(x, 5, per_tensor=True, asymmetric=True),
    "W4A16": lambda x: oracle.integers(x, 4, group=128),
    "W4A16_ASYM": lambda x: oracle.integers(x, 4, group=128, asymmetric=True),
    "FP8_DYNAMIC": oracle.fp8,
    "FP8_BLOCK": lambda x: oracle.fp8(x, block=(128, 128)),
    "NVFP4A16": oracle.nvfp4,
    "MXFP6A16": lambda x: oracle.mx(x, 6),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_long_channel_is_coded_measured_and_decoded_as_the_formula_says(server, scheme):
    rng = np.random.default_rng(7)
    array = (rng.standard_normal((2, COLUMNS)) * np.exp2(rng.integers(-2, 3, (2, COLUMNS)))).astype(np.float32)
    # The greatest of each channel lie in different stretches.
    array[0, 300_000], array[1, -1] = 40.0, -41.0
    expected = SCHEMES[scheme](array)
    answer = wire.exchange(server.location, quantize(scheme), [wire.layer_batch("long", array)])
    layer = answer.layer("long")
    assert layer.codes == expected.data
    assert layer.scales.tobytes() == expected.scales.tobytes()
    for name, value in oracle.metrics(array, expected).items():
        assert layer.metrics[name] == pytest.approx(value, rel=2e-6), name
    reply = wire.exchange(server.location, dequantize(), answer.batches, schema=answer.schema)
    values = pc.list_flatten(reply.table["weights"]).to_numpy()
    assert np.array_equal(values, expected.values.ravel())


def test_the_clipping_of_a_long_channel_is_that_of_its_groups(server):
    """Groups know nothing of each other: the same ones in short channels have the same codes and scales."""
    array = np.random.default_rng(8).standard_normal((1, COLUMNS)).astype(np.float32)
    short = array.reshape(-1, 128)
    how = quantize("int4/g128;solver=mse")
    long = wire.exchange(server.location, how, [wire.layer_batch("long", array)]).layer("long")
    cut = wire.exchange(server.location, how, [wire.layer_batch("short", short)]).layer("short")
    assert (long.codes, long.scales.tobytes()) == (cut.codes, cut.scales.tobytes())
