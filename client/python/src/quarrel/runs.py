"""What streams send. Layers become record batches, in runs of whole output channels, without a copy of their elements.

One schema for all: bytes with their element type beside them, so that layers of any types share a stream.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from quarrel.errors import InvalidInputError
from quarrel.reasons import REASONS

RUN_BYTES_MAX = 4 << 20
"""Bytes of a run, unless one channel is larger."""
JOINED_BYTES = 1 << 20
"""Runs smaller than this are copied together into messages of about as much: a message costs 50 us in pyarrow."""
JOINED_ROWS_MAX = 4096
"""Rows of such a message, or the server's `batch_rows_max`, if that is less."""
ENVELOPE_BYTES = 64 << 10
"""Left of the server's `message_bytes_max` for everything in a message but weights."""

SCHEMA = pa.schema(
    [
        ("layer_name", pa.string()),
        ("weights", pa.large_binary()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
    ]
)

_TENSOR = pa.struct(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)
CODED = pa.schema(
    [
        pa.field("layer_name", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("quantized_data", pa.large_binary()),
        pa.field("scales", pa.list_(pa.float32())),
        pa.field("zero_points", pa.list_(pa.int32())),
        pa.field("extra_tensors", pa.list_(_TENSOR)),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("scheme", pa.string()),
        pa.field("checksum", pa.uint32()),
    ]
)
"""The columns of an answer that `dequantize` reads."""

IMPORTANCE = pa.field("importance", pa.list_(pa.float32()))
"""The column that says how much the columns of each layer count, if any layer's do."""

Piece = tuple[int | slice, ...]
"""Where a run stands in its layer: indices of leading dimensions, then a range of the next."""


@dataclass(frozen=True)
class Layer:
    """A layer that can be sent: `read` gives a piece of it as contiguous little-endian bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    element_bytes: int
    read: Callable[[Piece], Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.element_bytes


@dataclass(frozen=True)
class Unsent:
    """A tensor that cannot travel, because it holds no floats: it comes back as kept."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Cuts:
    """Where layers are cut into runs.

    `dims_least` and `dims_most`: how many leading dimensions are channels, the least and the most that a command says
    of any layer. The client does not match names to rules. A run of whole indices of fewer dimensions is whole
    channels for more too, so the least is always right; the most is for layers that could not travel otherwise.
    """

    dims_least: int
    dims_most: int
    run_bytes: int
    message_bytes: int
    message_bytes_max: int
    joined_rows: int

    @classmethod
    def of(cls, command: Any, limits: Mapping[str, int]) -> Cuts:
        """Of a command as a dict, by everything in it that says so, for a server of these limits."""
        dims = list(_channel_dims(command)) or [1]
        message_bytes_max = limits["message_bytes_max"]
        message_bytes = max(message_bytes_max - ENVELOPE_BYTES, 1)
        joined_rows = min(JOINED_ROWS_MAX, limits["batch_rows_max"])
        run_bytes = min(RUN_BYTES_MAX, message_bytes)
        return cls(min(dims), max(dims), run_bytes, message_bytes, message_bytes_max, joined_rows)


def _channel_dims(part: Any) -> Iterator[int]:
    match part:
        case {"scheme": str(scheme), **rest}:
            said = re.search(r";channel_dims=(\d{1,9})", scheme)
            dims = rest.get("channel_dims")
            yield int(said[1]) if said else dims if isinstance(dims, int) else 1
        case dict():
            yield from itertools.chain.from_iterable(map(_channel_dims, part.values()))
        case list():
            yield from itertools.chain.from_iterable(map(_channel_dims, part))


@dataclass
class Source:
    """What a stream sends: batches of one schema, and where among their rows stand those that do not travel."""

    schema: pa.Schema
    batches: Iterator[pa.RecordBatch]
    bytes_total: int | None = None
    unsent: deque[tuple[int, Unsent]] = field(default_factory=deque)


Importance = dict[str, "np.ndarray[Any, Any]"]
"""float32 for the columns of a layer, by its name."""


@dataclass
class Row:
    """A run to send; a layer's first run carries its importance."""

    layer: Layer
    data: pa.Buffer
    importance: np.ndarray[Any, Any] | None

    @property
    def bytes(self) -> int:
        return int(self.data.size) + (0 if self.importance is None else self.importance.nbytes)


def of_layers(
    layers: Iterable[Layer | Unsent],
    cuts: Cuts,
    *,
    bytes_total: int | None,
    join_layers: bool,
    importance: Importance | None = None,
) -> Source:
    """The source of `layers`. Without `join_layers`, a layer's last run does not wait for the next layer."""
    source = Source(SCHEMA if importance is None else SCHEMA.append(IMPORTANCE), iter(()), bytes_total)
    source.batches = _batches(layers, cuts, source, join_layers, importance)
    return source


def _batches(
    layers: Iterable[Layer | Unsent], cuts: Cuts, source: Source, join_layers: bool, importance: Importance | None
) -> Iterator[pa.RecordBatch]:
    rows = 0
    unused = set(importance or ())
    enough = min(JOINED_BYTES, cuts.run_bytes // 2)  # one less than this may join one less than this
    waiting: list[Row] = []
    waiting_bytes = 0

    def joined() -> Iterator[pa.RecordBatch]:
        nonlocal waiting_bytes
        if waiting:
            batch = _joined(waiting, source.schema)
            waiting.clear()
            waiting_bytes = 0
            yield batch

    for layer in layers:
        if isinstance(layer, Unsent):
            source.unsent.append((rows, layer))
            continue
        columns = _Columns(layer, source.schema)
        said = (importance or {}).get(layer.name)
        unused.discard(layer.name)
        for piece in pieces(layer, cuts):
            data = pa.py_buffer(layer.read(piece))
            if data.size > cuts.message_bytes_max:
                raise _too_large(layer, data.size, cuts.message_bytes_max)
            rows += 1
            row, said = Row(layer, data, said), None
            if data.size >= enough:
                yield from joined()
                yield columns.batch(row)
            else:
                waiting.append(row)
                waiting_bytes += row.bytes
                if waiting_bytes >= enough or len(waiting) == cuts.joined_rows:
                    yield from joined()
            del data, row
        del layer, columns  # before the next layer is made
        if not join_layers:
            yield from joined()
    yield from joined()
    if unused:
        raise InvalidInputError(
            f"`importance` names `{min(unused)}`, which is no layer that was sent",
            advice="Correct the name, or leave it out.",
        )


def _too_large(layer: Layer, channel_bytes: int, limit: int) -> InvalidInputError:
    return InvalidInputError(
        f"layer `{layer.name}`: a channel has {channel_bytes} bytes, which is over `message_bytes_max` {limit}",
        reason="channel_too_large",
        layer=layer.name,
        advice=REASONS["channel_too_large"].advice,
    )


def pieces(layer: Layer, cuts: Cuts) -> Iterator[Piece]:
    """Cuts a layer into runs of at most `run_bytes`, or of one channel."""
    if len(layer.shape) < 2 or 0 in layer.shape:
        yield (slice(None),) * bool(layer.shape)
    else:
        yield from _pieces(layer.shape, layer.element_bytes, cuts, 1)


def _pieces(shape: tuple[int, ...], element_bytes: int, cuts: Cuts, dim: int) -> Iterator[Piece]:
    """Of what is left of a shape from its dimension `dim` on, counted from 1."""
    count, *rest = shape
    index_bytes = math.prod(rest) * element_bytes
    may = dim < cuts.dims_least and index_bytes > cuts.run_bytes
    must = dim < cuts.dims_most and index_bytes > cuts.message_bytes
    if (may or must) and len(rest) > 1:
        for index in range(count):
            for piece in _pieces(tuple(rest), element_bytes, cuts, dim + 1):
                yield index, *piece
    else:
        step = max(1, cuts.run_bytes // index_bytes)
        for start in range(0, count, step):
            yield (slice(start, min(start + step, count)),)


class _Columns:
    """The columns that all rows of a layer repeat: made once."""

    def __init__(self, layer: Layer, schema: pa.Schema) -> None:
        self.schema = schema
        self.name = pa.array([layer.name], pa.string())
        self.dtype = pa.array([layer.dtype], pa.string())
        self.shape = pa.array([layer.shape], SCHEMA.field("shape").type)

    def batch(self, row: Row) -> pa.RecordBatch:
        columns = [self.name, _binary([row.data.size], row.data), self.dtype, self.shape]
        return _of_columns(columns, [row], self.schema)


def _joined(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        pa.array([row.layer.name for row in rows], pa.string()),
        _binary([row.data.size for row in rows], pa.py_buffer(b"".join(row.data for row in rows))),
        pa.array([row.layer.dtype for row in rows], pa.string()),
        pa.array([row.layer.shape for row in rows], SCHEMA.field("shape").type),
    ]
    return _of_columns(columns, rows, schema)


def _of_columns(columns: list[pa.Array], rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    if len(schema) > len(columns):
        columns.append(pa.array([row.importance for row in rows], IMPORTANCE.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _binary(sizes: list[int], data: pa.Buffer) -> pa.LargeBinaryArray:
    """`data` as values of these sizes, not copied."""
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    return pa.Array.from_buffers(pa.large_binary(), len(sizes), [None, pa.py_buffer(offsets), data])


def of_table(rows: pa.Table | pa.RecordBatch | pa.RecordBatchReader, cuts: Cuts) -> Source:
    """The source of rows that have the wire's columns already; a large chunk travels in several messages."""
    match rows:
        case pa.RecordBatch():
            chunks: Iterable[pa.RecordBatch] = [rows]
        case pa.Table():
            chunks = rows.to_batches()
        case _:
            chunks = rows
    whole = (_of_schema(chunk, rows.schema) for chunk in chunks)
    return Source(rows.schema, (half for chunk in whole for half in halves(chunk, cuts.run_bytes)))


def _of_schema(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    if not batch.schema.equals(schema):
        raise InvalidInputError(
            f"a batch has the schema `{batch.schema}`: expected its reader's, `{schema}`",
            advice="Give every batch of a reader the same columns.",
        )
    return batch


def of_coded(layers: Iterable[Any], cuts: Cuts) -> Source:
    """The source of quantized layers: of their rows, what `dequantize` reads."""
    rows = (batch.select(CODED.names) for layer in layers for batch in layer.to_arrow().to_batches())
    return Source(CODED, (half for batch in rows for half in halves(batch, cuts.run_bytes)))


def halves(batch: pa.RecordBatch, bytes_max: int) -> Iterator[pa.RecordBatch]:
    """The batch, cut until each part is no larger, or one row."""
    if batch.num_rows > 1 and batch.nbytes > bytes_max:
        middle = batch.num_rows // 2
        yield from halves(batch.slice(0, middle), bytes_max)
        yield from halves(batch.slice(middle), bytes_max)
    elif batch.num_rows:
        yield batch
