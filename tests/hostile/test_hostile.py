"""Bad input, over the wire: one table, a row per thing that a client can get wrong.

Each row prints `name code reason` and is followed by a good stream on the same server, compared with its golden. The
caller's mistakes are never INTERNAL, and every message says `[reason]`, whose layer, the value, and what was expected.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

from harness import command, frames, oracle, wire
from harness.command import dequantize, quantize, recipe
from harness.server import Server
from hostile import bad, scenes
from hostile.bad import INT8, X, batch, i32, i64, layer, lists, names, request, shapes, weights

MESSAGE_BYTES_MAX = 2000
MIB = scenes.MIB
SMALL, TENSOR = scenes.SMALL, scenes.TENSOR
CONTINUE = quantize("int8", on_error="continue")
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A row: what is done to the server, and the gRPC code and reason that come of it."""

    name: str
    play: Callable[[Server], tuple[str, str]]
    code: str
    reason: str
    flags: tuple = ()


def refused(name, send: Callable[[], Iterable], reason, *says, code="INVALID_ARGUMENT", **options) -> Case:
    """The stream ends with `code` and a message of that reason, which holds each word of `says`."""
    def play(server):
        _, found, message = frames.raw_exchange(server.location, send())
        assert len(message.encode()) <= MESSAGE_BYTES_MAX
        missing = [word for word in says if word not in message]
        assert not missing, f"{message!r} does not hold {missing}"
        return found, wire.reason_of(message) if found != "OK" else "-"
    return Case(name, play, code, reason, **options)


def answered(name, send: Callable[[], Iterable], holds: Callable[[pa.Table], None], reason="-", **options) -> Case:
    """The stream is answered; `holds` looks at its rows, and `reason` is the one in all of them that have one."""
    def play(server):
        replies, code, message = frames.raw_exchange(server.location, send())
        assert code == "OK", message
        schema, batches = frames.to_batches(replies)
        table = pa.Table.from_batches([found for found, _ in batches], schema)
        holds(table)
        return code, ",".join(table["reason"].drop_null().unique().to_pylist()) or "-"
    return Case(name, play, "OK", reason, **options)


def statuses(*expected: str):
    return lambda table: _equal(table["status"].to_pylist(), list(expected))


def emptied(count: int):
    """`count` kept rows."""
    def holds(table):
        assert table.num_rows == count
        assert table["status"].unique().to_pylist() == ["kept"] * bool(count)
    return holds


def numbers(array, *, asymmetric=False):
    """One row with the oracle's codes, scales and zero points."""
    def holds(table):
        row, = table.to_pylist()
        expected = oracle.integers(array, 8, asymmetric=asymmetric)
        _equal(row["quantized_data"], expected.data)
        _equal(row["scales"], expected.scales.tolist())
        _equal(row["zero_points"], expected.zero_points.tolist() if asymmetric else None)
        undefined = [key for key, value in row["metrics"].items() if value is None]
        _equal({"sqnr_db"} <= set(undefined), not np.any(array) or np.array_equal(expected.values, array))
        assert not any(isinstance(value, float) and value != value for value in row["metrics"].values())
    return holds


def _equal(found, expected):
    assert found == expected


def constant(value, dtype=np.float32):
    return np.full(bad.SHAPE, value, dtype)


def unnamed(*, metadata=None):
    """Frames without a usable descriptor."""
    whole = list(request(layer()))
    return [frames.Frame(descriptor=metadata), *whole[1:]] if metadata else whole[1:]


def runs(*counts: int, shape=(4, 9), name=X):
    """The first channels of a layer of `shape`, in rows of so many channels; they need not complete it."""
    given = weights((sum(counts), *shape[1:]))
    whole = wire.layer_batch(name, given, channels_per_row=list(counts))
    told = pa.array([list(shape)] * len(counts), pa.list_(pa.int64()))
    return wire.rows(whole.set_column(whole.schema.get_field_index("shape"), "shape", told))


def raw(dtype, data: bytes, **columns):
    """A row of binary weights; `dtype` is a name or a column."""
    told = names(dtype) if isinstance(dtype, str) else dtype
    return batch(weights=pa.array([data], pa.large_binary()), dtype=told, **columns)


def altered(name, reason, *says, command=INT8, **changed) -> Case:
    """A row as `quantize` answered it, sent to `dequantize` with some columns changed."""
    def play(server):
        answer = wire.exchange(server.location, command, layer()).table.combine_chunks()
        for column, value in changed.items():
            at = answer.schema.get_field_index(column)
            answer = answer.set_column(at, answer.schema.field(at), pa.array([value], answer.schema.field(at).type))
        return refused(name, lambda: request(answer.to_batches(), dequantize()), reason, *says).play(server)
    return Case(name, play, "INVALID_ARGUMENT", reason)


KEEP = recipe({"targets": ["*"], "scheme": "int8"}, ignore=[X])
GARBAGE = b"\xff\xfe\xfd garbage"
W8A8_GROUPED = quantize("W8A8", group_size=64)
NEVER_ANSWERS = ("--message-bytes-max", 4 * MIB, "--memory-bytes-max", 64 * MIB, "--layer-bytes-max", 16 * MIB)

CASES = [
    # NaN, +inf, -inf (layer, flat index)
    refused("NaN", lambda: request(layer(weights(at_7=NAN))), "non_finite", f"`{X}`", " 7 ", "NaN"),
    refused("+inf", lambda: request(layer(weights(at_9=INF))), "non_finite", f"`{X}`", " 9 ", "inf"),
    refused("-inf", lambda: request(layer(weights(at_26=-INF))), "non_finite", f"`{X}`", " 26 ", "-inf"),
    refused("NaN in a later run", lambda: request(layer(weights(at_20=NAN), channels_per_row=1)),
            "non_finite", f"`{X}`", " 20 ", "NaN"),
    refused("NaN in a later run of a buffered layer",
            lambda: request(layer(weights(at_20=NAN), channels_per_row=1), TENSOR), "non_finite", f"`{X}`", " 20 "),
    refused("inf in f16", lambda: request(layer(weights(dtype=np.float16, at_5=INF))), "non_finite", f"`{X}`", " 5 "),
    refused("NaN in bf16", lambda: request(layer(weights(dtype=ml_dtypes.bfloat16, at_5=NAN))),
            "non_finite", f"`{X}`", " 5 ", "NaN"),
    refused("NaN in f8_e4m3", lambda: request(raw("f8_e4m3", b"\x01\x02\x7f")), "non_finite", f"`{X}`", " 2 ", "NaN"),
    refused("-inf in f8_e5m2", lambda: request(raw("f8_e5m2", b"\x01\xfc\x02")), "non_finite", f"`{X}`", " 1 ", "-inf"),
    refused("an f64 beyond f32", lambda: request(layer(weights(dtype=np.float64, at_3=1e300))),
            "non_finite", f"`{X}`", " 3 "),
    refused("a range beyond f32", lambda: request(layer(weights(at_3=3e38, at_4=-3e38)), quantize("int8-asym")),
            "scale_overflow", f"`{X}`"),
    answered("NaN, and on_error: continue",
             lambda: request([*layer(name="a"), *layer(weights(at_7=NAN)), *layer(name="b")], CONTINUE),
             statuses("quantized", "failed", "quantized"), "non_finite"),

    # null name; null weights; null element
    refused("null name", lambda: request(batch(layer_name=names(None))), "name_null"),
    refused("null weights", lambda: request(batch(weights=lists(None))), "weights_null", f"`{X}`"),
    refused("null element", lambda: request(batch(weights=lists([1.0, None, 3.0]))), "element_null", f"`{X}`"),
    refused("null weights, and on_error: continue",
            lambda: request(batch(weights=lists(None)), CONTINUE), "weights_null"),

    # empty layer; constant and all-zero layers (defined result)
    answered("empty layer", lambda: request(layer(weights((0, 9)))), emptied(1), "empty"),
    answered("layer without columns", lambda: request(layer(weights((4, 0)))), emptied(1), "empty"),
    answered("empty layer without a shape", lambda: request(batch(weights=lists([]))), emptied(1), "empty"),
    answered("constant layer", lambda: request(layer(constant(0.25))), numbers(constant(0.25))),
    answered("constant layer below zero, asymmetric", lambda: request(layer(constant(-3)), quantize("int8-asym")),
             numbers(constant(-3), asymmetric=True)),
    answered("all-zero layer", lambda: request(layer(constant(0))), numbers(constant(0))),
    answered("all-zero layer, asymmetric", lambda: request(layer(constant(0)), quantize("int8-asym")),
             numbers(constant(0), asymmetric=True)),
    answered("subnormal layer", lambda: request(layer(constant(1e-45))), numbers(constant(1e-45))),
    answered("tiny layer in bf16", lambda: request(layer(constant(1e-38, ml_dtypes.bfloat16))),
             numbers(constant(1e-38, ml_dtypes.bfloat16))),

    # a shape that does not multiply out, is negative, overflows
    refused("shape larger than its elements",
            lambda: request(batch(shape=shapes([2, 3]))), "layer_incomplete", f"`{X}`", "6"),
    refused("shape smaller than its elements",
            lambda: request(batch(weights=lists([1.0] * 6), shape=shapes([1, 3]))), "layer_too_long", f"`{X}`"),
    refused("negative shape", lambda: request(batch(shape=shapes([-1, 3]))), "shape_invalid", f"`{X}`", "-1"),
    refused("null in a shape", lambda: request(batch(shape=shapes([None, 3]))), "shape_invalid", f"`{X}`"),
    refused("shape that overflows", lambda: request(batch(shape=shapes([2**33, 2**33]))), "shape_invalid", f"`{X}`"),
    refused("shape that changes", lambda: request([*runs(1), *runs(3, shape=(3, 9))]), "shape_changed", f"`{X}`"),
    refused("dtype that changes",
            lambda: request([raw(dtype, b"\0" * 8, shape=shapes([4, 2]))[0] for dtype in ("f32", "bf16")]),
            "dtype_changed", f"`{X}`", "bf16"),

    # runs interrupted, repeated, too long, cut inside a channel, incomplete at the end
    refused("runs interrupted",
            lambda: request([*runs(2), *layer(name="other"), *runs(2)]), "layer_interrupted", f"`{X}`"),
    refused("layer repeated at once", lambda: request([*runs(4), *runs(4)]), "layer_repeated", f"`{X}`"),
    refused("layer repeated later",
            lambda: request([*runs(4), *layer(name="other"), *runs(4)]), "layer_repeated", f"`{X}`"),
    refused("runs too long", lambda: request(runs(1, 4)), "layer_too_long", f"`{X}`"),
    refused("run cut inside a channel",
            lambda: request(batch(weights=lists([1.0] * 13), shape=shapes([4, 9]))), "channel_cut", f"`{X}`"),
    refused("runs incomplete at the end", lambda: request(runs(1, 2)), "layer_incomplete", f"`{X}`"),
    refused("buffered layer incomplete at the end", lambda: request(runs(1, 2), TENSOR), "layer_incomplete", f"`{X}`"),
    refused("bytes that are no whole number of elements",
            lambda: request(raw("f32", b"\0" * 7)), "bytes_ragged", f"`{X}`", "7"),
    refused("form, and on_error: continue", lambda: request(runs(1, 2), CONTINUE), "layer_incomplete", f"`{X}`"),

    # a group size that does not divide
    refused("group size that does not divide",
            lambda: request(layer(weights((4, 96))), quantize("int4", group_size=128)),
            "group_size_indivisible", f"`{X}`", "128", "96"),
    answered("group size that does not divide, and on_error: continue",
             lambda: request(layer(weights((4, 96)), channels_per_row=1), quantize("W4A16", on_error="continue")),
             statuses(*["failed"] * 4), "group_size_indivisible"),
    answered("group size that does not divide, where the command says keep",
             lambda: request(layer(weights((4, 96))), quantize("W4A16", on_indivisible="keep")),
             statuses("kept"), "group_size_indivisible"),
    answered("group size that does not divide, where a recipe says keep",
             lambda: request(layer(weights((4, 96)), channels_per_row=2),
                             recipe({"targets": ["*"], "scheme": "W4A16", "on_indivisible": "keep"})),
             statuses("kept", "kept"), "group_size_indivisible"),
    refused("rank that a block format does not know", lambda: request(layer(weights((2, 3, 9))), quantize("FP8_BLOCK")),
            "rank_unsupported", f"`{X}`"),

    # wrong column types; a missing column; extra columns
    refused("layer_name of integers",
            lambda: request(batch(layer_name=pa.array([1]))), "column_type", "layer_name", "expected"),
    refused("weights of integers", lambda: request(batch(weights=lists([1, 2], type=pa.large_list(pa.int32())))),
            "column_type", "weights", "expected"),
    refused("weights that are no list", lambda: request(batch(weights=pa.array([1.0]))), "column_type", "weights"),
    refused("weights that are lists of lists",
            lambda: request(batch(weights=lists([[1.0]], type=pa.list_(pa.list_(pa.float32()))))),
            "column_type", "weights"),
    refused("weights that are text", lambda: request(batch(weights=names("1.0"))), "column_type", "weights"),
    refused("shape of 32-bit integers", lambda: request(batch(shape=shapes([3], type=pa.list_(pa.int32())))),
            "column_type", "shape"),
    refused("dtype of integers", lambda: request(raw(pa.array([1]), b"\0" * 4)), "column_type", "dtype"),
    refused("binary weights without dtype", lambda: request(raw(None, b"\0" * 4)), "column_missing", "dtype"),
    refused("null dtype", lambda: request(raw(names(None), b"\0" * 4)), "dtype_invalid", f"`{X}`"),
    refused("unknown dtype", lambda: request(raw("f31", b"\0" * 4)), "dtype_invalid", f"`{X}`", "f31"),
    refused("permuted tensors",
            lambda: request(batch(weights=bad.tensors([2, 3], permutation=[1, 0]))), "permuted", "weights"),
    refused("missing layer_name", lambda: request(batch(layer_name=None)), "column_missing", "layer_name"),
    refused("missing weights", lambda: request(batch(weights=None)), "column_missing", "weights"),
    refused("extra column", lambda: request(batch(comment=names("hello"))), "column_unexpected", "comment"),
    refused("name over the limit", lambda: request(batch(layer_name=names("n" * 1025))), "name_too_long", "1024"),
    refused("name of a megabyte", lambda: request(batch(layer_name=names("n" * MIB))), "name_too_long", "1024"),

    # a command of garbage bytes, empty, JSON with an unknown field, protobuf with an unknown field, a contradiction, ..
    refused("command of garbage bytes", lambda: request(layer(), GARBAGE), "command_malformed"),
    refused("command empty", lambda: request(layer(), b""), "command_missing"),
    refused("command without a verb", lambda: request(layer(), {}), "command_malformed"),
    refused("JSON cut short", lambda: request(layer(), b'{"quantize": {'), "command_malformed"),
    refused("JSON of the wrong type", lambda: request(layer(), {"quantize": {"scheme": 8}}), "command_malformed"),
    refused("JSON with an unknown field", lambda: request(layer(), {"quantize": {"scheme": "int8"}, "colour": "red"}),
            "field_unknown", "colour"),
    refused("JSON with an unknown option",
            lambda: request(layer(), quantize("int8", colour="red")), "field_unknown", "colour"),
    refused("protobuf with an unknown field", lambda: request(layer(), command.encode(INT8) + frames.blob(99, b"red")),
            "field_unknown", "99"),
    refused("protobuf with an unknown option",
            lambda: request(layer(), frames.blob(2, frames.blob(1, b"int8") + frames.integer(77, 1))),
            "field_unknown", "77"),
    refused("contradiction", lambda: request(layer(), W8A8_GROUPED), "option_conflict", "W8A8", "group_size"),
    refused("unknown scheme", lambda: request(layer(), quantize("int9")), "scheme_unknown", "int9"),
    refused("unknown scheme in a recipe", lambda: request(layer(), recipe({"targets": ["*"], "scheme": "W5"})),
            "scheme_unknown", "W5"),
    refused("unknown profile", lambda: request(layer(), {"quantize": {"profile": "moon"}}), "profile_unknown", "moon"),
    refused("unknown set in ignore",
            lambda: request(layer(), recipe({"targets": ["*"], "scheme": "int8"}, ignore=["@nope"])),
            "recipe_invalid", "@nope"),
    refused("pattern that the engine lacks",
            lambda: request(layer(), recipe({"targets": ["re:(?!a)b"], "scheme": "int8"})),
            "recipe_invalid", "(?!a)b"),
    refused("unknown arith",
            lambda: request(layer(), quantize("int8", arith="f64")), "option_invalid", "f64", "weight-dtype"),
    refused("unknown on_error",
            lambda: request(layer(), quantize("int8", on_error="maybe")), "option_invalid", "maybe"),
    refused("group size of zero",
            lambda: request(layer(), quantize("int4", group_size=0)), "option_invalid", "group_size"),
    refused("dequantize to an unknown dtype", lambda: request(layer(), dequantize(dtype="f8")), "option_invalid", "f8"),
    refused("measure, which is not served yet",
            lambda: request(layer(), {"measure": {}}), "verb_unsupported", "measure",
            code="UNIMPLEMENTED"),
    refused("a source in an exchange",
            lambda: request(layer(), {**INT8, "source": "file:///tmp/model"}), "verb_unsupported",
            "DoExchange", code="UNIMPLEMENTED"),

    # no descriptor; no schema; a zero-row batch; a million rows of empty lists
    refused("no descriptor", lambda: unnamed(), "command_missing"),
    refused("descriptor with a path", lambda: unnamed(metadata=frames.path_descriptor("model")), "command_missing"),
    refused("no message at all", lambda: [], "command_missing"),
    refused("no schema",
            lambda: [frames.opening(wire.command_bytes(INT8)), frames.batch_frame(layer()[0])], "schema_missing"),
    refused("the end before the schema", lambda: [frames.opening(wire.command_bytes(INT8))], "schema_missing"),
    answered("a schema and no batch", lambda: bad.opening_and_schema(), emptied(0)),
    answered("a zero-row batch", lambda: request([layer()[0].slice(0, 0)]), emptied(0)),
    answered("a zero-row batch among others", lambda: request([*runs(2), runs(1)[0].slice(0, 0), *runs(2)]),
             statuses("quantized", "quantized")),
    answered("a million rows of empty lists", lambda: request(bad.many(1_000_000)), emptied(1_000_000), "empty"),
    refused("a million rows of empty lists and one",
            lambda: request(bad.many(1_000_001)), "batch_rows_exceeded", "1000000"),
    refused("a million layers and two",
            lambda: request(bad.many(1_000_002)[0].slice(at, 500_001) for at in (0, 500_001)),
            "layers_exceeded", "1000000"),
    refused("a million rows of one empty layer",
            lambda: request(bad.many(1_000_000, name=X)), "layer_repeated", f"`{X}`"),

    # a message over the limit; a span over the limit
    refused("message over the limit", lambda: request(layer(weights((2048, 1024)))), "message_too_large",
            str(4 * MIB), flags=NEVER_ANSWERS),
    refused("later message over the limit", lambda: request([*layer(name="a"), *layer(weights((2048, 1024)))]),
            "message_too_large", str(4 * MIB), flags=NEVER_ANSWERS),
    refused("channel over the limit", lambda: request(batch(shape=shapes([4, 2 * MIB]))), "channel_too_large", f"`{X}`",
            flags=NEVER_ANSWERS),
    refused("span over the limit", lambda: request(runs(1, shape=(8192, 1024)), TENSOR), "span_too_large", f"`{X}`",
            str(16 * MIB), flags=NEVER_ANSWERS),
    refused("span over half of the budget",
            lambda: request(runs(1, shape=(8192, 1024)), TENSOR), "span_too_large", f"`{X}`",
            flags=("--message-bytes-max", 4 * MIB, "--memory-bytes-max", 40 * MIB, "--layer-bytes-max", 36 * MIB)),
    refused("span over any limit", lambda: request(runs(1, shape=(2**30, 2**10)), TENSOR), "span_too_large", f"`{X}`"),

    # IPC bodies with offsets out of range (they panic inside arrow: that is the test)
    refused("list offsets beyond the values",
            lambda: bad.patched(body=(i64(0, 27), i64(0, 1 << 40))), "frame_invalid"),
    refused("list offsets below zero",
            lambda: bad.patched(body=(i64(0, 27), i64(-27, 27))), "frame_invalid"),
    refused("list offsets that go back",
            lambda: bad.patched(body=(i64(0, 9, 18, 27), i64(0, 18, 9, 27)), channels_per_row=1),
            "frame_invalid"),
    refused("name offsets beyond the text",
            lambda: bad.patched(body=(i32(0, 7), i32(0, 1 << 30))), "frame_invalid"),
    refused("name that is no UTF-8",
            lambda: bad.patched(body=(X.encode(), b"hos\xff\xfele")), "frame_invalid"),
    refused("buffer longer than the body",
            lambda: bad.patched(header=(i64(108), i64(1 << 40))), "frame_invalid"),
    refused("buffer of negative length",
            lambda: bad.patched(header=(i64(108), i64(-108))), "frame_invalid"),
    refused("column longer than its buffer",
            lambda: bad.patched(header=(i64(27, 0), i64(1 << 40, 0))), "frame_invalid"),
    refused("column shorter than its rows",
            lambda: bad.patched(header=(i64(27, 0), i64(1, 0))), "frame_invalid"),
    refused("body cut short", lambda: bad.cut_body(40), "frame_invalid"),
    refused("body missing", lambda: bad.cut_body(0), "frame_invalid"),
    refused("four MiB and more beside the body", lambda: bad.with_fields(5 * MIB), "frame_invalid"),
    refused("header of garbage", lambda: bad.with_header(b"\xa5" * 64), "frame_invalid"),
    refused("header that points outside",
            lambda: bad.with_header(i32(2**31 - 1) + b"\0" * 60), "frame_invalid"),
    refused("header of one byte", lambda: bad.with_header(b"\x01"), "frame_invalid"),
    refused("message that is no protobuf", lambda: [*bad.opening_and_schema(), b"\xff\xff\xff"], "frame_invalid"),
    refused("compressed body",
            lambda: [*bad.opening_and_schema(), frames.compressed_frame(layer()[0])], "frame_invalid", "compress"),

    # rows that dequantize cannot read
    altered("a kept row without its weights", "kept_without_data", f"`{X}`", command=KEEP),
    altered("a checksum that does not fit", "checksum_mismatch", f"`{X}`", checksum=7),
    altered("too few scales", "row_inconsistent", f"`{X}`", scales=[1.0]),
    altered("a scheme that is none", "scheme_unknown", "int9", scheme="int9"),

    # a client that vanishes mid-stream
    Case("a client process that is killed mid-stream", scenes.a_process_is_killed, "OK", "-", SMALL),
    Case("a connection that is cut inside a message", scenes.a_connection_is_cut_inside_a_message, "OK", "-", SMALL),

    # a client that reads only after it has written 512 MiB, and one that never reads (memory and others are asserted)
    Case("a client that reads only after it has written 512 MiB", scenes.reads_only_after_writing_512_mib, "OK", "-",
         ("--stall-seconds", 30)),
    Case("a client that never reads", scenes.never_reads, "FAILED_PRECONDITION", "client_not_reading", SMALL),

    # 24 streams that each stop half-way through a per-tensor layer, while a good stream finishes
    Case("24 streams that stop half-way", scenes.twenty_four_stop_half_way,
         "RESOURCE_EXHAUSTED,DEADLINE_EXCEEDED", "busy,idle", SMALL),
    Case("a client that stops half-way", scenes.stops_half_way, "DEADLINE_EXCEEDED", "idle", ("--idle-seconds", 1)),
    Case("a client that says nothing", scenes.says_nothing, "DEADLINE_EXCEEDED", "header_timeout",
         ("--header-seconds", 1)),
    Case("a stream that lasts too long, though it moves", scenes.lasts_too_long, "DEADLINE_EXCEEDED", "stream_timeout",
         ("--stream-seconds", 2)),
    Case("one stream too many", scenes.one_stream_too_many, "RESOURCE_EXHAUSTED", "streams_exceeded",
         ("--streams-max", 2)),
    Case("one stream too many for a connection", scenes.one_stream_too_many_for_a_connection, "RESOURCE_EXHAUSTED",
         "streams_exceeded", ("--connection-streams-max", 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_answered_in_words_and_harms_nobody_else(case, server, fresh_server, capsys):
    running = fresh_server(*case.flags) if case.flags else server
    code, reason = case.play(running)
    with capsys.disabled():
        print(f"\n{case.name:62} {code} {reason}", end=" ")
    assert (code, reason) == (case.code, case.reason)
    scenes.good_stream(running.location)
