"""Clients that misbehave in time: they vanish, stop half-way, or do not read. Each scene returns (code, reason)."""

import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from harness import frames, oracle, wire
from harness.command import quantize
from harness.server import Server, eventually

MIB = 1 << 20
INT8, TENSOR = quantize("int8"), quantize("int8/tensor")
SPAN, HALF = (384, 4096), 192  # 6 MiB of f32, and 7.6 with the codes; half of it is 3 MiB
# Room for two spans at once, in half of the budget.
SMALL = (
    "--memory-bytes-max", 32 * MIB, "--layer-bytes-max", 8 * MIB, "--message-bytes-max", 8 * MIB,
    "--stall-seconds", 2, "--idle-seconds", 6,
)
# What a server may use beside its budget: code, threads, the allocator's own, HTTP/2 windows.
BESIDE_BUDGET = 128 * MIB


def good_stream(location: str):
    """Two small layers, compared with their golden."""
    rng = np.random.default_rng(1)
    layers = {name: rng.standard_normal((8, 32)).astype(np.float32) for name in ("good.a", "good.b")}
    reply = wire.exchange(location, INT8, [wire.layer_batch(name, layer) for name, layer in layers.items()])
    for name, layer in layers.items():
        expected = oracle.integers(layer, 8)
        assert reply.layer(name).codes == expected.data
        assert np.array_equal(reply.layer(name).scales, expected.scales)
    assert reply.summary["layers_quantized"] == 2


def whole_span(location: str):
    """A layer that needs a reservation: it passes only if nobody else's is left behind."""
    layer = np.random.default_rng(2).standard_normal(SPAN).astype(np.float32)
    reply = wire.exchange(location, TENSOR, [wire.layer_batch("span", layer, channels_per_row=HALF)])
    assert reply.layer("span").codes == oracle.integers(layer, 8, per_tensor=True).data


def half_a_span(name="half") -> list[pa.RecordBatch]:
    """The first half of a layer that has one scale."""
    return wire.rows(wire.layer_batch(name, np.ones(SPAN, np.float32), channels_per_row=HALF))[:1]


def streams_of_512_mib() -> tuple[list[np.ndarray], list[pa.RecordBatch]]:
    """128 layers of 4 MiB, over one buffer."""
    layer = np.random.default_rng(3).standard_normal((256, 4096)).astype(np.float32)
    return layer, [wire.layer_batch(f"layer{index}", layer) for index in range(128)]


# -- vanishing --------------------------------------------------------------------------------------------------------

VICTIM = """
import contextlib, sys
from harness import wire
from hostile import scenes
with contextlib.ExitStack() as streams:
    for _ in range(4):
        writer, reader = streams.enter_context(wire.opened(sys.argv[1], scenes.TENSOR))
        batch, = scenes.half_a_span()
        writer.begin(batch.schema)
        writer.write_batch(batch)
    print("half", flush=True)
    sys.stdin.read()
"""


def a_process_is_killed(server: Server):
    """A client process dies with four streams, each half-way through a layer that the server buffers."""
    def vanish():
        tests = str(Path(__file__).resolve().parents[1])
        with subprocess.Popen(
            [sys.executable, "-c", VICTIM, server.location], env={**os.environ, "PYTHONPATH": tests},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as victim:
            assert victim.stdout.readline() == b"half\n"
            victim.send_signal(signal.SIGKILL)
            victim.wait()
    return nothing_stays(server, vanish, times=12)


def a_connection_is_cut_inside_a_message(server: Server):
    """The connection breaks after 2 MiB of a message of 3 MiB."""
    def vanish():
        with cut_after(server.location, 2 * MIB) as location, frames.Call(location, timeout=30) as call:
            for frame in frames.stream(wire.command_bytes(TENSOR), half_a_span()):
                call.send(frame)
            assert call.status()[0] == "UNAVAILABLE"
    return nothing_stays(server, vanish, times=72)


def nothing_stays(server: Server, vanish, *, times: int):
    """144 MiB are sent in all; files are closed, room is free again, and memory returns to an idle server's."""
    files, memory = server.open_files(), server.rss_bytes()
    for _ in range(times):
        vanish()
    eventually(lambda: server.open_files() <= files, what=f"open files return to {files}")
    whole_span(server.location)
    # The allocator keeps pages that it has freed: up to twice the budget, however much has come and gone.
    eventually(lambda: server.rss_bytes() <= memory + 64 * MIB, what=f"RSS returns to {memory} bytes")
    return "OK", "-"


@contextlib.contextmanager
def cut_after(location: str, limit: int):
    """The location of a proxy that passes on `limit` bytes of a request and then resets both connections."""
    host, port = location.removeprefix("grpc://").rsplit(":", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def relay():
            client, _ = listener.accept()
            with client, socket.create_connection((host, int(port))) as upstream:
                back = threading.Thread(target=copy, args=(upstream, client, None))
                back.start()
                copy(client, upstream, limit)
                for end in (client, upstream):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RD)  # wakes the other thread
                back.join()

        def copy(source, target, count):
            with contextlib.suppress(OSError):
                while (count is None or count > 0) and (data := source.recv(min(65536, count or 65536))):
                    target.sendall(data)
                    count = count and count - len(data)

        thread = threading.Thread(target=relay)
        thread.start()
        yield f"grpc://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


# -- not reading ------------------------------------------------------------------------------------------------------

def reads_only_after_writing_512_mib(server: Server):
    """The results, 128 MiB, fit in half of the default budget: the obvious loop works, in bounded memory."""
    layer, batches = streams_of_512_mib()
    reply = wire.write_then_read(server.location, INT8, batches)
    expected = oracle.integers(layer, 8)
    data, scales = pa.scalar(expected.data, pa.large_binary()), expected.scales.tolist()
    assert reply.table["layer_name"].to_pylist() == [f"layer{index}" for index in range(128)]
    assert all(value == data for value in reply.table["quantized_data"])
    assert all(value.as_py() == scales for value in reply.table["scales"])
    assert server.peak_rss_bytes() < 512 * MIB + BESIDE_BUDGET
    return "OK", "-"


def never_reads(server: Server):
    """512 MiB against a budget of 32: refused at the first read; meanwhile others are served, in bounded memory."""
    _, batches = streams_of_512_mib()
    with frames.Call(server.location) as call:
        sender = threading.Thread(target=call.send_all, args=(frames.stream(wire.command_bytes(INT8), batches),))
        sender.start()
        good_stream(server.location)
        while sender.is_alive():
            good_stream(server.location)
        _, code, message = call.read_all()
    assert server.peak_rss_bytes() < 32 * MIB + BESIDE_BUDGET
    assert "read" in message
    return code, wire.reason_of(message)


# -- stopping half-way ------------------------------------------------------------------------------------------------

def stops_half_way(server: Server, command=TENSOR):
    """A client that falls silent inside a layer."""
    with frames.Call(server.location) as call:
        for frame in frames.stream(wire.command_bytes(command), half_a_span()):
            call.send(frame)
        _, code, message = call.read_all()
    return code, wire.reason_of(message)


def says_nothing(server: Server):
    """A client that opens a stream and sends not even a command."""
    with frames.Call(server.location) as call:
        _, code, message = call.read_all()
    return code, wire.reason_of(message)


def lasts_too_long(server: Server):
    """A client that sends a layer now and then, for ever, and reads what comes."""
    with frames.Call(server.location) as call, ThreadPoolExecutor(1) as readers:
        end = readers.submit(call.read_all)
        layer = np.ones((2, 8), np.float32)
        endless = (wire.layer_batch(f"layer{index}", layer) for index in itertools.count())
        for frame in frames.stream(wire.command_bytes(INT8), endless):
            call.send(frame)
            if end.done():
                break
            time.sleep(0.1)
        replies, code, message = end.result()
    assert len(replies) > 5
    return code, wire.reason_of(message)


def twenty_four_stop_half_way(server: Server):
    """Two hold their spans until they have been idle, the others find no room; whoever needs no span is served."""
    with contextlib.ExitStack() as open_calls, ThreadPoolExecutor(24) as readers:
        calls = [open_calls.enter_context(frames.Call(server.location)) for _ in range(24)]
        first_refused, ends = threading.Event(), []

        def end_of(call):
            _, code, message = call.read_all()
            ends.append((code, wire.reason_of(message)))
            first_refused.set()

        for index, call in enumerate(calls):
            for frame in frames.stream(wire.command_bytes(TENSOR), half_a_span(f"half{index}")):
                assert call.send(frame)
        reading = [readers.submit(end_of, call) for call in calls]
        good_stream(server.location)  # while they hold or wait
        first_refused.wait()
        good_stream(server.location)  # while the holders still hold
        for reader in reading:
            reader.result()
    assert set(ends) == {("RESOURCE_EXHAUSTED", "busy"), ("DEADLINE_EXCEEDED", "idle")}, ends
    assert ends.count(("DEADLINE_EXCEEDED", "idle")) >= 2, ends
    whole_span(server.location)
    # Each had sent 3 MiB.
    assert server.peak_rss_bytes() < 32 * MIB + 24 * 3 * MIB + BESIDE_BUDGET
    return "RESOURCE_EXHAUSTED,DEADLINE_EXCEEDED", "busy,idle"


def one_stream_too_many(server: Server):
    """Two streams are open on a server that takes two; the third is refused, and served when one has ended."""
    with held_stream(server), contextlib.ExitStack() as second:
        second.enter_context(held_stream(server))
        with frames.Call(server.location) as third:
            _, code, message = third.read_all()
        second.close()
        eventually(lambda: not refused(server), what="a place is free again")
    return code, wire.reason_of(message)


def one_stream_too_many_for_a_connection(server: Server):
    """Two streams are open on one connection, which is all that it may have; another connection is served."""
    with wire.connect(server.location) as client, contextlib.ExitStack() as streams:
        for _ in range(2):
            writer, reader = streams.enter_context(wire.opened_on(client, INT8))
            batch = wire.layer_batch("held", np.ones((2, 8), np.float32))
            writer.begin(batch.schema)
            writer.write_batch(batch)
            assert reader.read_chunk().data.num_rows == 1
        with pytest.raises(pa.ArrowException) as error, wire.opened_on(client, INT8) as (writer, reader):
            reader.read_chunk()
        assert "[streams_exceeded] 2 streams are open, as many as `connection_streams_max`" in str(error.value)
        with frames.Call(server.location) as call:
            for frame in frames.stream(wire.command_bytes(INT8), [batch]):
                call.send(frame)
            call.done_writing()
            assert call.read_all()[1] == "OK"
    return "RESOURCE_EXHAUSTED", "streams_exceeded"


def refused(server: Server) -> bool:
    """Whether a good stream is turned away for want of a place."""
    try:
        good_stream(server.location)
    except pa.ArrowException as error:
        assert "[streams_exceeded]" in str(error)
        return True
    return False


@contextlib.contextmanager
def held_stream(server: Server):
    """A stream in the middle of its work: one layer answered, more to come."""
    with wire.opened(server.location, INT8) as (writer, reader):
        batch = wire.layer_batch("held", np.ones((2, 8), np.float32))
        writer.begin(batch.schema)
        writer.write_batch(batch)
        assert reader.read_chunk().data.num_rows == 1
        yield writer, reader
