"""Requests that are small: what opening a stream costs, what a layer costs, and how long one waits beside a bulk stream."""

import json
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import flight

import client
import layers
from server import Server, peer

INT8 = json.dumps({"quantize": {"scheme": "int8"}}).encode()
ECHO = b"echo"
OPENED = 300  # streams a round
LAYERS, ROWS = 10_000, 100  # of 1 KiB each, so many a batch
BULK_MIB = 2048


@dataclass
class Row:
    """A line of the second table: `measure` returns one round's figures, in the unit."""

    name: str
    unit: str
    measure: Callable[[], dict[str, float]]
    figures: list[dict[str, float]] = field(default_factory=list)


def rows(servers: ExitStack, binary: Path) -> list[Row]:
    """Ours, and the C++ server that sends back what came."""
    ours = servers.enter_context(Server([str(binary), "serve", "--listen", "127.0.0.1:0"]))
    echo = servers.enter_context(peer("echo"))
    small, bulk = client.connect(ours.address), client.connect(ours.address)
    echoed, echoed_bulk = client.connect(echo.address), client.connect(echo.address)
    many = many_layers()
    return [
        Row("open, one tiny layer, close", "ms", lambda: spread(opened(small, INT8))),
        Row("the same: C++ exchange echo", "ms", lambda: spread(opened(echoed, ECHO))),
        Row("the same beside a bulk stream", "ms", lambda: spread(beside(small, bulk, INT8))),
        Row("the same: C++ exchange echo", "ms", lambda: spread(beside(echoed, echoed_bulk, ECHO))),
        Row("10,000 layers of 1 KiB, each", "us", lambda: each(small, INT8, many)),
        Row("the same: C++ exchange echo", "us", lambda: each(echoed, ECHO, many)),
    ]


def tiny() -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({
        "layer_name": ["tiny"],
        "weights": pa.array([[0.5] * 256], pa.large_list(pa.float32())),
        "shape": pa.array([[16, 16]], pa.list_(pa.int64())),
    })


def many_layers() -> list[pa.RecordBatch]:
    weights = layers.weights().reshape(-1)[: LAYERS * 256].reshape(LAYERS, 256)
    offsets = pa.array(np.arange(ROWS + 1) * 256, pa.int64())
    return [
        pa.RecordBatch.from_pydict({
            "layer_name": [f"layers.{index}.weight" for index in range(start, start + ROWS)],
            "weights": pa.LargeListArray.from_arrays(offsets, pa.array(weights[start:start + ROWS].reshape(-1))),
            "shape": pa.array([[16, 16]] * ROWS, pa.list_(pa.int64())),
        })
        for start in range(0, LAYERS, ROWS)
    ]


def once(connection: flight.FlightClient, command: bytes, batch: pa.RecordBatch) -> float:
    """Opens a stream, sends a batch, reads to the end, closes: milliseconds."""
    start = time.perf_counter()
    writer, reader = connection.do_exchange(flight.FlightDescriptor.for_command(command), client.call_options())
    with writer:
        writer.begin(batch.schema)
        writer.write_batch(batch)
        writer.done_writing()
        rows = sum(chunk.data.num_rows for chunk in reader if chunk.data is not None)
    if rows != batch.num_rows:
        raise AssertionError(f"expected {batch.num_rows} rows back, got {rows}")
    return (time.perf_counter() - start) * 1e3


def opened(connection: flight.FlightClient, command: bytes) -> list[float]:
    batch = tiny()
    return [once(connection, command, batch) for _ in range(OPENED)]


def beside(connection: flight.FlightClient, other: flight.FlightClient, command: bytes) -> list[float]:
    """While another connection sends 2 GiB as fast as it can."""
    batch, bulk = tiny(), layers.f32(BULK_MIB)
    sending = threading.Thread(target=lambda: client.drain(bulk, client.exchange(other, command, bulk)))
    sending.start()
    took = []
    while sending.is_alive():
        took.append(once(connection, command, batch))
    return took


def each(connection: flight.FlightClient, command: bytes, batches: list[pa.RecordBatch]) -> dict[str, float]:
    start = time.perf_counter()
    rows = sum(answer.num_rows for answer in client.exchange(connection, command, batches))
    if rows != LAYERS:
        raise AssertionError(f"expected {LAYERS} rows back, got {rows}")
    return {"median": (time.perf_counter() - start) / LAYERS * 1e6}


def spread(took: list[float]) -> dict[str, float]:
    ordered = sorted(took)
    return {"median": statistics.median(ordered), "p99": ordered[len(ordered) * 99 // 100]}


def median(row: Row, figure: str) -> float | None:
    """Over the rounds."""
    found = [figures[figure] for figures in row.figures if figure in figures]
    return statistics.median(found) if found else None
