"""The column `importance`: which layers and runs it belongs to, and what is refused. That blocks are ggml's is `tests/golden/test_ggml.py`'s."""

import numpy as np
import pyarrow as pa
import pytest

from harness import wire

COLUMNS = 256


def weights(shape=(12, COLUMNS), seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def counts(columns=COLUMNS, seed=0) -> np.ndarray:
    return np.square(np.random.default_rng(100 + seed).standard_normal(columns)).astype(np.float32)


def one(server, how, batch):
    return wire.exchange(server.location, {"quantize": how}, [batch]).layer("layer")


def blocks(server, array, importance, scheme="Q4_K", **options) -> bytes:
    layer = one(server, {"scheme": scheme}, wire.layer_batch("layer", array, importance=importance, **options))
    assert {row["status"] for row in layer.rows} == {"quantized"}
    return bytes(layer.codes)


def said(batch, *numbers) -> pa.RecordBatch:
    """The batch, whose rows say these."""
    at = batch.schema.get_field_index("importance")
    column = pa.array([None if row is None else list(row) for row in numbers], pa.list_(pa.float32()))
    return batch.set_column(at, "importance", column)


@pytest.mark.parametrize("scheme", ["Q4_0", "Q5_1", "Q3_K", "Q4_K", "IQ4_NL"])
def test_runs_of_a_layer_share_what_its_first_row_says(server, scheme):
    array, importance = weights(), counts()
    whole = blocks(server, array, importance, scheme)
    assert blocks(server, array, importance, scheme, channels_per_row=[1, 4, 7]) == whole
    assert blocks(server, array, None, scheme) != whole
    runs = wire.layer_batch("layer", array, importance=importance, channels_per_row=6)
    assert bytes(one(server, {"scheme": scheme}, said(runs, importance, importance)).codes) == whole


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float32(), COLUMNS)])
def test_lists_of_any_kind(server, kind):
    array, importance = weights(), counts()
    batch = wire.layer_batch("layer", array, importance=importance)
    at = batch.schema.get_field_index("importance")
    batch = batch.set_column(at, "importance", pa.array([importance], kind))
    assert bytes(one(server, {"scheme": "Q4_K"}, batch).codes) == blocks(server, array, importance)


def test_layers_of_one_stream_have_their_own(server):
    arrays = {f"layer.{index}": weights(seed=index) for index in range(3)}
    batches = [
        wire.layer_batch(name, array, importance=counts(seed=index), channels_per_row=5)
        for index, (name, array) in enumerate(arrays.items())
    ]
    # The middle one says nothing.
    batches[1] = said(batches[1], *[None] * batches[1].num_rows)
    reply = wire.exchange(server.location, {"quantize": {"scheme": "Q6_K"}}, batches)
    for index, (name, array) in enumerate(arrays.items()):
        alone = blocks(server, array, None if index == 1 else counts(seed=index), "Q6_K")
        assert bytes(reply.layer(name).codes) == alone, name


def test_experts_have_one_for_all_or_each_their_own(server):
    array = weights((3, 8, COLUMNS))
    how = {"scheme": "Q4_K", "channel_dims": 2}
    each = [counts(seed=expert) for expert in range(3)]
    apart = b"".join(blocks(server, matrix, importance) for matrix, importance in zip(array, each))
    batch = wire.layer_batch("layer", array, importance=np.concatenate(each))
    assert bytes(one(server, how, batch).codes) == apart
    shared = b"".join(blocks(server, matrix, each[0]) for matrix in array)
    assert bytes(one(server, how, wire.layer_batch("layer", array, importance=each[0])).codes) == shared


@pytest.mark.parametrize("scheme", ["Q5_0", "Q3_K"])
def test_a_channel_of_many_stretches(server, scheme):
    """Longer than what one thread takes at a time; `Q5_0` weighs by the mean of the whole channel."""
    columns = (1 << 18) * 2 + 512
    array, importance = weights((2, columns)), counts(columns)
    whole = blocks(server, array, importance, scheme)
    twice = wire.exchange(server.location, {"quantize": {"scheme": scheme}}, [
        wire.layer_batch(f"layer.{channel}", array[channel:channel + 1], importance=importance) for channel in range(2)
    ])
    assert b"".join(bytes(twice.layer(f"layer.{channel}").codes) for channel in range(2)) == whole


def test_a_ladder_goes_by_it_where_a_rung_does(server):
    array, importance = weights(), counts()
    how = {"scheme": "Q2_K", "fallback": {"schemes": ["Q8_0"], "sqnr_db_min": 40}}
    layer = one(server, how, wire.layer_batch("layer", array, importance=importance))
    assert {row["scheme"] for row in layer.rows} == {"Q8_0"}
    how["fallback"]["sqnr_db_min"] = 1
    layer = one(server, how, wire.layer_batch("layer", array, importance=importance))
    assert bytes(layer.codes) == blocks(server, array, importance, "Q2_K")


def test_it_is_nothing_to_a_kept_layer(server):
    how = {"recipe": {"rules": [{"targets": ["other"], "scheme": "Q4_K"}]}}
    for numbers in (counts(7), [None]):
        layer = one(server, how, said(wire.layer_batch("layer", weights(), importance=counts(7)), numbers))
        assert {row["status"] for row in layer.rows} == {"kept"}


NAN = float("nan")
REFUSED = {
    "too few": ("Q4_K", counts(COLUMNS - 1), ("255", "expected 256")),
    "too many": ("Q4_K", counts(2 * COLUMNS), ("512", "expected 256")),
    "none": ("Q4_K", [], ("0 numbers",)),
    "below zero": ("Q4_K", [-1.0] * COLUMNS, ("`importance` 0 is -1", "from 0 to 1e15")),
    "not a number": ("Q4_K", [1.0, NAN] * 128, ("`importance` 1 is NaN",)),
    "too large": ("Q4_K", [2e15] * COLUMNS, ("from 0 to 1e15",)),
    "infinite": ("Q4_K", [float("inf")] * COLUMNS, ("inf",)),
    "a null": ("Q4_K", [1.0] * 9 + [None] + [1.0] * 246, ("`importance` 9 of row 0 is null",)),
    "integers": ("int8", counts(), ("scheme `int8` does not go by `importance`",)),
    "a type that ggml weighs nothing in": ("Q8_0", counts(), ("scheme `Q8_0`", "Q4_K")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said(server, case):
    scheme, importance, words = REFUSED[case]
    batch = said(wire.layer_batch("layer", weights(), importance=counts()), importance)
    with pytest.raises(pa.ArrowInvalid) as caught:
        one(server, {"scheme": scheme}, batch)
    message = str(caught.value)
    assert "[importance_invalid]" in message and "`layer`" in message
    assert all(word in message for word in words), message


def test_a_layer_whose_importance_is_wrong_may_fail_alone(server):
    batches = [
        wire.layer_batch("short", weights(), importance=counts(7)),
        said(wire.layer_batch("null", weights(), importance=counts()), [1.0, None] * 128),
        wire.layer_batch("layer", weights(), importance=counts()),
    ]
    reply = wire.exchange(server.location, {"quantize": {"scheme": "Q4_K", "on_error": "continue"}}, batches)
    for bad in ("short", "null"):
        assert [(row["status"], row["reason"]) for row in reply.layer(bad).rows] == [("failed", "importance_invalid")]
    assert bytes(reply.layer("layer").codes) == blocks(server, weights(), counts())


def test_runs_that_say_different_things_are_refused(server):
    runs = wire.layer_batch("layer", weights(), importance=counts(), channels_per_row=6)
    for numbers in ((counts(), counts(seed=1)), (None, counts())):
        with pytest.raises(pa.ArrowInvalid, match="importance_invalid.*not that of its first run"):
            one(server, {"scheme": "Q4_K"}, said(runs, *numbers))


def test_a_column_of_another_type_is_refused(server):
    batch = wire.layer_batch("layer", weights(), importance=counts())
    at = batch.schema.get_field_index("importance")
    batch = batch.set_column(at, "importance", pa.array([counts()], pa.list_(pa.float64())))
    with pytest.raises(pa.ArrowInvalid, match="column_type.*expected a list of float32"):
        one(server, {"scheme": "Q4_K"}, batch)


def test_numbers_far_beyond_are_no_blocks_of_zeros(server):
    """Squares that f32 does not hold: an error, whatever the columns count."""
    array = weights() * np.float32(1e22)
    for scheme in ("Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL"):
        for importance in (counts(), np.zeros(COLUMNS, np.float32)):
            with pytest.raises(pa.ArrowInvalid, match="scale_overflow"):
                blocks(server, array, importance, scheme)
