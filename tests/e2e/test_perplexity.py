"""A language model still reads after a trip through the server: perplexity from dequantized weights.

The reference figures are a numpy quantizer's, run offline on the same text: scale = absmax / ((2^N - 1) / 2) of each
output channel, stored as f16; codes = round half even of the clamped weight / scale. On the weights as shipped (f16)
the perplexity is 92.89; a uniform guess over the vocabulary would be 1024.

`tests/data/tom_sawyer.txt` is 12,000 characters from Mark Twain's Tom Sawyer (public domain): characters 20,000 and on
of the copy in Debian's golang-github-klauspost-compress-dev, with `--` as an em dash, `"` as opening and closing quotes
in turn, and `'` as a closing one, as the model learned to read.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness import wire

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from demo.glass import Glass  # noqa: E402

TEXT = REPOSITORY / "tests" / "data" / "tom_sawyer.txt"

SHIPPED = 92.89
BY_SCHEME = {"int8": 92.99, "int4": 96.79, "int3": 111.78, "int2": 384.6}


@pytest.fixture(scope="module")
def glass():
    return Glass()


@pytest.fixture(scope="module")
def text():
    text = TEXT.read_text(encoding="utf-8")
    assert len(text) == 12_000
    return text


def test_the_shipped_weights_have_the_reference_perplexity(glass, text):
    """Otherwise a miss below would be the text's or the model's, not the quantizer's."""
    assert glass.perplexity(glass.layers(), text) == pytest.approx(SHIPPED, rel=0.001)


@pytest.mark.parametrize("scheme", BY_SCHEME)
def test_dequantized_weights_have_the_reference_perplexity(server, glass, text, scheme):
    start = time.perf_counter()
    layers = glass.layers()
    perplexity = glass.perplexity(through_the_server(server.location, scheme, layers), text)
    print(f"{scheme}: perplexity {perplexity:.2f}, expected {BY_SCHEME[scheme]}, {time.perf_counter() - start:.1f} s")
    assert perplexity == pytest.approx(BY_SCHEME[scheme], rel=0.01)


def through_the_server(location, scheme, layers):
    """`layers` quantized, and dequantized from exactly the rows that came back."""
    sent = [wire.layer_batch(name, array) for name, array in layers.items()]
    quantized = wire.exchange(location, {"quantize": {"scheme": scheme}}, sent).table
    assert quantized["layer_name"].to_pylist() == list(layers)
    assert set(quantized["status"].to_pylist()) == {"quantized"}
    assert set(quantized["dtype"].to_pylist()) == {"f16"}

    runs = wire.exchange(location, {"dequantize": {}}, quantized.to_batches()).table
    values = {name: [] for name in layers}
    for name, weights, shape in zip(runs["layer_name"], runs["weights"], runs["shape"]):
        assert shape.as_py() == list(layers[name.as_py()].shape)
        values[name.as_py()].append(weights.values.to_numpy())
    return {name: np.concatenate(values[name]).reshape(array.shape) for name, array in layers.items()}
