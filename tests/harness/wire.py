"""The wire as a pyarrow user sees it: layers to record batches, and the three loops people write."""

import contextlib
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as flight

from harness import frames

NO_SHAPE = ()
END = b'{"end": {}}'  # a message that ends the input, as half-closing the request does
BINARY_DTYPES = {
    "f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "f64": np.dtype(np.float64),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn), "f8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# 64-bit counts, which proto3 JSON writes as strings and may omit when they are zero.
PROGRESS_COUNTS = ("rows", "layers", "bytes_in", "bytes_out")
SUMMARY_COUNTS = ("rows", "layers_quantized", "layers_kept", "layers_failed", "elements", "bytes_in", "bytes_out")


# -- layers to batches ------------------------------------------------------------------------------------------------

def layer_batch(name, weights, *, dtype=None, shape=None, channels_per_row=None, importance=None) -> pa.RecordBatch:
    """One layer as a batch, without copying its elements.

    `weights`: an array, or bytes together with `dtype`. f16, f32 and f64 arrays travel as large_list; other element
    types, and any array with `dtype`, as large_binary. `shape`: the array's own by default, `NO_SHAPE` for no column.
    `importance`: a number for each column, on the first row; or None for no column of that name.
    `channels_per_row`: None for one row, a number of channels, or a list of numbers (their sum is the layer).
    """
    if isinstance(weights, np.ndarray):
        if dtype is None and weights.dtype not in (np.float16, np.float32, np.float64):
            dtype = next(key for key, value in BINARY_DTYPES.items() if value == weights.dtype)
        shape = weights.shape if shape is None else shape
        channels, elements = (weights.shape[0] if weights.ndim else 1), weights.size
        flat = np.ascontiguousarray(weights).reshape(-1)
        data = flat.view(np.uint8) if dtype else flat
    else:
        assert dtype, "bytes need a dtype"
        shape = NO_SHAPE if shape is None else shape
        channels = shape[0] if shape else 1
        data = np.frombuffer(weights, np.uint8)
        elements = len(data) // BINARY_DTYPES[dtype].itemsize
    counts = _channel_counts(channels, channels_per_row)
    assert sum(counts) == channels, f"{counts} do not add up to {channels} channels"
    # In elements of `data`: numbers for a list, bytes for binary.
    per_channel = len(data) // channels if channels else 0
    assert not elements or per_channel * channels == len(data)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64) * per_channel
    columns = {"layer_name": pa.array([name] * len(counts), pa.string()), "weights": _lists(data, offsets, dtype)}
    if dtype:
        columns["dtype"] = pa.array([dtype] * len(counts), pa.string())
    if shape != NO_SHAPE:
        columns["shape"] = pa.array([list(shape)] * len(counts), pa.list_(pa.int64()))
    if importance is not None:
        columns["importance"] = pa.array([importance] + [None] * (len(counts) - 1), pa.list_(pa.float32()))
    return pa.RecordBatch.from_pydict(columns)


def _channel_counts(channels, channels_per_row) -> list[int]:
    if channels_per_row is None:
        return [channels]
    if isinstance(channels_per_row, int):
        return [min(channels_per_row, channels - at) for at in range(0, channels, channels_per_row)]
    return list(channels_per_row)


def _lists(data: np.ndarray, offsets: np.ndarray, dtype) -> pa.Array:
    if dtype:
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(data))


def rows(batch: pa.RecordBatch) -> list[pa.RecordBatch]:
    """The same rows, a batch each."""
    return [batch.slice(at, 1) for at in range(batch.num_rows)]


# -- replies ----------------------------------------------------------------------------------------------------------

@dataclass
class Reply:
    """What came back. `batches` are those with rows; `summary` came on the last batch, which has none."""

    schema: pa.Schema
    batches: list[pa.RecordBatch] = field(default_factory=list)
    metadata: list[dict] = field(default_factory=list)
    summary: dict | None = None

    @cached_property
    def table(self) -> pa.Table:
        return pa.Table.from_batches(self.batches, self.schema)

    @cached_property
    def rows(self) -> list[dict]:
        return self.table.to_pylist()

    @property
    def schema_metadata(self) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in (self.schema.metadata or {}).items()}

    def layer(self, name: str) -> "Layer":
        found = self.table.filter(pc.equal(self.table["layer_name"], name))
        assert found.num_rows, f"no rows of {name}"
        return Layer(found)

    def take(self, chunk: flight.FlightStreamChunk):
        """Files one chunk of the reply."""
        assert self.summary is None, "a batch came after the summary"
        report = parse_report(chunk.app_metadata.to_pybytes()) if chunk.app_metadata is not None else None
        assert chunk.data is not None, f"a message without a batch: {report}"
        if is_summary(report):
            assert chunk.data.num_rows == 0, "the summary came with rows"
            self.summary = report
        else:
            self.batches.append(chunk.data)
            self.metadata.append(report)


@dataclass
class Layer:
    """A layer's rows in order, and its whole arrays, which are their concatenation."""

    table: pa.Table

    @cached_property
    def rows(self) -> list[dict]:
        return self.table.to_pylist()

    @cached_property
    def codes(self) -> bytes:
        return b"".join(self.table["quantized_data"].drop_null().to_pylist())

    @cached_property
    def scales(self) -> np.ndarray:
        return pc.list_flatten(self.table["scales"]).to_numpy()

    @cached_property
    def zero_points(self) -> np.ndarray:
        return pc.list_flatten(self.table["zero_points"]).to_numpy()

    @property
    def global_scale(self) -> np.ndarray | None:
        """What its scales are divided by, [1]: one row of a quantized layer says it, if any."""
        found = self.extra_tensors
        if "weight_global_scale" not in found:
            return None
        tensor = found["weight_global_scale"]
        assert (tensor["dtype"], tensor["shape"]) == ("f32", [1])
        return np.frombuffer(tensor["data"], "<f4")

    @property
    def extra_tensors(self) -> dict[str, dict]:
        """By name: one row has each, and all of them."""
        rows = [tensors for tensors in self.table["extra_tensors"].drop_null().to_pylist() if tensors]
        assert len(rows) <= 1
        return {tensor["name"]: tensor for tensors in rows for tensor in tensors}

    @property
    def metrics(self) -> dict:
        """Of the whole layer: on its last row only."""
        *others, last = self.table["layer_metrics"].to_pylist()
        assert not any(others), "layer_metrics on a row that does not complete the layer"
        return last

    @property
    def bits(self) -> tuple:
        """Everything that must not depend on chunking, threads or CPU, byte for byte."""
        global_scale = None if self.global_scale is None else self.global_scale.tobytes()
        return self.codes, self.scales.tobytes(), self.zero_points.tobytes(), global_scale


def parse_report(data: bytes) -> dict:
    """Progress or summary: proto3 JSON, with every count there as a number."""
    found = json.loads(data)
    counts = SUMMARY_COUNTS if is_summary(found) else PROGRESS_COUNTS
    return {**found, **{key: int(found.get(key, 0)) for key in counts}}


def is_summary(report: dict | None) -> bool:
    return report is not None and "total_seconds" in report


# -- exchanges --------------------------------------------------------------------------------------------------------

def command_bytes(command) -> bytes:
    return command if isinstance(command, bytes) else json.dumps(command).encode()


def connect(location: str) -> flight.FlightClient:
    # A connection of its own, so that one test's trouble stays there. Without an authority, Unix sockets fail.
    options = [("grpc.use_local_subchannel_pool", 1)]
    if location.startswith("grpc+unix:"):
        options.append(("grpc.default_authority", "localhost"))
    return flight.connect(location, generic_options=options)


@contextlib.contextmanager
def opened(location: str, command, *, timeout: float = 120):
    """(writer, reader) of an exchange, on a connection of its own. `timeout` seconds end it, so that no test hangs."""
    with connect(location) as client, opened_on(client, command, timeout=timeout) as stream:
        yield stream


@contextlib.contextmanager
def opened_on(client: flight.FlightClient, command, *, timeout: float = 120):
    """The same on the client's connection."""
    descriptor = flight.FlightDescriptor.for_command(command_bytes(command))
    writer, reader = client.do_exchange(descriptor, options=flight.FlightCallOptions(timeout=timeout))
    try:
        yield writer, reader
    finally:
        # The server's word came through the reader; close only repeats it.
        with contextlib.suppress(pa.ArrowException):
            writer.close()


def exchange(location: str, command, batches, *, schema: pa.Schema | None = None) -> Reply:
    """Writes in a thread, reads here: the loop for any model. Raises the server's error."""
    with opened(location, command) as (writer, reader):
        failures = []

        def write():
            try:
                # Not `done_writing`: when an error reaches the reading thread at that moment, gRPC ends the process.
                _write_all(writer, batches, schema)
                writer.write_metadata(END)
            except Exception as error:  # handed to the reading side below, which would wait for the rest
                failures.append(error)
                reader.cancel()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            reply = _read_all(reader)
        except BaseException as error:
            reader.cancel()
            thread.join()
            if failures and isinstance(error, flight.FlightCancelledError):
                raise failures[0] from None
            raise
        thread.join()
        if failures:
            raise failures[0]
        return reply


def lockstep(location: str, command, batches, *, schema: pa.Schema | None = None) -> Reply:
    """Writes a batch and reads until as many rows are back, in one thread: the loop for schemes that do not buffer."""
    with opened(location, command) as (writer, reader):
        reply = None
        pending = 0
        for batch in _begun(writer, batches, schema):
            writer.write_batch(batch)
            reply = reply or Reply(reader.schema)
            pending += batch.num_rows
            while pending > 0:
                reply.take(reader.read_chunk())
                pending -= reply.batches[-1].num_rows
        writer.done_writing()
        return _read_all(reader, reply)


def write_then_read(location: str, command, batches, *, schema: pa.Schema | None = None) -> Reply:
    """Writes everything before the first read: the obvious loop, which works while the results fit the budget."""
    with opened(location, command) as (writer, reader):
        _write_all(writer, batches, schema)
        writer.done_writing()
        return _read_all(reader)


def failure(location: str, command, batches, *, schema: pa.Schema | None = None) -> tuple[str, str, str]:
    """(name of the gRPC code, reason, whole message) of an exchange that must fail."""
    sent = frames.stream(command_bytes(command), batches, schema)
    _, code, message = frames.raw_exchange(location, sent)
    assert code != "OK", "the exchange was answered, expected an error"
    return code, reason_of(message), message


def reason_of(message: str) -> str:
    """The word in brackets at the start of a status message."""
    found = re.match(r"\[([a-z0-9_]+)\] \S", message)
    assert found, f"{message!r} does not begin with `[reason] sentence`"
    return found[1]


def _begun(writer, batches, schema):
    batches = iter(batches)
    first = next(batches, None)
    writer.begin(schema or first.schema)
    return itertools.chain([] if first is None else [first], batches)


def _write_all(writer, batches, schema):
    for batch in _begun(writer, batches, schema):
        writer.write_batch(batch)


def _read_all(reader, reply: Reply | None = None) -> Reply:
    reply = reply or Reply(reader.schema)
    while True:
        try:
            chunk = reader.read_chunk()
        except StopIteration:
            break
        reply.take(chunk)
    assert reply.summary is not None, "the reply ended without a summary"
    return reply
