"""What SPEC.md promises of one exchange: columns, numbers, metadata, and which layers a command quantizes."""

import json

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

from harness import command, oracle, wire
from harness.command import dequantize, quantize, recipe

METRICS = ["elements", "mse", "sqnr_db", "cosine", "max_abs_error", "amax", "saturated", "bits_per_weight"]
COLUMNS = {
    "layer_name": pa.string(), "status": pa.string(), "reason": pa.string(), "message": pa.string(),
    "quantized_data": pa.large_binary(), "scales": pa.list_(pa.float32()), "zero_points": pa.list_(pa.int32()),
    "extra_tensors": ["name", "dtype", "shape", "data"], "dtype": pa.string(), "shape": pa.list_(pa.int64()),
    "scheme": pa.string(), "bit_width": pa.uint8(), "metrics": METRICS, "layer_metrics": METRICS,
    "checksum": pa.uint32(),
}
# Every kind of scheme: the command's words, and the oracle's.
SCHEMES = {
    "int8": lambda x: oracle.integers(x, 8),
    "int8/tensor": lambda x: oracle.integers(x, 8, per_tensor=True),
    "int8-asym": lambda x: oracle.integers(x, 8, asymmetric=True),
    "int7": lambda x: oracle.integers(x, 7),
    "int6": lambda x: oracle.integers(x, 6),
    "int5-asym": lambda x: oracle.integers(x, 5, asymmetric=True),
    "int4/g32": lambda x: oracle.integers(x, 4, group=32),
    "int3-asym/g64": lambda x: oracle.integers(x, 3, group=64, asymmetric=True),
    "int3": lambda x: oracle.integers(x, 3),
    "int2-asym/tensor": lambda x: oracle.integers(x, 2, per_tensor=True, asymmetric=True),
    "int2": lambda x: oracle.integers(x, 2),
    "W4A16": lambda x: oracle.integers(x, 4, group=128),
    "W4A16_ASYM": lambda x: oracle.integers(x, 4, group=128, asymmetric=True),
    "W8A16": lambda x: oracle.integers(x, 8, group=128, packing="dense"),
    "W8A8": lambda x: oracle.integers(x, 8),
    "INT8": lambda x: oracle.integers(x, 8),
    "FP8": lambda x: oracle.fp8(x, per_tensor=True),
    "FP8_DYNAMIC": oracle.fp8,
    "FP8_BLOCK": lambda x: oracle.fp8(x, block=(128, 128)),
    "fp8/tensor": lambda x: oracle.fp8(x, per_tensor=True),
    "fp8/channel": oracle.fp8,
    "fp8/b64x32": lambda x: oracle.fp8(x, block=(64, 32)),
    "NVFP4A16": oracle.nvfp4,
    "MXFP4A16": lambda x: oracle.mx(x, 4),
    "MXFP6A16": lambda x: oracle.mx(x, 6),
    "MXFP8A16": lambda x: oracle.mx(x, 8),
    "MXFP4A16;mx=floor": lambda x: oracle.mx(x, 4, "floor"),
    "MXFP6A16;mx=floor": lambda x: oracle.mx(x, 6, "floor"),
    "MXFP8A16;mx=floor": lambda x: oracle.mx(x, 8, "floor"),
    "MXFP4A16;mx=rceil": lambda x: oracle.mx(x, 4, "rceil"),
    "MXFP6A16;mx=rceil": lambda x: oracle.mx(x, 6, "rceil"),
    "MXFP8A16;mx=rceil": lambda x: oracle.mx(x, 8, "rceil"),
}
SMALL_FLOATS = [scheme for scheme in SCHEMES if scheme.startswith(("NV", "MX"))]
DTYPES = wire.BINARY_DTYPES
W8 = quantize("int8")


def weights(shape=(130, 256), dtype="f32", seed=0) -> np.ndarray:
    """Numbers of several magnitudes, with zeros, ties and both signs at the ends of their range."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape) * np.exp2(rng.integers(-3, 4, (shape[0], *[1] * (len(shape) - 1))))
    array.reshape(-1)[::17] = 0
    array.reshape(-1)[::11] = np.round(array.reshape(-1)[::11] * 4) / 4
    return array.astype(np.float32).astype(DTYPES[dtype])


def one_layer(server, how, array, name="layer", **options):
    return wire.exchange(server.location, how, [wire.layer_batch(name, array, **options)]).layer(name)


# -- columns and metadata ---------------------------------------------------------------------------------------------

def test_the_reply_has_the_columns_of_the_contract_and_no_others(server):
    schema = wire.exchange(server.location, W8, [wire.layer_batch("layer", weights())]).schema
    assert schema.names == list(COLUMNS)
    for name, expected in COLUMNS.items():
        found = schema.field(name).type
        if isinstance(expected, list):
            struct = found.value_type if pa.types.is_list(found) else found
            assert [struct.field(index).name for index in range(struct.num_fields)] == expected, name
        else:
            assert found == expected, name


def test_every_row_in_is_a_row_out_in_order(server):
    layers = {"a": (weights((4, 32)), 1), "b": (weights((6, 32), "bf16"), [3, 2, 1]), "c": (weights((5, 32)), None)}
    sent, expected = [], []
    for name, (array, per_row) in layers.items():
        batch = wire.layer_batch(name, array, channels_per_row=per_row)
        sent += wire.rows(batch)
        expected += [(name, list(array.shape), wire_dtype(array))] * batch.num_rows
    reply = wire.exchange(server.location, W8, [uniform(batch) for batch in sent])
    assert [(row["layer_name"], row["shape"], row["dtype"]) for row in reply.rows] == expected
    assert {row["status"] for row in reply.rows} == {"quantized"}
    assert {(row["reason"], row["message"], row["extra_tensors"]) for row in reply.rows} == {(None, None, None)}


def wire_dtype(array) -> str:
    return next(key for key, value in DTYPES.items() if value == array.dtype)


def uniform(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with binary weights, so that layers of several types can share a stream."""
    if "dtype" in batch.schema.names:
        return batch
    data = [np.asarray(row, np.float32).tobytes() for row in batch["weights"].to_pylist()]
    columns = {
        "layer_name": batch["layer_name"], "weights": pa.array(data, pa.large_binary()),
        "dtype": pa.array(["f32"] * len(data)), "shape": batch["shape"],
    }
    return pa.RecordBatch.from_pydict(columns)


def test_the_schema_says_what_was_understood(server):
    batch = wire.layer_batch("layer", weights())
    first = wire.exchange(server.location, quantize("W4A16", group_size=64), [batch])
    assert set(first.schema_metadata) == {"quarrel.command", "quarrel.version", "quarrel.level"}
    assert first.schema_metadata["quarrel.level"] in ("scalar", "avx2", "avx512")
    echo = first.schema_metadata["quarrel.command"]
    again = wire.exchange(server.location, echo.encode(), [batch])
    assert again.schema_metadata == first.schema_metadata, "the effective command is not its own effect"
    assert again.layer("layer").bits == first.layer("layer").bits
    assert json.loads(echo)["quantize"]


def test_every_batch_reports_progress_and_an_empty_one_closes(server):
    arrays = [weights((4, 64), seed=seed) for seed in range(3)]
    batches = [wire.layer_batch(f"layer{index}", array, channels_per_row=2) for index, array in enumerate(arrays)]
    reply = wire.exchange(server.location, W8, batches)
    assert all(progress is not None for progress in reply.metadata)
    for key in ("rows", "layers", "bytes_in", "bytes_out"):
        counts = [progress[key] for progress in reply.metadata]
        assert counts == sorted(counts), key
    rows = np.cumsum([batch.num_rows for batch in reply.batches]).tolist()
    assert [progress["rows"] for progress in reply.metadata] == rows
    last, summary = reply.metadata[-1], reply.summary
    assert (last["rows"], last["layers"], last["bytes_in"]) == (6, 3, sum(array.nbytes for array in arrays))
    assert [summary[f"layers_{status}"] for status in ("quantized", "kept", "failed")] == [3, 0, 0]
    assert all(summary[key] == last[key] for key in ("rows", "bytes_in", "bytes_out"))
    assert summary["elements"] == sum(array.size for array in arrays)
    assert summary["bits_per_weight"] == pytest.approx(8 + 32 / 64)
    quality = {row["layer_name"]: row["layer_metrics"]["sqnr_db"] for row in reply.rows if row["layer_metrics"]}
    worst = min(quality, key=quality.get)
    assert (summary["worst_layer"], summary["worst_sqnr_db"]) == (worst, quality[worst])
    assert min(summary.get("queue_seconds", 0), summary.get("kernel_seconds", 0), summary["total_seconds"]) >= 0


COMMANDS = [
    quantize("W4A16", group_size=32),
    quantize("int4/g64", arith="weight-dtype", on_error="continue", on_indivisible="keep", return_kept=True),
    quantize("int2", fallback={"schemes": ["int4", "int8"], "sqnr_db_min": 20.0, "cosine_min": 0.5}),
    quantize("NVFP4A16", amax=64.5, on_indivisible="keep"),
    {"quantize": {"profile": "edge"}},
    recipe(
        {"targets": ["re:lay", "*.q"], "scheme": "int4", "group_size": 32, "on_indivisible": "keep"},
        {"targets": ["*"], "scheme": "int8"}, ignore=["@standard", "other"],
    ),
    recipe({"targets": ["layer"], "scheme": "NVFP4A16", "amax": 100.0, "channel_dims": 1}),
]


@pytest.mark.parametrize("how", COMMANDS, ids=json.dumps)
def test_a_command_means_the_same_in_protobuf_and_in_json(server, how):
    batches = [wire.layer_batch("layer", weights())]
    first = wire.exchange(server.location, how, batches)
    for form in (command.encode(how), b" \n\t" + json.dumps(how, indent=1).encode()):
        reply = wire.exchange(server.location, form, batches)
        assert reply.rows == first.rows
        assert reply.schema_metadata == first.schema_metadata


# -- numbers ----------------------------------------------------------------------------------------------------------

def check_numbers(layer, array, expected):
    assert layer.codes == expected.data
    assert np.array_equal(layer.scales, expected.scales)
    if expected.zero_points is None:
        assert all(row["zero_points"] is None for row in layer.rows)
    else:
        assert np.array_equal(layer.zero_points, expected.zero_points)
    assert (layer.global_scale is None) == (expected.global_scale is None)
    assert layer.global_scale is None or layer.global_scale == expected.global_scale
    assert [row["checksum"] for row in layer.rows] == [oracle.crc32c(row["quantized_data"]) for row in layer.rows]
    for key, value in oracle.metrics(array, expected).items():
        assert layer.metrics[key] == (None if value is None else pytest.approx(value, rel=1e-6)), key


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_gives_the_codes_of_its_formula(server, scheme):
    array = weights()
    layer = one_layer(server, quantize(scheme), array)
    check_numbers(layer, array, SCHEMES[scheme](array))
    assert layer.rows[0]["metrics"] == layer.metrics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "W4A16_ASYM", "FP8_BLOCK", "NVFP4A16", "MXFP6A16"])
def test_every_element_type_is_read_exactly(server, scheme, dtype):
    array = weights((20, 256), dtype)
    layer = one_layer(server, quantize(scheme), array, dtype=dtype)
    check_numbers(layer, array, SCHEMES[scheme](array))
    assert {row["dtype"] for row in layer.rows} == {dtype}


@pytest.mark.parametrize("scheme", ["int8", "W4A16", "FP8_DYNAMIC", *SMALL_FLOATS])
def test_bits_per_weight_counts_codes_and_scales(server, scheme):
    array = weights()
    expected = SCHEMES[scheme](array)
    bits = 8 * len(expected.data) + expected.scale_bits * len(expected.scales)
    bits += 0 if expected.global_scale is None else 32
    reply = wire.exchange(server.location, quantize(scheme), [wire.layer_batch("layer", array, channels_per_row=100)])
    assert reply.layer("layer").metrics["bits_per_weight"] == pytest.approx(bits / array.size)
    assert reply.summary["bits_per_weight"] == pytest.approx(bits / array.size)
    assert reply.summary["bytes_out"] == bits // 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scheme_of_a_row_is_parsed_back_to_itself(server, scheme):
    array = weights()
    first = one_layer(server, quantize(scheme), array)
    again = one_layer(server, quantize(first.rows[0]["scheme"]), array)
    assert again.rows == first.rows


def test_a_layer_of_higher_rank_is_rows_of_its_flattened_rest(server):
    array = weights((6, 4, 8, 8))
    layer = one_layer(server, quantize("W4A16"), array)
    check_numbers(layer, array, oracle.integers(array.reshape(6, 256), 4, group=128))
    check_numbers(one_layer(server, quantize("NVFP4A16"), array), array, oracle.nvfp4(array.reshape(6, 256)))
    for how in (quantize("int8", channel_dims=2), command.encode(quantize("int8", channel_dims=2))):
        check_numbers(one_layer(server, how, array), array, oracle.integers(array.reshape(24, 64), 8))


def test_a_row_without_a_shape_is_one_channel(server):
    array = weights((1, 256))
    layer = one_layer(server, W8, array, shape=wire.NO_SHAPE)
    check_numbers(layer, array, oracle.integers(array, 8))


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_multiplies_codes_by_scales_and_rounds_once(server, scheme, dtype):
    array = weights()
    batch = wire.layer_batch("layer", array, channels_per_row=[50, 1, 79])
    answer = wire.exchange(server.location, quantize(scheme), [batch])
    reply = wire.exchange(server.location, dequantize(dtype=dtype), answer.batches, schema=answer.schema)
    expected = SCHEMES[scheme](array).values
    assert reply.table.column_names == ["layer_name", "weights", *["dtype"] * (dtype != "f32"), "shape"]
    assert {(row["layer_name"], tuple(row["shape"])) for row in reply.rows} == {("layer", array.shape)}
    found = values_of(reply, dtype)
    assert np.array_equal(found.astype(np.float32), expected.ravel().astype(DTYPES[dtype]).astype(np.float32))


def values_of(reply, dtype="f32") -> np.ndarray:
    if dtype == "f32":
        assert reply.table.schema.field("weights").type == pa.large_list(pa.float32())
        return np.concatenate([np.asarray(row["weights"], np.float32) for row in reply.rows])
    assert reply.table.schema.field("weights").type == pa.large_binary()
    return np.frombuffer(b"".join(row["weights"] for row in reply.rows), DTYPES[dtype])


def test_dequantize_answers_in_whole_channels_of_about_2_mib(server):
    array = weights((2048, 1024))
    answer = wire.exchange(server.location, quantize("int2"), [wire.layer_batch("layer", array)])
    reply = wire.exchange(server.location, dequantize(), answer.batches, schema=answer.schema)
    sizes = [len(row) * 4 for row in reply.table["weights"]]
    assert sum(sizes) == array.nbytes
    assert all(size % (1024 * 4) == 0 and size <= 4 << 20 for size in sizes)
    assert np.array_equal(values_of(reply), oracle.integers(array, 2).values.ravel())


# -- forms of input ---------------------------------------------------------------------------------------------------

NAME_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()),
              pa.dictionary(pa.int8(), pa.large_string())]


@pytest.mark.parametrize("type", NAME_TYPES, ids=str)
def test_names_come_in_any_text_type(server, type):
    arrays = {name: weights((4, 32), seed=len(name)) for name in ("a", "a longer name than twelve bytes", "ü")}
    batches = [wire.layer_batch(name, array) for name, array in arrays.items()]
    joined = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    renamed = joined.set_column(0, "layer_name", joined["layer_name"].cast(type))
    reply = wire.exchange(server.location, W8, [renamed])
    for name, array in arrays.items():
        check_numbers(reply.layer(name), array, oracle.integers(array, 8))


def flat(array):
    return pa.array(array.reshape(-1))


def tensors(array):
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(array.dtype), array.shape)
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(flat(array), array.size))


WEIGHT_TYPES = {
    "list": lambda x: pa.ListArray.from_arrays(pa.array([0, x.size], pa.int32()), flat(x)),
    "large_list": lambda x: pa.LargeListArray.from_arrays(pa.array([0, x.size], pa.int64()), flat(x)),
    "fixed_size_list": lambda x: pa.FixedSizeListArray.from_arrays(flat(x), x.size),
    "fixed_shape_tensor": tensors,
    "binary": lambda x: pa.array([x.tobytes()], pa.binary()),
    "large_binary": lambda x: pa.array([x.tobytes()], pa.large_binary()),
}


@pytest.mark.parametrize("dtype", ["f16", "f32", "f64"])
@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_weights_come_in_any_list_tensor_or_binary_type(server, kind, dtype):
    array = weights((4, 32), dtype)
    columns = {"layer_name": pa.array(["layer"]), "weights": WEIGHT_TYPES[kind](array)}
    if "binary" in kind:
        columns["dtype"] = pa.array([dtype])
    if kind != "fixed_shape_tensor":  # whose type is its shape
        columns["shape"] = pa.array([list(array.shape)], pa.list_(pa.int64()))
    layer = wire.exchange(server.location, W8, [pa.RecordBatch.from_pydict(columns)]).layer("layer")
    check_numbers(layer, array, oracle.integers(array, 8))
    assert layer.rows[0]["shape"] == list(array.shape)


def test_a_null_shape_counts_as_absent(server):
    array = weights((1, 64))
    batch = wire.layer_batch("layer", array)
    batch = batch.set_column(batch.schema.get_field_index("shape"), "shape", pa.array([None], pa.list_(pa.int64())))
    layer = wire.exchange(server.location, W8, [batch]).layer("layer")
    check_numbers(layer, array, oracle.integers(array, 8))


# -- which layers, and how --------------------------------------------------------------------------------------------

ALL8 = {"targets": ["*"], "scheme": "int8"}
KEPT, QUANTIZED = "kept", "quantized"
# command, layer's name, its shape; status, reason, bit width.
CHOICES = [
    (W8, "lm_head.weight", (4, 64), QUANTIZED, None, 8),
    (W8, "conv.weight", (4, 8, 3, 3), QUANTIZED, None, 8),
    (W8, "bias", (64,), KEPT, "rank_1", None),
    (recipe(ALL8, ignore=["@standard"]), "model.embed_tokens.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "model.decoder.embed_positions.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "shared.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "model.layers.0.mlp.shared_expert.up_proj.weight", (4, 64), QUANTIZED, None, 8),
    (recipe(ALL8, ignore=["@standard"]), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "lm_head.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "model.layers.0.input_layernorm.weight", (64,), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "model.layers.0.mlp.gate.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["@standard"]), "model.layers.0.mlp.gate_proj.weight", (4, 64), QUANTIZED, None, 8),
    (recipe(ALL8, ignore=["model.q"]), "model.q.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["model.q.weight"]), "model.q.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["model.*"]), "model.q.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["re:model\\.[pq]"]), "model.q.weight", (4, 64), KEPT, "ignored", None),
    (recipe(ALL8, ignore=["re:odel"]), "model.q.weight", (4, 64), QUANTIZED, None, 8),
    (recipe({"targets": ["model.q"], "scheme": "int4"}, ALL8), "model.q.weight", (4, 64), QUANTIZED, None, 4),
    (recipe(ALL8, {"targets": ["model.q"], "scheme": "int4"}), "model.q.weight", (4, 64), QUANTIZED, None, 8),
    (recipe({"targets": ["model.p"], "scheme": "int4"}), "model.q.weight", (4, 64), KEPT, "unmatched", None),
    (recipe({"targets": ["Linear"], "scheme": "int4"}), "model.q.weight", (4, 64), QUANTIZED, None, 4),
    (recipe({"targets": ["Linear"], "scheme": "int4"}), "model.embed_tokens.weight", (4, 64), KEPT, "unmatched", None),
    (recipe({"targets": ["Linear"], "scheme": "int4"}), "conv.weight", (4, 4, 4, 4), KEPT, "unmatched", None),
    (recipe({"targets": ["norm"], "scheme": "int8"}), "norm", (64,), QUANTIZED, None, 8),
    (quantize("W4A16", on_indivisible="keep"), "model.q", (4, 96), KEPT, "group_size_indivisible", None),
    (quantize("MXFP6A16", on_indivisible="keep"), "model.q", (4, 48), KEPT, "group_size_indivisible", None),
    (quantize("NVFP4A16", on_indivisible="keep"), "model.q", (4, 40), KEPT, "group_size_indivisible", None),
    (quantize("NVFP4A16", on_indivisible="keep"), "model.q", (4, 48), QUANTIZED, None, 4),
    (quantize("MXFP8A16;mx=floor"), "conv.weight", (4, 8, 4, 4), QUANTIZED, None, 8),
    ({"quantize": {"profile": "local"}}, "model.q", (4, 256), QUANTIZED, None, 4),
    ({"quantize": {"profile": "cloud"}}, "model.q", (4, 256), QUANTIZED, None, 8),
    ({"quantize": {"profile": "cloud"}}, "lm_head", (4, 256), KEPT, "ignored", None),
]


@pytest.mark.parametrize("how, name, shape, status, reason, bit_width", CHOICES, ids=lambda value: str(value)[:60])
def test_a_command_says_which_layers_are_quantized(server, how, name, shape, status, reason, bit_width):
    row, = one_layer(server, how, weights(shape), name=name).rows
    assert (row["status"], row["reason"], row["bit_width"]) == (status, reason, bit_width)
    assert (row["message"] is None) == (status == QUANTIZED)
    if status == KEPT:
        assert f"`{name}`" in row["message"]
        rest = set(COLUMNS) - {"layer_name", "status", "reason", "message", "dtype", "shape"}
        assert {column for column in rest if row[column] is not None} == set()


def test_kept_weights_come_back_where_asked(server):
    array = weights((4, 64), "bf16")
    how = recipe(ALL8, ignore=["layer"], return_kept=True)
    answer = wire.exchange(server.location, how, [wire.layer_batch("layer", array)])
    row, = answer.rows
    assert (row["status"], row["quantized_data"]) == (KEPT, None)
    assert row["extra_tensors"] == [{"name": "weight", "dtype": "bf16", "shape": [4, 64], "data": array.tobytes()}]
    reply = wire.exchange(server.location, dequantize(), answer.batches, schema=answer.schema)
    assert np.array_equal(values_of(reply), array.astype(np.float32).ravel())


def ladder(first, *others, **thresholds):
    return quantize(first, fallback={"schemes": list(others), **thresholds})


EDGE = {"quantize": {"profile": "edge"}}
# command, columns; the rungs as oracles, the least SQNR.
LADDERS = [
    (ladder("int2", "int4", "int8", sqnr_db_min=0.5), 256, [2, 4, 8], 0.5),
    (ladder("int2", "int4", "int8", sqnr_db_min=15), 256, [2, 4, 8], 15),
    (ladder("int2", "int4", "int8", sqnr_db_min=35), 256, [2, 4, 8], 35),
    (ladder("int2", "int4", "int8", sqnr_db_min=90), 256, [2, 4, 8], 90),
    (EDGE, 256, [(2, 64), (4, 128), 8], 18),
    (EDGE, 192, [(2, 64), 8], 18),
    (EDGE, 100, [8], 18),
]


@pytest.mark.parametrize("how, columns, rungs, least", LADDERS, ids=lambda value: str(value)[:70])
def test_a_ladder_takes_the_first_rung_of_enough_quality_or_keeps_the_layer(server, how, columns, rungs, least):
    array = weights((8, columns))
    row, = one_layer(server, how, array).rows
    for rung in rungs:
        bits, group = rung if isinstance(rung, tuple) else (rung, None)
        expected = oracle.integers(array, bits, group=group)
        if oracle.metrics(array, expected)["sqnr_db"] >= least:
            assert (row["status"], row["bit_width"], row["quantized_data"]) == (QUANTIZED, bits, expected.data)
            return
    assert (row["status"], row["reason"]) == (KEPT, "below_threshold")


def test_an_exact_layer_passes_every_threshold(server):
    row, = one_layer(server, ladder("int2", "int8", sqnr_db_min=200), np.zeros((4, 64), np.float32)).rows
    assert (row["status"], row["bit_width"], row["metrics"]["sqnr_db"]) == (QUANTIZED, 2, None)


def test_a_layer_with_bad_numbers_fails_alone_where_the_command_goes_on(server):
    arrays = {name: weights((4, 64), seed=index) for index, name in enumerate("abc")}
    arrays["b"][2, 5] = np.nan
    reply = wire.exchange(server.location, quantize("int8", on_error="continue"),
                          [wire.layer_batch(name, array) for name, array in arrays.items()])
    assert [(row["status"], row["reason"]) for row in reply.rows] == [
        (QUANTIZED, None), ("failed", "non_finite"), (QUANTIZED, None)]
    message = reply.layer("b").rows[0]["message"]
    assert "`b`" in message and " 133 " in message
    for name in "ac":
        check_numbers(reply.layer(name), arrays[name], oracle.integers(arrays[name], 8))
    assert (reply.summary["layers_quantized"], reply.summary["layers_failed"]) == (2, 1)


def test_arith_weight_dtype_rounds_each_step_to_the_weights_type(server):
    array = weights((8, 256), "bf16")
    scale = (np.abs(array.astype(np.float32)).max(1, keepdims=True) / np.float32(127.5)).astype(ml_dtypes.bfloat16)
    ratio = (array.astype(np.float32) / scale.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = np.rint(np.clip(ratio, -128, 127)).astype(np.int8)
    layer = one_layer(server, quantize("int8", arith="weight-dtype"), array)
    assert layer.codes == codes.tobytes()
    assert np.array_equal(layer.scales, scale.astype(np.float32).ravel())
    assert layer.codes != one_layer(server, W8, array).codes


# -- the end of the input ---------------------------------------------------------------------------------------------

ENDS = {"alone": b'{"end": {}}', "spaced": b' {\n"end" : { } }'}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_message_that_says_so_ends_the_input(server, end):
    layer = wire.layer_batch("a", np.ones((4, 8), np.float32))
    with wire.opened(server.location, {"quantize": {"scheme": "int8"}}) as (writer, reader):
        writer.begin(layer.schema)
        writer.write_batch(layer)
        writer.write_metadata(end)
        chunks = list(iter_chunks(reader))  # with the request still open
    assert [chunk.data.num_rows for chunk in chunks] == [1, 0]
    assert wire.is_summary(json.loads(chunks[-1].app_metadata.to_pybytes()))


def test_the_end_may_come_with_the_last_batch_and_nothing_after_it_is_read(server):
    layer = wire.layer_batch("a", np.ones((4, 8), np.float32))
    with wire.opened(server.location, {"quantize": {"scheme": "int8"}}) as (writer, reader):
        writer.begin(layer.schema)
        writer.write_with_metadata(layer, b'{"end": {}}')
        writer.write_batch(layer)  # again: an error, if it were read
        assert [chunk.data.num_rows for chunk in iter_chunks(reader)] == [1, 0]


def test_a_layer_that_is_incomplete_at_that_end_is_an_error(server):
    half = wire.layer_batch("a", np.ones((4, 8), np.float32), channels_per_row=2).slice(0, 1)
    with wire.opened(server.location, {"quantize": {"scheme": "int8"}}) as (writer, reader):
        writer.begin(half.schema)
        writer.write_with_metadata(half, b'{"end": {}}')
        with pytest.raises(pa.ArrowInvalid, match="layer_incomplete"):
            list(iter_chunks(reader))


def test_other_metadata_of_a_request_is_not_read(server):
    layer = wire.layer_batch("a", np.ones((4, 8), np.float32))
    with wire.opened(server.location, {"quantize": {"scheme": "int8"}}) as (writer, reader):
        writer.begin(layer.schema)
        for metadata in (b"alive", b"{}", b'{"end": {"layers": 9}}', b'{"end": {}, "more": 1}', b"\xff" * 100):
            writer.write_metadata(metadata)
        writer.write_batch(layer)
        writer.done_writing()
        assert [chunk.data.num_rows for chunk in iter_chunks(reader)] == [1, 0]


def iter_chunks(reader):
    while True:
        try:
            yield reader.read_chunk()
        except StopIteration:
            return
