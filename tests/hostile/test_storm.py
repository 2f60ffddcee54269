"""A minute of the load test, and ten thousand streams that are opened and dropped."""

import time

import numpy as np
import pytest

from harness import frames, wire
from harness.command import quantize
from harness.server import eventually
from hostile import scenes, storm

MIB = 1 << 20
SECONDS = 60
DROPPED = 10_000


def test_a_minute_of_two_hundred_streams_that_do_what_they_like():
    server = storm.start()
    try:
        idle_files = server.open_files()
        outcome = storm.storm(server, SECONDS, seed=20261125)
        print(f"{outcome.seconds:.0f} s, {outcome.bytes_in / 1e9:.1f} GB, peak {outcome.peak_rss_bytes / MIB:.0f} MiB")
        print("\n".join(f"{count:6} {what}" for what, count in sorted(outcome.counts.items())))
        assert not outcome.wrong, "\n".join(outcome.wrong[:20])
        assert outcome.counts["whole: the same bits"] > 100, outcome.counts
        assert outcome.peak_rss_bytes < storm.RSS_MAX
        eventually(lambda: server.open_files() <= idle_files, what="connections are closed")
        scenes.good_stream(server.location)
        assert not storm.unexpected_lines(server), storm.unexpected_lines(server)[:20]
    finally:
        server.end()


@pytest.mark.parametrize("how", ["opened", "commanded", "half a span", "answered and unread"])
def test_streams_that_are_opened_and_dropped_leave_nothing(how, fresh_server):
    """A quarter of ten thousand each. A place or a permit that stayed would refuse the last ones; a task would show in memory."""
    server = fresh_server("--streams-max", 4, "--memory-bytes-max", 32 * MIB, "--message-bytes-max", 8 * MIB)
    tensor, int8 = (wire.command_bytes(quantize(scheme)) for scheme in ("int8/tensor", "int8"))
    rows = wire.rows(wire.layer_batch("layer", np.ones((256, 1024), np.float32), channels_per_row=128))
    sent = {
        "opened": [],
        "commanded": [frames.opening(int8)],
        "half a span": list(frames.stream(tensor, rows[:1])),
        "answered and unread": list(frames.stream(int8, rows)),
    }[how]

    def drop(connection):
        # As few as `streams_max` are dropped and not yet noticed at a time: more would be refused, and rightly.
        with frames.Call(server.location, on=connection) as call:
            for frame in sent:
                call.send(frame)
        eventually(lambda: is_free(connection), what="the place is free again")

    def is_free(connection):
        with frames.Call(server.location, on=connection) as call:
            for frame in frames.stream(int8, [rows[0].slice(0, 0)], schema=rows[0].schema):
                call.send(frame)
            call.done_writing()
            return call.read_all()[1] == "OK"

    with frames.channel(server.location) as connection:
        for _ in range(200):
            drop(connection)
        files, memory, threads = server.open_files(), server.rss_bytes(), server.threads()
        began = time.monotonic()
        for _ in range(DROPPED // 4 - 200):
            drop(connection)
        print(f"{how}: {(time.monotonic() - began) / DROPPED * 4e3:.2f} ms each")
        assert server.open_files() <= files
        assert server.threads() <= threads
        eventually(lambda: server.rss_bytes() <= memory + 8 * MIB, what=f"RSS returns to {memory} bytes")
    scenes.good_stream(server.location)
