"""Layers through a Quarrel server with nothing but pyarrow.

One `DoExchange` both ways at once: a thread writes while the caller reads. A client that writes everything before it
reads would fill the buffers between the two, and on a large model wait for ever.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyarrow import flight


def exchange(client: flight.FlightClient, command: dict, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Sends `batches` under `command`; the server's rows, in the order of ours."""
    descriptor = flight.FlightDescriptor.for_command(json.dumps(command).encode())
    writer, reader = client.do_exchange(descriptor)
    failures = []

    def send():
        try:
            for number, batch in enumerate(batches):
                if number == 0:
                    writer.begin(batch.schema)
                writer.write_batch(batch)
            # Not `done_writing`: in a thread of its own, that ends the process when the server's error comes at that moment.
            writer.write_metadata(b'{"end": {}}')
        except Exception as error:  # without the cancel, the reader would wait for what never comes
            failures.append(error)
            reader.cancel()

    thread = threading.Thread(target=send)
    thread.start()
    try:
        return pa.Table.from_batches([chunk.data for chunk in reader])  # the last, with no rows, carries the summary
    except flight.FlightCancelledError:
        thread.join()
        if failures:
            raise failures[0] from None
        raise
    finally:
        thread.join()
        with contextlib.suppress(pa.ArrowException):  # it could only repeat what the reader was told
            writer.close()


def layer_batches(layers: dict[str, np.ndarray], *, channels_per_row: int | None = None) -> Iterator[pa.RecordBatch]:
    """A batch of one row per layer, or per run of so many output channels. No element is copied."""
    for name, array in layers.items():
        step = channels_per_row or len(array)
        for start in range(0, len(array), step):
            run = np.ascontiguousarray(array[start : start + step]).reshape(-1)
            yield pa.record_batch(
                {
                    "layer_name": pa.array([name]),
                    "weights": pa.LargeListArray.from_arrays(pa.array([0, run.size], pa.int64()), pa.array(run)),
                    "shape": pa.array([array.shape], pa.list_(pa.int64())),
                }
            )


def dequantize(client: flight.FlightClient, quantized: pa.Table) -> dict[str, np.ndarray]:
    """The f32 layers that the quantized rows stand for: computed by the server from exactly the rows that it sent."""
    rows = [batch for batch in quantized.to_batches() if batch.num_rows]
    if not rows:
        return {}
    runs: dict[str, list[np.ndarray]] = {}
    shapes: dict[str, list[int]] = {}
    for batch in exchange(client, {"dequantize": {}}, rows).to_batches():
        for name, weights, shape in zip(batch["layer_name"], batch["weights"], batch["shape"]):
            runs.setdefault(name.as_py(), []).append(weights.values.to_numpy())
            shapes[name.as_py()] = shape.as_py()
    return {name: np.concatenate(parts).reshape(shapes[name]) for name, parts in runs.items()}
