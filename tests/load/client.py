"""The client of every Flight row: pyarrow, in this process, writing from one thread and reading in the other."""

import threading
from collections.abc import Iterable, Iterator

import pyarrow as pa
from pyarrow import flight

import layers

CALL_SECONDS_MAX = 300  # a server that hangs fails its row; a slow GiB takes 10 seconds


def connect(address: str) -> flight.FlightClient:
    return flight.connect(address)


def call_options() -> flight.FlightCallOptions:
    return flight.FlightCallOptions(timeout=CALL_SECONDS_MAX)


def put(connection: flight.FlightClient, batches: list[pa.RecordBatch]) -> int:
    """Sends `batches` and waits until the server says how many rows it received, which must be all."""
    descriptor = flight.FlightDescriptor.for_command(b"put")
    writer, metadata = connection.do_put(descriptor, batches[0].schema, call_options())
    with writer:
        for batch in batches:
            writer.write_batch(batch)
        writer.done_writing()
        rows = int(metadata.read().to_pybytes())
    return input_bytes(batches, rows)


def exchange(
    connection: flight.FlightClient, command: bytes, batches: list[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Writes `batches` and yields what comes back meanwhile, to the end of the stream."""
    writer, reader = connection.do_exchange(flight.FlightDescriptor.for_command(command), call_options())
    with writer:
        writer.begin(batches[0].schema)
        writing = threading.Thread(target=write, args=(writer, batches))
        writing.start()
        try:
            for chunk in reader:
                if chunk.data is not None:
                    yield chunk.data
        except BaseException:
            reader.cancel()  # frees a writer that waits for a window, also on Ctrl-C
            raise
        finally:
            writing.join()  # before `close`, which refuses while another thread uses the stream


def write(writer: flight.FlightStreamWriter, batches: list[pa.RecordBatch]) -> None:
    try:
        for batch in batches:
            writer.write_batch(batch)
        writer.done_writing()
    except (pa.ArrowException, OSError):
        pass  # the stream ended early; the reader is told why, and this thread only that it cannot write


def drain(batches: list[pa.RecordBatch], answers: Iterable[pa.RecordBatch]) -> int:
    """Reads `answers` and drops each, so that the client's memory stays warm. Returns the bytes of input."""
    return input_bytes(batches, sum(answer.num_rows for answer in answers))


def input_bytes(batches: list[pa.RecordBatch], rows: int) -> int:
    """The bytes of weights in `batches`, provided that `rows`, seen at the other end, are all of theirs."""
    if rows != len(batches):
        raise AssertionError(f"expected {len(batches)} rows, one a batch, and met {rows}")
    return len(batches) * layers.RUN_BYTES
