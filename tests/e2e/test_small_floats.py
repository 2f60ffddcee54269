"""NVFP4 and MX where their numbers end, and the one number that divides all scales of an NVFP4 layer.

That a scheme gives the codes of its formula at all is `test_contract.py`'s.
"""

import json

import numpy as np
import pyarrow as pa
import pytest

from harness import oracle, wire
from harness.command import dequantize, encode, quantize, recipe

NVFP4 = "NVFP4A16"
MX = {f"MXFP{bits}A16;mx={rule}": (bits, rule) for bits in (4, 6, 8) for rule in ("even", "floor", "rceil")}
QUANTIZED, FAILED = "quantized", "failed"


def formula(scheme, array, amax=None):
    return oracle.nvfp4(array, amax) if scheme == NVFP4 else oracle.mx(array, *MX[scheme])


def weights(shape=(12, 64), seed=0, magnitude=1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * magnitude).astype(np.float32)


def magnitude(*arrays) -> float:
    return float(max(np.abs(array).max() for array in arrays))


def one_layer(server, how, array, **options):
    return wire.exchange(server.location, how, [wire.layer_batch("layer", array, **options)]).layer("layer")


def check_bits(layer, expected):
    """Codes and scales, to the sign of a zero."""
    assert {row["status"] for row in layer.rows} == {QUANTIZED}
    assert layer.codes == expected.data
    assert layer.scales.tobytes() == expected.scales.tobytes()
    assert (layer.global_scale is None) == (expected.global_scale is None)
    assert layer.global_scale is None or layer.global_scale.tobytes() == expected.global_scale.tobytes()


def decoded(server, answer) -> np.ndarray:
    """What the rows of an answer decode to, each sent by itself."""
    rows = [row for batch in answer.batches for row in wire.rows(batch)]
    reply = wire.exchange(server.location, dequantize(), rows, schema=answer.schema)
    return np.concatenate([np.asarray(row["weights"], np.float32) for row in reply.rows])


# -- numbers ----------------------------------------------------------------------------------------------------------

def ties() -> np.ndarray:
    """Half-way between codes of all kinds, and the next numbers on both sides, under scales that are powers of two."""
    steps = np.arange(0, 97, dtype=np.float32) / 16  # to 6
    near = np.concatenate([steps, np.nextafter(steps, np.float32(9)), np.nextafter(steps, np.float32(-1))])
    near = np.concatenate([near, -near])
    near = np.pad(near, (0, -len(near) % 15)).reshape(-1, 15)  # groups of 16, each with its greatest number
    tops = [np.insert(near, 0, top, axis=1) for top in (6, 4, 7.5, 3)]
    return np.concatenate(tops).reshape(-1, 32)


def powers(*mantissas) -> np.ndarray:
    """A channel for each power of two that is an f32 and each mantissa, and in it much that is smaller."""
    tops = np.ldexp(np.array(mantissas), np.arange(-149, 127)[:, None]).astype(np.float32).reshape(-1, 1)
    share = np.random.default_rng(1).uniform(-1, 1, (len(tops), 32)).astype(np.float32)
    share[:, ::3] *= np.float32(2.0**-10)
    share[:, 7] = 1
    return tops * share


EDGES = {
    "zeros": np.zeros((3, 32), np.float32),
    "zeros below zero": np.full((3, 32), -0.0, np.float32),
    "a zero below zero beside others": np.where(np.arange(96) % 3, weights((96,)), np.float32(-0.0)).reshape(3, 32),
    "the least number": np.full((3, 32), -(2.0**-149), np.float32),
    "tiny numbers below zero": np.where(np.arange(96) % 32, np.float32(-1e-30), np.float32(1)).reshape(3, 32),
    "ties": ties(),
    "powers of two": powers(1.0),
    "mantissas where rules differ": powers(1.25, 1.5, 1.7499999, 1.75, 1.875, 1.9375, 1.999),
}


@pytest.mark.parametrize("scheme", [NVFP4, *MX])
@pytest.mark.parametrize("edge", EDGES)
def test_codes_and_scales_at_the_edges_are_those_of_the_formula(server, edge, scheme):
    array = EDGES[edge]
    expected = formula(scheme, array)
    answer = wire.exchange(server.location, quantize(scheme), [wire.layer_batch("layer", array)])
    layer = answer.layer("layer")
    check_bits(layer, expected)
    assert decoded(server, answer).tobytes() == expected.values.tobytes()
    for key, value in oracle.metrics(array, expected).items():
        assert layer.metrics[key] == (None if value is None else pytest.approx(value, rel=1e-6)), key


@pytest.mark.parametrize("scheme", [NVFP4, *MX])
def test_the_greatest_numbers_have_codes_too(server, scheme):
    """Some round up to more than an f32 holds, and decode to infinity."""
    array = weights((4, 64), magnitude=2.0**125)
    array[1, 5], array[2, 7] = np.finfo(np.float32).max, -np.finfo(np.float32).max
    expected = formula(scheme, array)
    answer = wire.exchange(server.location, quantize(scheme), [wire.layer_batch("layer", array)])
    check_bits(answer.layer("layer"), expected)
    assert decoded(server, answer).tobytes() == expected.values.tobytes()


@pytest.mark.parametrize("scheme", [NVFP4, *MX, "int8"])
def test_metrics_are_never_nan(server, scheme):
    array = np.full((2, 32), np.finfo(np.float32).min)
    metrics = one_layer(server, quantize(scheme), array).metrics
    assert not [name for name, value in metrics.items() if value is not None and np.isnan(value)]


def test_ties_under_a_scale_of_one_go_to_the_even_code(server):
    array = ties()
    expected = oracle.nvfp4(array, 6 * 448)
    assert expected.global_scale == 1
    check_bits(one_layer(server, quantize(NVFP4, amax=6 * 448), array), expected)


@pytest.mark.parametrize("power", [-149, -140, -127, -126, -118, -100, 0, 50, 100, 120])
def test_a_global_scale_follows_the_magnitude_of_its_layer(server, power):
    array = (weights() * 2.0**power).astype(np.float32)
    check_bits(one_layer(server, quantize(NVFP4), array), oracle.nvfp4(array))


# -- the global scale and amax ----------------------------------------------------------------------------------------

def test_layers_with_one_amax_have_one_global_scale(server):
    layers = {name: weights(seed=seed, magnitude=4.0**seed) for seed, name in enumerate("qkv")}
    amax = magnitude(*layers.values())
    batches = [wire.layer_batch(name, array) for name, array in layers.items()]
    reply = wire.exchange(server.location, quantize(NVFP4, amax=amax), batches)
    for name, array in layers.items():
        check_bits(reply.layer(name), oracle.nvfp4(array, amax))
    assert len({reply.layer(name).global_scale.item() for name in layers}) == 1


@pytest.mark.parametrize("amax", [4.0, 5, 0.1 + 60, 1e10, 1e38, float(np.finfo(np.float32).max)])
def test_an_amax_above_the_layers_own_makes_another_global_scale(server, amax):
    array = np.clip(weights(), -4, 4)
    for how in (quantize(NVFP4, amax=amax), encode(quantize(NVFP4, amax=amax))):
        layer = one_layer(server, how, array)
        check_bits(layer, oracle.nvfp4(array, amax))
        assert layer.rows[0]["scheme"] == NVFP4


def test_an_amax_that_is_the_layers_own_changes_nothing(server):
    array = weights()
    given = one_layer(server, quantize(NVFP4, amax=magnitude(array)), array)
    assert given.rows == one_layer(server, quantize(NVFP4), array).rows


def test_an_amax_whose_global_scale_would_be_zero_makes_it_one(server):
    """Its reciprocal is below all numbers of f16."""
    how = quantize(NVFP4, amax=1e8, arith="weight-dtype")
    layer = one_layer(server, how, weights().astype(np.float16))
    assert layer.global_scale.tolist() == [1.0]
    assert layer.metrics["mse"] is not None and layer.metrics["max_abs_error"] > 0


def test_an_amax_of_zero_is_one_of_layers_of_zeros(server):
    zeros = np.zeros((3, 32), np.float32)
    check_bits(one_layer(server, quantize(NVFP4, amax=0), zeros), oracle.nvfp4(zeros))


def test_each_rule_has_its_amax(server):
    rules = [{"targets": ["a.*"], "scheme": NVFP4, "amax": 5.0}, {"targets": ["b.*"], "scheme": NVFP4, "amax": 50.0},
             {"targets": ["*"], "scheme": NVFP4}]
    layers = {name: np.clip(weights(seed=seed), -5, 5) for seed, name in enumerate(("a.q", "b.q", "c.q", "a.k"))}
    for how in (recipe(*rules), encode(recipe(*rules))):
        reply = wire.exchange(server.location, how, [wire.layer_batch(name, array) for name, array in layers.items()])
        for name, amax in {"a.q": 5.0, "a.k": 5.0, "b.q": 50.0, "c.q": None}.items():
            check_bits(reply.layer(name), oracle.nvfp4(layers[name], amax))


@pytest.mark.parametrize("how", [quantize(NVFP4, amax=60.1), recipe({"targets": ["*"], "scheme": NVFP4, "amax": 60.1})])
def test_the_effective_command_has_the_amax_and_means_the_same(server, how):
    batches = [wire.layer_batch("layer", weights())]
    first = wire.exchange(server.location, how, batches)
    echo = json.loads(first.schema_metadata["quarrel.command"])["quantize"]
    said = echo["recipe"]["rules"][0] if "recipe" in echo else echo
    assert np.float32(said["amax"]) == np.float32(60.1)
    again = wire.exchange(server.location, {"quantize": echo}, batches)
    assert (again.rows, again.schema_metadata) == (first.rows, first.schema_metadata)


@pytest.mark.parametrize("cut", [None, 5, 1, [0, 0, 3, 9], [11, 0, 1]], ids=str)
@pytest.mark.parametrize("amax", [None, 60.0])
def test_the_row_with_the_first_channel_has_the_global_scale_and_no_other_row(server, amax, cut):
    array = weights()
    how = quantize(NVFP4, **{} if amax is None else {"amax": amax})
    answer = wire.exchange(server.location, how, wire.rows(wire.layer_batch("layer", array, channels_per_row=cut)))
    layer = answer.layer("layer")
    check_bits(layer, oracle.nvfp4(array, amax))
    channels = np.array([len(row["quantized_data"]) // 32 for row in layer.rows])
    first = int(np.argmax(channels > 0))
    assert [row["extra_tensors"] is not None for row in layer.rows] == [at == first for at in range(len(channels))]
    assert [len(row["scales"]) for row in layer.rows] == (channels * 4).tolist()
    assert decoded(server, answer).tobytes() == oracle.nvfp4(array, amax).values.tobytes()


# Commands that the server refuses, and words of what it says.
REFUSED = [
    (quantize("int8", amax=1.0), "option_conflict", ["`amax`", "`int8`"]),
    (quantize("MXFP4A16", amax=1.0), "option_conflict", ["`amax`", "`MXFP4A16`"]),
    (quantize("FP8_DYNAMIC", amax=0), "option_conflict", ["`amax`"]),
    (recipe({"targets": ["*"], "scheme": "W4A16", "amax": 1.0}), "option_conflict", ["`amax`", "`W4A16`"]),
    ({"quantize": {"profile": "edge", "amax": 1.0}}, "option_conflict", ["`amax`", "profile"]),
    (recipe({"targets": ["*"], "scheme": NVFP4}, amax=1.0), "option_conflict", ["`amax`", "recipe"]),
    (quantize(NVFP4, amax=-1.0), "option_invalid", ["`amax`", "-1"]),
    (quantize(NVFP4, amax="NaN"), "option_invalid", ["`amax`", "NaN"]),
    (quantize(NVFP4, amax="Infinity"), "option_invalid", ["`amax`", "inf"]),
    (quantize(NVFP4, amax=1e39), "option_invalid", ["`amax`"]),
    (encode(quantize(NVFP4, amax=float("nan"))), "option_invalid", ["`amax`", "NaN"]),
    (recipe({"targets": ["*"], "scheme": NVFP4, "amax": -0.5}), "option_invalid", ["`amax`", "-0.5"]),
    (quantize(NVFP4, amax="much"), "command_malformed", ["amax"]),
    (quantize(NVFP4, group_size=16), "option_conflict", ["group_size", f"`{NVFP4}`"]),
    (quantize("MXFP6A16;mx=floor", group_size=64), "option_conflict", ["group_size", "`MXFP6A16;mx=floor`"]),
    (quantize(f"{NVFP4}/g16"), "scheme_unknown", [f"`{NVFP4}/g16`"]),
    (quantize(f"{NVFP4};mx=even"), "scheme_unknown", [f"`{NVFP4};mx=even`"]),
    (quantize("MXFP4A16;mx=ceil"), "scheme_unknown", ["mx=ceil"]),
    (quantize("MXFP4A16;mx=floor;channel_dims=2"), "scheme_unknown", ["channel_dims"]),
]


@pytest.mark.parametrize("how, reason, says", REFUSED, ids=lambda value: str(value)[:70])
def test_an_option_that_cannot_be_is_refused_by_its_name(server, how, reason, says):
    code, found, message = wire.failure(server.location, how, [wire.layer_batch("layer", weights())])
    assert (code, found) == ("INVALID_ARGUMENT", reason), message
    assert not [word for word in says if word not in message], message


@pytest.mark.parametrize("scheme, columns, group", [(NVFP4, 24, 16), ("MXFP4A16", 48, 32), ("MXFP8A16", 31, 32)])
def test_columns_that_groups_do_not_divide_are_refused(server, scheme, columns, group):
    batch = wire.layer_batch("layer", weights((4, columns)))
    code, reason, message = wire.failure(server.location, quantize(scheme), [batch])
    assert (code, reason) == ("INVALID_ARGUMENT", "group_size_indivisible")
    assert "`layer`" in message and str(columns) in message and str(group) in message


@pytest.mark.parametrize("scheme, canonical", [
    ("MXFP6A16;mx=even", "MXFP6A16"), ("MXFP6A16;channel_dims=2;mx=floor", "MXFP6A16;channel_dims=2;mx=floor"),
    ("MXFP8A16;channel_dims=1;mx=rceil", "MXFP8A16;mx=rceil"), (f"{NVFP4};channel_dims=2", f"{NVFP4};channel_dims=2")])
def test_a_scheme_is_named_in_its_canonical_form(server, scheme, canonical):
    array = weights((3, 4, 64))
    layer = one_layer(server, quantize(scheme), array)
    assert {row["scheme"] for row in layer.rows} == {canonical}
    flat = array.reshape(12 if "channel_dims=2" in canonical else 3, -1)
    name, rule = canonical.partition(";")[0], canonical.partition("mx=")[2] or "even"
    check_bits(layer, formula(NVFP4 if name == NVFP4 else f"{name};mx={rule}", flat))


# -- faults, and when rows are answered -------------------------------------------------------------------------------

def test_a_weight_above_the_amax_ends_the_stream(server):
    array = weights()
    array[7, 3] = -60.25
    batch = wire.layer_batch("layer", array, channels_per_row=3)
    code, reason, message = wire.failure(server.location, quantize(NVFP4, amax=60), [batch])
    assert (code, reason) == ("INVALID_ARGUMENT", "amax_exceeded")
    assert "`layer`" in message and "60.25" in message and " 60" in message
    check_bits(one_layer(server, quantize(NVFP4, amax=60.25), array), oracle.nvfp4(array, 60.25))


def test_a_weight_above_the_amax_fails_its_rows_where_the_command_goes_on(server):
    arrays = {"a": np.clip(weights(), -4, 4), "b": np.clip(weights(seed=1), -4, 4)}
    arrays["a"][7, 3] = 4.5
    batches = [wire.layer_batch(name, array, channels_per_row=3) for name, array in arrays.items()]
    reply = wire.exchange(server.location, quantize(NVFP4, amax=4, on_error="continue"), batches)
    rows = reply.layer("a").rows
    assert [row["status"] for row in rows] == [QUANTIZED, QUANTIZED, FAILED, QUANTIZED]
    assert (rows[2]["reason"], rows[2]["quantized_data"]) == ("amax_exceeded", None)
    assert "`a`" in rows[2]["message"] and "4.5" in rows[2]["message"]
    good = oracle.nvfp4(arrays["a"], 4)
    assert b"".join(row["quantized_data"] or bytes(3 * 32) for row in rows[:2]) == good.data[:6 * 32]
    assert rows[0]["extra_tensors"] and not any(row["extra_tensors"] for row in rows[1:])
    assert rows[-1]["layer_metrics"] is None
    check_bits(reply.layer("b"), oracle.nvfp4(arrays["b"], 4))
    assert (reply.summary["layers_quantized"], reply.summary["layers_failed"]) == (1, 1)


@pytest.mark.parametrize("amax, failed", [(None, [0, 1, 2, 3]), (60.0, [3])])
def test_a_layer_waits_for_its_last_row_unless_an_amax_is_given(server, amax, failed):
    """A number that is none fails what depends on it: all rows, as all have a share in the global scale; or its own."""
    array = weights()
    array[11, 63] = np.nan
    how = quantize(NVFP4, on_error="continue", **{} if amax is None else {"amax": amax})
    reply = wire.exchange(server.location, how, wire.rows(wire.layer_batch("layer", array, channels_per_row=3)))
    rows = reply.layer("layer").rows
    assert [at for at, row in enumerate(rows) if row["status"] == FAILED] == failed
    assert {row["reason"] for row in rows if row["status"] == FAILED} == {"non_finite"}
    assert all(f" {array.size - 1} " in rows[at]["message"] for at in failed)


def test_a_row_is_answered_before_the_next_comes_if_an_amax_is_given(server):
    array = weights()
    sent = wire.rows(wire.layer_batch("layer", array, channels_per_row=3))
    reply = wire.lockstep(server.location, quantize(NVFP4, amax=60.0), sent)
    check_bits(reply.layer("layer"), oracle.nvfp4(array, 60.0))


def test_what_waits_has_room_in_layer_bytes_max_or_is_refused(fresh_server):
    server = fresh_server("--layer-bytes-max", 1 << 20)
    array = weights((1024, 512))
    batch = wire.layer_batch("layer", array, channels_per_row=64)
    code, reason, message = wire.failure(server.location, quantize(NVFP4), wire.rows(batch))
    assert (code, reason) == ("INVALID_ARGUMENT", "span_too_large") and "`layer`" in message
    amax = magnitude(array)
    reply = wire.exchange(server.location, quantize(NVFP4, amax=amax), wire.rows(batch))
    check_bits(reply.layer("layer"), oracle.nvfp4(array, amax))


# -- ladders ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("amax", [None, 100.0])
@pytest.mark.parametrize("least", [10, 18.7, 25, 35])
def test_a_ladder_goes_from_small_floats_to_larger(server, amax, least):
    array = weights((16, 256))
    rungs = ["MXFP4A16", NVFP4, "MXFP6A16", "int8"]
    formulas = {"MXFP4A16": oracle.mx(array, 4), NVFP4: oracle.nvfp4(array, amax), "MXFP6A16": oracle.mx(array, 6),
                "int8": oracle.integers(array, 8)}
    quality = [oracle.metrics(array, formulas[rung])["sqnr_db"] for rung in rungs]
    expected = next(rung for rung, found in zip(rungs, quality, strict=True) if found >= least)
    fallback = {"schemes": rungs[1:], "sqnr_db_min": least}
    how = quantize(rungs[0], fallback=fallback, **{} if amax is None else {"amax": amax})
    layer = one_layer(server, how, array, channels_per_row=7)
    assert {row["scheme"] for row in layer.rows} == {expected}, quality
    check_bits(layer, formulas[expected])


# -- rows that come back ----------------------------------------------------------------------------------------------

def tensor(name="weight_global_scale", dtype="f32", shape=(1,), data=np.float32(1).tobytes()):
    return [{"name": name, "dtype": dtype, "shape": list(shape), "data": data}]


# What stands in `extra_tensors` of the first row, and a word of what is said of it.
GLOBALS = {
    "none": (None, "weight_global_scale"),
    "an empty list": ([], "weight_global_scale"),
    "another tensor": (tensor(name="weight"), "weight_global_scale"),
    "two bytes": (tensor(data=b"ab"), "2 bytes"),
    "eight bytes": (tensor(shape=(2,), data=bytes(8)), "8 bytes"),
    "zero": (tensor(data=bytes(4)), "0"),
    "below zero": (tensor(data=np.float32(-3).tobytes()), "-3"),
    "NaN": (tensor(data=np.float32(np.nan).tobytes()), "NaN"),
    "infinite": (tensor(data=np.float32(np.inf).tobytes()), "inf"),
    "so small that a scale over it is infinite": (tensor(data=np.float32(1e-40).tobytes()), "a finite quotient"),
}


@pytest.mark.parametrize("extra, says", GLOBALS.values(), ids=GLOBALS)
def test_a_global_scale_that_cannot_be_is_refused(server, extra, says):
    answer = wire.exchange(server.location, quantize(NVFP4), [wire.layer_batch("layer", weights())])
    [row] = answer.batches
    at = row.schema.get_field_index("extra_tensors")
    row = row.set_column(at, row.schema.field(at), pa.array([extra], row.schema.field(at).type))
    code, reason, message = wire.failure(server.location, dequantize(), [row])
    assert (code, reason) == ("INVALID_ARGUMENT", "row_inconsistent")
    assert "`layer`" in message and says in message, message


def test_a_global_scale_that_the_caller_sets_counts(server):
    """Half of it is twice the weights."""
    array = weights()
    answer = wire.exchange(server.location, quantize(NVFP4), [wire.layer_batch("layer", array, channels_per_row=5)])
    expected = oracle.nvfp4(array)
    rows = pa.Table.from_batches(answer.batches).combine_chunks()
    at = rows.schema.get_field_index("extra_tensors")
    half = tensor(data=(expected.global_scale / np.float32(2)).tobytes())
    rows = rows.set_column(at, rows.schema.field(at), pa.array([half, None, None], rows.schema.field(at).type))
    reply = wire.exchange(server.location, dequantize(), rows.to_batches())
    found = np.concatenate([np.asarray(row["weights"], np.float32) for row in reply.rows])
    assert np.array_equal(found, expected.values.ravel() * np.float32(2))


@pytest.mark.parametrize("scheme", ["MXFP4A16", "MXFP6A16", "MXFP8A16"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused(server, scheme, scale):
    answer = wire.exchange(server.location, quantize(scheme), [wire.layer_batch("layer", weights((1, 32)))])
    [row] = answer.batches
    at = row.schema.get_field_index("scales")
    row = row.set_column(at, row.schema.field(at), pa.array([[scale]], row.schema.field(at).type))
    _, reason, _ = wire.failure(server.location, dequantize(), [row])
    assert reason == "row_inconsistent"


@pytest.mark.parametrize("scheme", [NVFP4, "MXFP6A16;mx=even"])
def test_only_nvfp4_needs_the_column_of_extra_tensors(server, scheme):
    array = weights()
    answer = wire.exchange(server.location, quantize(scheme), [wire.layer_batch("layer", array)])
    [row] = [batch.drop_columns(["extra_tensors"]) for batch in answer.batches]
    if scheme == NVFP4:
        assert wire.failure(server.location, dequantize(), [row])[1] == "row_inconsistent"
    else:
        reply = wire.exchange(server.location, dequantize(), [row])
        assert np.array_equal(reply.rows[0]["weights"], formula(scheme, array).values.ravel())
