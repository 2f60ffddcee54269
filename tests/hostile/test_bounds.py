"""Streams that are made to hold more than they pay for, and errors that must arrive: each was a bug once."""

import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from harness import frames, wire
from harness.command import dequantize, encode, quantize, recipe
from harness.server import Server
from hostile import scenes

MIB = 1 << 20
SMALL = ("--memory-bytes-max", 32 * MIB, "--message-bytes-max", 8 * MIB, "--stall-seconds", 2, "--idle-seconds", 6)


def dictionary_rows(count: int, elements: int, shape: tuple[int, int]) -> pa.RecordBatch:
    """Rows of one layer, the first of so many elements and the others of none."""
    offsets = np.full(count + 1, elements, np.int64)
    offsets[0] = 0
    return pa.record_batch({
        "layer_name": pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array(["layer"])),
        "weights": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.ones(elements, np.float32))),
        "shape": pa.FixedSizeListArray.from_arrays(pa.array(np.tile(np.array(shape, np.int64), count)), 2),
    })


def padded_messages(count: int, command=None):
    """Messages of 7 MiB of which one row uses 16 bytes."""
    elements = 7 * MIB // 4
    weights = pa.LargeListArray.from_arrays(pa.array([0, elements], pa.int64()), pa.array(np.ones(elements, np.float32)))
    batch = pa.record_batch({"layer_name": ["layer"], "weights": weights, "shape": [[1000, 4]]})
    frame = frames.batch_frame(batch)
    used = frame.body.replace(np.array([0, elements], np.int64).tobytes(), np.array([0, 4], np.int64).tobytes(), 1)
    assert used != frame.body
    yield frames.opening(wire.command_bytes(command or quantize("int8/tensor")))
    yield frames.schema_frame(batch.schema)
    for _ in range(count):
        yield frames.Frame(header=frame.header, body=used)


LADDER = quantize("int4", fallback={"schemes": ["int8"], "sqnr_db_min": 18}, return_kept=True)


@pytest.mark.parametrize("command", [quantize("int8/tensor"), LADDER], ids=["tensor", "ladder"])
def test_rows_that_wait_do_not_keep_whole_messages(fresh_server, command):
    server = fresh_server(*SMALL)
    _, code, details = frames.raw_exchange(server.location, padded_messages(60, command))
    assert wire.reason_of(details) == "layer_incomplete", (code, details)
    assert server.peak_rss_bytes() < 32 * MIB + scenes.BESIDE_BUDGET  # 420 MiB came
    scenes.good_stream(server.location)


def test_buffers_of_one_body_are_not_copied_each(server):
    """Each of its buffers is all of the body, at an odd offset; arrow-rs copies what is not aligned."""
    batch = wire.layer_batch("x", np.ones((64, 1024), np.float32))
    frame = frames.batch_frame(batch)
    at = frame.body.index(np.ones(1024, np.float32).tobytes())
    found = np.array([at, 4 * 64 * 1024], np.int64).tobytes()
    assert frame.header.count(found) == 1
    for claimed in ([0, len(frame.body)], [1, len(frame.body) - 1]):
        lying = frame.header.replace(found, np.array(claimed, np.int64).tobytes())
        sent = [frames.opening(wire.command_bytes(quantize("int8"))), frames.schema_frame(batch.schema),
                frames.Frame(header=lying, body=frame.body)]
        _, code, details = frames.raw_exchange(server.location, sent)
        assert (code, wire.reason_of(details)) == ("INVALID_ARGUMENT", "frame_invalid")
        assert "bytes together, in a body of" in details
    scenes.good_stream(server.location)


def views(count: int, length: int) -> pa.Array:
    """As many strings, each all of one buffer."""
    view = np.array([length, int.from_bytes(b"aaaa", "little"), 0, 0], np.int32)
    buffers = [None, pa.py_buffer(np.tile(view, count)), pa.py_buffer(b"a" * length)]
    return pa.Array.from_buffers(pa.string_view(), count, buffers)


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_views_of_one_buffer_are_not_read_over_and_over(server, is_dictionary):
    names = views(500_000, 4 * MIB)  # 2 TB, of which 12 MB travel: ten minutes of looking
    if is_dictionary:
        names = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), names, safe=False)
    weights = pa.array([[1.0]] * len(names), pa.list_(pa.float32()))
    batch = pa.record_batch({"layer_name": names, "weights": weights})
    with pytest.raises(pa.ArrowInvalid, match=r"\[frame_invalid\] .* 500000 views of strings"):
        wire.exchange(server.location, quantize("int8"), [batch])
    scenes.good_stream(server.location)


def test_an_answer_with_columns_of_other_types_is_refused_by_its_schema(server):
    answer = wire.exchange(server.location, quantize("int8"), [wire.layer_batch("x", np.eye(4, dtype=np.float32))]).table
    for column, type in [("reason", pa.string_view()), ("metrics", pa.struct([("mse", pa.string_view())])),
                         ("bit_width", pa.string_view()),
                         ("extra_tensors", pa.list_(pa.struct([("name", pa.string_view()), ("dtype", pa.string()),
                                                               ("data", pa.large_binary())])))]:
        at = answer.schema.get_field_index(column)
        odd = answer.set_column(at, column, pa.nulls(answer.num_rows, type))
        if column == "reason":  # any text
            assert wire.exchange(server.location, dequantize(), odd.to_batches()).table.num_rows == 1
            continue
        with pytest.raises(pa.ArrowInvalid, match=rf"\[column_type\] column `{column}`"):
            wire.exchange(server.location, dequantize(), odd.to_batches())


def test_empty_runs_of_an_open_span_are_charged(fresh_server):
    server = fresh_server(*SMALL)
    one, none = dictionary_rows(1, 4, (128, 4)), dictionary_rows(200_000, 0, (128, 4))
    with pytest.raises(pa.ArrowInvalid, match=r"\[(busy|span_too_large)\]"):
        wire.exchange(server.location, quantize("FP8_BLOCK"), [one, *[none] * 20])
    assert server.peak_rss_bytes() < 32 * MIB + scenes.BESIDE_BUDGET
    scenes.good_stream(server.location)


def test_a_slow_reader_gets_all_rows_before_the_fault_and_then_the_fault(fresh_server):
    server = fresh_server("--stall-seconds", 1)
    good = np.ones((3072, 4096), np.float32)
    bad = np.ones((2, 4), np.float32)
    bad[1, 2] = np.nan
    batches = [wire.layer_batch("good", good, channels_per_row=128), wire.layer_batch("bad", bad)]
    rows = 0
    with pytest.raises(pa.ArrowInvalid, match=r"\[non_finite\] layer `bad`: weight at flat index 6 is NaN"):
        with wire.opened(server.location, quantize("int8")) as (writer, reader):
            writer.begin(batches[0].schema)
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()
            for chunk in reader:
                rows += chunk.data.num_rows
                time.sleep(0.3)  # the slowness itself: longer in all than a stall may last
    assert rows == 24


def test_rows_before_a_fault_are_answered_however_they_were_batched(server):
    good, bad = np.ones((2, 4), np.float32), np.full((1, 4), np.inf, np.float32)
    layers = [wire.layer_batch("good", good), wire.layer_batch("bad", bad)]
    together = pa.Table.from_batches(layers).combine_chunks().to_batches()
    for batches in (layers, together):
        request = frames.stream(wire.command_bytes(quantize("int8")), batches)
        answered, code, details = frames.raw_exchange(server.location, request)
        assert (code, wire.reason_of(details)) == ("INVALID_ARGUMENT", "non_finite")
        _, found = frames.to_batches(answered)
        assert sum(batch.num_rows for batch, _ in found) == 1


def test_a_regular_file_at_the_path_of_a_socket_is_left_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("weights")
    with pytest.raises(Exception, match="."):
        Server.start(listen=f"unix:{precious}")
    assert precious.read_text() == "weights"


def test_rungs_of_different_layouts_are_refused(server):
    for scheme, fallback in (("int2", "int8;channel_dims=2"), ("int8;channel_dims=2", "int2")):
        ladder = {"schemes": [fallback], "sqnr_db_min": 60}
        batch = wire.layer_batch("layer", np.ones((4, 6, 8), np.float32))
        code, reason, _ = wire.failure(server.location, quantize(scheme, fallback=ladder), [batch])
        assert (code, reason) == ("INVALID_ARGUMENT", "option_conflict")


def test_kept_weights_come_back_in_messages_that_stock_clients_take(server):
    layers = [wire.layer_batch(f"layer{index}", np.ones((64, 4096), np.float32)) for index in range(16)]
    command = recipe({"targets": ["nothing"], "scheme": "int8"}, return_kept=True)
    together = pa.Table.from_batches(layers).combine_chunks().to_batches()
    reply = wire.exchange(server.location, command, together)
    assert all(batch.nbytes < 4 * MIB for batch in reply.batches)
    back = wire.exchange(server.location, {"dequantize": {}}, reply.table.combine_chunks().to_batches())
    assert all(batch.nbytes < 4 * MIB for batch in back.batches)
    assert sum(len(row["weights"]) for row in back.rows) == 16 * 64 * 4096


def test_a_cancelled_stream_stops_matching_names(fresh_server):
    server = fresh_server("--threads", 1)
    patterns = [f"re:(.*a){{9}}[bc].{{3}}z{index}$" for index in range(50)]
    names = [("ab" * 400) + str(index) for index in range(20_000)]
    batch = pa.record_batch({
        "layer_name": names,
        "weights": pa.array([[]] * len(names), pa.large_list(pa.float32())),
    })
    command = recipe({"targets": patterns, "scheme": "int8"})
    with wire.opened(server.location, command) as (writer, reader):
        writer.begin(batch.schema)
        writing = threading.Thread(target=lambda: writer.write_batch(batch))
        writing.start()
        writing.join()
        reader.cancel()
    scenes.good_stream(server.location)  # a call has a deadline: it would not wait for 20,000 names
    used = server.cpu_seconds()
    scenes.good_stream(server.location)
    assert server.cpu_seconds() - used < 1


def test_the_two_encodings_of_a_command_are_refused_alike_when_too_large(server):
    for command in (encode(quantize("int8" + " " * (1 << 20))), b" " * (1 << 20) + b'{"quantize": {"scheme": "int8"}}'):
        code, reason, _ = wire.failure(server.location, command, [wire.layer_batch("x", np.ones((1, 4), np.float32))])
        assert (code, reason) == ("INVALID_ARGUMENT", "command_malformed")


def test_a_call_that_is_no_stream_takes_no_more_than_a_command(server):
    descriptor = frames.descriptor(b" " * (8 * MIB))
    _, code, _ = frames.unary(server.location, "/arrow.flight.protocol.FlightService/GetFlightInfo", descriptor)
    assert code != "OK"
    scenes.good_stream(server.location)


def test_a_ladder_goes_on_where_a_scale_overflows(server):
    weights = np.array([[3e38, -3e38, 1, 2]], np.float32)
    ladder = {"schemes": ["int8"], "cosine_min": 0.9}
    reply = wire.exchange(server.location, quantize("int4-asym", fallback=ladder), [wire.layer_batch("wide", weights)])
    assert [(row["status"], row["scheme"]) for row in reply.rows] == [("quantized", "int8")]


def test_a_shape_of_many_dimensions_is_refused(server):
    batch = wire.layer_batch("deep", np.ones((1,) * 64, np.float32))
    code, reason, _ = wire.failure(server.location, quantize("int8"), [batch])
    assert (code, reason) == ("INVALID_ARGUMENT", "shape_invalid")
