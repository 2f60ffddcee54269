"""Layers to a checkpoint at a URI: a stream that sends, and hears of it at the end."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from itertools import groupby
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import flight

from quarrel import progress, report
from quarrel.errors import InvalidInputError, UnavailableError, of_arrow
from quarrel.heart import Heart
from quarrel.progress import Asked, Progress
from quarrel.report import Summary
from quarrel.runs import Source


def put(
    connection: flight.FlightClient,
    command: bytes,
    source: Source,
    config: Mapping[str, Any],
    heartbeat: float,
    asked: Asked,
    stop: threading.Event,
) -> Summary:
    """Sends all layers, then the end that seals them, unless `stop` was set before.

    Raises:
        Error: the server's. Then, and if the source raises, there is no checkpoint.
    """
    with contextlib.closing(_Put(connection, command, source.schema, heartbeat)) as stream:
        shown = progress.display(asked, source.bytes_total)
        try:
            layers = _send(stream, source, shown, stop)
        finally:
            if shown is not None:
                shown.close()
        return stream.end({"end": {"layers": layers, "config": config}})


def _send(stream: _Put, source: Source, shown: progress.Display | None, stop: threading.Event) -> int:
    layers = rows = sent = 0
    last = None
    for batch in source.batches:
        if stop.is_set():
            break
        _all_travel(source)
        stream.write(batch)
        for name, _ in groupby(batch.column("layer_name").to_pylist()):
            layers += name != last
            last = name
        rows += batch.num_rows
        sent += _bytes(batch.column("weights"))
        if shown is not None:
            shown.show(Progress(layers, rows, sent, 0, source.bytes_total, last))
    _all_travel(source)
    if stop.is_set():
        raise UnavailableError("the stream was cancelled", advice="Send the layers again.")
    return layers


def _bytes(weights: pa.Array) -> int:
    weights = getattr(weights, "storage", weights)
    if pa.types.is_binary(weights.type) or pa.types.is_large_binary(weights.type):
        return int(pc.sum(pc.binary_length(weights)).as_py() or 0)
    return int(weights.flatten().nbytes)


def _all_travel(source: Source) -> None:
    if source.unsent:
        layer = source.unsent[0][1]
        raise InvalidInputError(
            f"layer `{layer.name}` has dtype `{layer.dtype}`, which holds no floats: it cannot be sent",
            reason="not_float",
            layer=layer.name,
            advice="Have the server read the file with `submit`.",
        )


class _Put:
    """A request of DoPut. While nothing is written, a sign of life goes out after each `heartbeat` seconds."""

    def __init__(
        self, connection: flight.FlightClient, command: bytes, schema: pa.Schema, heartbeat: float
    ) -> None:
        self._heart = Heart(heartbeat)
        self._closed = False
        try:
            self._writer, self._reader = connection.do_put(flight.FlightDescriptor.for_command(command), schema)
        except (pa.ArrowException, OSError) as error:
            raise of_arrow(error) from None
        self._beating = self._heart.thread(self._writer)
        self._beating.start()

    def write(self, batch: pa.RecordBatch) -> None:
        try:
            with self._heart.writing:
                self._writer.write_batch(batch)
        except (pa.ArrowException, OSError) as error:
            self._fail(error)

    def end(self, end: Mapping[str, Any]) -> Summary:
        """Sends the last word, and waits for the server's."""
        said = json.dumps(end).encode()
        last = b""
        try:
            with self._heart.writing:
                self._heart.still = True
                self._writer.write_metadata(said)
            # Only now: progress that nobody reads is not sent.
            while (metadata := self._reader.read()) is not None:
                last = metadata.to_pybytes()
            self._close()
        except (pa.ArrowException, OSError) as error:
            self._fail(error)
        if b"layers_quantized" not in last:
            raise UnavailableError("the stream ended before its summary", advice="Send the layers again.")
        return report.summary(last)

    def close(self) -> None:
        """Ends the request; without its end, the server takes back what there is."""
        with contextlib.suppress(pa.ArrowException, OSError):
            self._close()

    def _close(self) -> None:
        self._stop()
        if not self._closed:  # a second time is a fault that gRPC ends the process for
            self._closed = True
            self._writer.close()

    def _fail(self, error: BaseException) -> NoReturn:
        """Writing says that the stream has ended; closing says why."""
        try:
            self._close()
        except (pa.ArrowException, OSError) as why:
            error = why
        raise of_arrow(error) from None

    def _stop(self) -> None:
        self._heart.stop()
        self._beating.join()
