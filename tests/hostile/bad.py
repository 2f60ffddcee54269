"""Requests that are wrong in one way each: batches by hand, and frames patched where pyarrow would not let us."""

import struct
from dataclasses import replace

import numpy as np
import pyarrow as pa

from harness import frames, wire
from harness.command import quantize

X = "hostile"  # the layer that every message must name
INT8 = quantize("int8")
SHAPE = (3, 9)  # 27 elements of 4 bytes: sizes that occur once in a frame, so that it can be patched


def weights(shape=SHAPE, *, dtype=np.float32, **at) -> np.ndarray:
    """Ordinary numbers; `at_7=value` puts one at flat index 7."""
    array = np.random.default_rng(7).standard_normal(shape).astype(dtype)
    for index, value in at.items():
        array.reshape(-1)[int(index.removeprefix("at_"))] = value
    return array


def layer(array=None, *, name=X, **options) -> list[pa.RecordBatch]:
    """One layer, a batch a row."""
    return wire.rows(wire.layer_batch(name, weights() if array is None else array, **options))


def names(*values, type=pa.string()):
    return pa.array(values, type)


def lists(*values, type=pa.large_list(pa.float32())):
    return pa.array(values, type)


def shapes(*values, type=pa.list_(pa.int64())):
    return pa.array(values, type)


def tensors(shape, **options) -> pa.Array:
    """One tensor of ones, as `arrow.fixed_shape_tensor`."""
    size = int(np.prod(shape))
    storage = pa.array([[1.0] * size], pa.list_(pa.float32(), size))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), shape, **options), storage)


def batch(**columns) -> list[pa.RecordBatch]:
    """One batch of the columns as given; `layer_name` and `weights` of a row of three numbers unless they are given."""
    columns = {"layer_name": names(X), "weights": lists([1.0, 2.0, 3.0]), **columns}
    return [pa.RecordBatch.from_pydict({key: value for key, value in columns.items() if value is not None})]


def many(count: int, *, name=None) -> list[pa.RecordBatch]:
    """`count` rows of empty lists, each a layer of its own unless `name` is given."""
    labels = pa.array([name] * count if name else [f"layer{index}" for index in range(count)], pa.string())
    offsets = pa.array(np.zeros(count + 1, np.int64))
    empty = pa.LargeListArray.from_arrays(offsets, pa.array([], pa.float32()))
    return [pa.RecordBatch.from_pydict({"layer_name": labels, "weights": empty})]


def request(batches, command=INT8):
    """The frames of batches that pyarrow could have sent."""
    return frames.stream(wire.command_bytes(command), batches)


def opening_and_schema(command=INT8) -> list[frames.Frame]:
    return [frames.opening(wire.command_bytes(command)), frames.schema_frame(layer()[0].schema)]


def patched(*, header=None, body=None, channels_per_row=None):
    """A good request whose batch has one thing replaced: `(old, new)` in its header or body."""
    whole = wire.layer_batch(X, weights(), channels_per_row=channels_per_row)
    frame = frames.batch_frame(whole)
    if header:
        frame = replace(frame, header=_replaced_once(frame.header, *header))
    if body:
        frame = replace(frame, body=_replaced_once(frame.body, *body))
    return [*opening_and_schema(), frame]


def _replaced_once(data: bytes, old: bytes, new: bytes) -> bytes:
    assert len(old) == len(new) and data.count(old) == 1, f"{old!r} occurs {data.count(old)} times"
    return data.replace(old, new)


def i32(*values) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def i64(*values) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def cut_body(size: int):
    """A batch whose body is shorter than its header says."""
    frame = frames.batch_frame(layer()[0])
    return [*opening_and_schema(), replace(frame, body=frame.body[:size])]


def with_header(header: bytes):
    """A batch whose header is `header`."""
    frame = frames.batch_frame(layer()[0])
    return [*opening_and_schema(), replace(frame, header=header)]


def with_fields(size: int):
    """A batch in a message that has `size` bytes of small fields, which mean nothing, beside its body."""
    frame = frames.batch_frame(layer()[0])
    return [*opening_and_schema(), frame.encode() + frames.blob(9, b"") * (size // 2)]
