"""The other ends that we are compared with, one process each: `python peers.py tcp | put | echo | int8`.

Plain use of pyarrow's own server (C++ inside), as its users write it: one thread a stream, which reads a batch, works
and answers.
"""

import socket
import sys

import numpy as np
import pyarrow as pa
from pyarrow import flight

import layers

BLOCK_ROWS = 16  # 256 KiB of f32 a temporary: they stay in the L2 cache, which is numpy's best case
LISTEN = "127.0.0.1"


class Put(flight.FlightServerBase):
    """Receives, discards, and says how many rows there were."""

    def do_put(self, context, descriptor, reader, writer):
        rows = sum(chunk.data.num_rows for chunk in reader)
        writer.write(str(rows).encode())


class Echo(flight.FlightServerBase):
    def do_exchange(self, context, descriptor, reader, writer):
        writer.begin(reader.schema)
        for chunk in reader:
            writer.write_batch(chunk.data)


class Int8(flight.FlightServerBase):
    """Quantizes with numpy; the codes are handed over without a copy."""

    SCHEMA = pa.schema({
        "layer_name": pa.utf8(), "quantized_data": pa.large_binary(), "scales": pa.list_(pa.float32()),
    })

    def do_exchange(self, context, descriptor, reader, writer):
        writer.begin(self.SCHEMA)
        for chunk in reader:
            codes, scales = int8(layers.run_of(chunk.data))
            writer.write_batch(pa.RecordBatch.from_arrays([
                chunk.data["layer_name"],
                layers.large_binary(codes),
                pa.ListArray.from_arrays(pa.array([0, scales.size], pa.int32()), pa.array(scales.reshape(-1))),
            ], schema=self.SCHEMA))


def int8(run: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pinned formula, block by block. The assignment to `codes` is its `astype(int8)`, less one copy."""
    codes = np.empty(run.shape, np.int8)
    scales = np.empty((len(run), 1), np.float32)
    for start in range(0, len(run), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        x = run[block]
        s = abs(x).max(1, keepdims=True) / 127.5
        codes[block] = np.clip(np.rint(x / s), -128, 127)
        scales[block] = s
    return codes, scales


def serve_tcp() -> None:
    """Receives whatever each connection sends into one buffer of 1 MiB, and answers with the count."""
    buffer = bytearray(layers.MIB)
    with socket.create_server((LISTEN, 0)) as listener:
        print(f"listening tcp://{LISTEN}:{listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                received = 0
                while size := connection.recv_into(buffer):
                    received += size
                connection.sendall(str(received).encode())


def serve_flight(server: flight.FlightServerBase) -> None:
    print(f"listening grpc://{LISTEN}:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    role = sys.argv[1]
    if role == "tcp":
        serve_tcp()
    else:
        serve_flight({"put": Put, "echo": Echo, "int8": Int8}[role](f"grpc://{LISTEN}:0"))
