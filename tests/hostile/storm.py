"""Hundreds of streams at once, of random sizes, speeds, cancels and faults, against one server.

Every stream that completes is compared with its oracle, byte for byte; every other one ends with the reason that its fault has, or with one that
says to try again. Run it for minutes with tests/load/storm.py; test_storm.py is its minute inside of `make test`.
"""

import collections
import contextlib
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from pyarrow import flight

from harness import frames, oracle, wire
from harness.command import quantize
from harness.server import Server
from hostile import scenes

MIB = 1 << 20
STREAMS = 200
FLAGS = {
    "memory-bytes-max": 192 * MIB, "message-bytes-max": 8 * MIB, "layer-bytes-max": 32 * MIB, "streams-max": 160,
    "connections-max": 512, "stall-seconds": 4, "idle-seconds": 20, "discard-seconds": 20,
}
# Streams may fill their windows unasked, 2 MiB each: on a quiet machine few do at the same time, on a busy one most.
WINDOWS = FLAGS["streams-max"] * 2 * MIB
RSS_MAX = FLAGS["memory-bytes-max"] + WINDOWS + scenes.BESIDE_BUDGET
TRY_AGAIN = {"busy", "streams_exceeded"}
# Lines of the server's log that are no fault. None.
EXPECTED_LINES: tuple[str, ...] = ()
STREAM_SECONDS_MAX = 90
UNREAD = threading.Semaphore(2)


@dataclass
class Sample:
    """A layer, and what a scheme makes of it."""

    weights: np.ndarray
    scheme: str
    codes: bytes
    scales: np.ndarray


@dataclass
class Outcome:
    """What became of all streams: how often each, and what was wrong."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    bytes_in: int = 0
    wrong: list[str] = field(default_factory=list)
    peak_rss_bytes: int = 0
    seconds: float = 0


class Refused(Exception):
    """The server says to try again later."""


def samples(random_numbers: random.Random) -> list[Sample]:
    """Of a few KiB to 4 MiB, by the schemes that buffer nothing, a block and a whole layer."""
    rng = np.random.default_rng(random_numbers.getrandbits(32))
    makers: list[tuple[str, Callable]] = [
        ("int8", lambda x: oracle.integers(x, 8)),
        ("int8/tensor", lambda x: oracle.integers(x, 8, per_tensor=True)),
        ("int4/g64", lambda x: oracle.integers(x, 4, group=64)),
        ("FP8_BLOCK", lambda x: oracle.fp8(x, block=(128, 128))),
    ]
    made = []
    for scheme, make in makers:
        for _ in range(5):
            channels = random_numbers.choice([8, 64, 128, 512, 1024])
            columns = 128 * random_numbers.choice([1, 2, 5, 8])
            weights = (rng.standard_normal((channels, columns)) * 0.05).astype(np.float32)
            expected = make(weights)
            made.append(Sample(weights, scheme, expected.data, np.asarray(expected.scales)))
    return made


# -- what a client does -----------------------------------------------------------------------------------------------

class Client:
    """One of many, in a thread of its own: stream after stream until time is up."""

    def __init__(self, server: Server, pool: list[Sample], seed: int, outcome: Outcome, lock: threading.Lock):
        self.server, self.pool, self.outcome, self.lock = server, pool, outcome, lock
        self.random = random.Random(seed)
        self.doings: list[tuple[int, Callable[[], str]]] = [
            (40, self.whole), (8, self.lockstep), (8, self.slow), (8, self.cancelled), (4, self.cut), (5, self.not_finite),
            (4, self.interrupted), (4, self.incomplete), (3, self.unknown_scheme), (3, self.too_large), (1, self.unread),
        ]

    def run(self, until: float):
        while time.monotonic() < until:
            weights, doings = zip(*self.doings)
            do = self.random.choices(doings, weights)[0]
            try:
                said = do()
            except Refused:
                said = "refused"
                time.sleep(self.random.uniform(0, 0.2))
            except Exception as error:  # whatever it is, it is told; the others go on
                said = "wrong"
                with self.lock:
                    self.outcome.wrong.append(f"{do.__name__}: {type(error).__name__}: {str(error)[:500]}")
            with self.lock:
                self.outcome.counts[f"{do.__name__}: {said}"] += 1

    def batches(self, layers: list[tuple[str, Sample]]) -> list[pa.RecordBatch]:
        made = [
            wire.layer_batch(
                name, sample.weights, channels_per_row=self.random.choice([None, 1 + len(sample.weights) // 4, 128])
            )
            for name, sample in layers
        ]
        with self.lock:
            self.outcome.bytes_in += sum(sample.weights.nbytes for _, sample in layers)
        return [row for batch in made for row in (wire.rows(batch) if self.random.random() < 0.5 else [batch])]

    def layers(self) -> list[tuple[str, Sample]]:
        scheme = self.random.choice(self.pool).scheme
        pool = [sample for sample in self.pool if sample.scheme == scheme]
        return [(f"layers.{index}", self.random.choice(pool)) for index in range(self.random.randint(1, 6))]

    def check(self, layers: list[tuple[str, Sample]], reply: wire.Reply) -> str:
        for name, sample in layers:
            layer = reply.layer(name)
            assert layer.codes == sample.codes, f"{name}: codes differ"
            assert np.array_equal(layer.scales.reshape(-1), sample.scales.reshape(-1)), f"{name}: scales differ"
        assert reply.summary["layers_quantized"] == len(layers), reply.summary
        return "the same bits"

    def answered(self, through: Callable) -> str:
        layers = self.layers()
        with refusals():
            reply = through(self.server.location, quantize(layers[0][1].scheme), self.batches(layers))
        return self.check(layers, reply)

    def whole(self) -> str:
        return self.answered(wire.exchange)

    def lockstep(self) -> str:
        layers = [(name, sample) for name, sample in self.layers() if sample.scheme in ("int8", "int4/g64")]
        if not layers:
            return self.whole()
        with refusals():
            batches = self.batches(layers)
            reply = wire.lockstep(self.server.location, quantize(layers[0][1].scheme), batches)
        return self.check(layers, reply)

    def slow(self) -> str:
        """Reads and writes now and then."""
        pause = self.random.uniform(0, 0.05)

        def through(location, command, batches):
            with wire.opened(location, command, timeout=STREAM_SECONDS_MAX) as (writer, reader):
                writing = threading.Thread(target=slowly, args=(writer, batches, pause))
                writing.start()
                try:
                    reply = wire.Reply(reader.schema)
                    for chunk in reader:
                        reply.take(chunk)
                        time.sleep(pause)
                finally:
                    writing.join()
            return reply

        return self.answered(through)

    def cancelled(self) -> str:
        """Stops at any point, without a word."""
        layers = self.layers()
        requests = frames.stream(wire.command_bytes(quantize(layers[0][1].scheme)), self.batches(layers))
        with frames.Call(self.server.location, timeout=STREAM_SECONDS_MAX) as call:
            sending = threading.Thread(target=call.send_all, args=(requests,))
            sending.start()
            for _ in range(self.random.randint(0, 3)):
                call.read()
            time.sleep(self.random.choice([0, 0, 0.01, 0.1]))
        sending.join()
        return "gone"

    def cut(self) -> str:
        """The connection breaks somewhere inside of the request."""
        layers = self.layers()
        size = sum(sample.weights.nbytes for _, sample in layers)
        with scenes.cut_after(self.server.location, self.random.randint(100, max(101, size // 2))) as location:
            with frames.Call(location, timeout=STREAM_SECONDS_MAX) as call:
                for frame in frames.stream(wire.command_bytes(quantize(layers[0][1].scheme)), self.batches(layers)):
                    if not call.send(frame):
                        break
                code = call.status()[0] if call.done_writing() else "UNAVAILABLE"
        assert code in ("UNAVAILABLE", "RESOURCE_EXHAUSTED"), code
        return "gone"

    def fails(self, reason: str, command: dict, batches: list[pa.RecordBatch]) -> str:
        """The stream must end with that reason."""
        found = wire.failure(self.server.location, command, batches)
        got = wire.reason_of(found[2]) if found[2].startswith("[") else found[2]
        if got in TRY_AGAIN:
            raise Refused
        assert got == reason, f"expected {reason}, got {found}"
        return reason

    def not_finite(self) -> str:
        weights = np.array(self.random.choice(self.pool).weights)
        weights[self.random.randrange(len(weights)), 3] = np.nan
        return self.fails("non_finite", quantize("int8"), [wire.layer_batch("bad", weights)])

    def interrupted(self) -> str:
        rows = wire.rows(wire.layer_batch("one", np.ones((256, 128), np.float32), channels_per_row=64))
        other = wire.layer_batch("two", np.ones((8, 128), np.float32))
        return self.fails("layer_interrupted", quantize("int8"), [*rows[:2], other])

    def incomplete(self) -> str:
        rows = wire.rows(wire.layer_batch("one", np.ones((256, 128), np.float32), channels_per_row=64))
        return self.fails("layer_incomplete", quantize(self.random.choice(["int8", "int8/tensor"])), rows[:-1])

    def unknown_scheme(self) -> str:
        return self.fails("scheme_unknown", quantize("int9"), [wire.layer_batch("one", np.ones((8, 128), np.float32))])

    def too_large(self) -> str:
        large = wire.layer_batch("large", np.ones((10 * MIB // 4096, 1024), np.float32))
        return self.fails("message_too_large", quantize("int8"), [large])

    def unread(self) -> str:
        """Writes for as long as it is let, and reads nothing. Few at a time: each takes its time, and it is the others that matter."""
        if not UNREAD.acquire(blocking=False):
            return f"others do; {self.whole()}"
        try:
            return self.reads_nothing()
        finally:
            UNREAD.release()

    def reads_nothing(self) -> str:
        layer = np.ones((1024, 1024), np.float32)
        with frames.Call(self.server.location, timeout=STREAM_SECONDS_MAX) as call:
            count = 0
            endless = (wire.layer_batch(f"layers.{index}", layer) for index in range(10_000))
            for frame in frames.stream(wire.command_bytes(quantize("int8")), endless):
                count += 1
                if not call.send(frame) or count > 200:
                    break
            _, code, message = call.read_all()
        if code in ("OK", "CANCELLED", "UNAVAILABLE"):
            return code  # it had room for all; or was closed under
        reason = wire.reason_of(message)
        if reason in TRY_AGAIN:
            raise Refused
        assert reason in ("client_not_reading", "idle"), message
        return reason


def slowly(writer, batches: list[pa.RecordBatch], pause: float):
    with contextlib.suppress(pa.ArrowException):
        writer.begin(batches[0].schema)
        for batch in batches:
            writer.write_batch(batch)
            time.sleep(pause)
        writer.done_writing()


@contextlib.contextmanager
def refusals():
    """Turns what says to try again into `Refused`."""
    try:
        yield
    except (pa.ArrowException, flight.FlightError) as error:
        found = re.search(r"\[([a-z0-9_]+)\]", str(error))
        if found and found[1] in TRY_AGAIN:
            raise Refused from error
        raise


# -- all of them ------------------------------------------------------------------------------------------------------

def storm(server: Server, seconds: float, seed: int, streams: int = STREAMS) -> Outcome:
    """So many clients at once for so long."""
    outcome, lock = Outcome(), threading.Lock()
    pool = samples(random.Random(seed))
    until, began = time.monotonic() + seconds, time.monotonic()
    clients = [Client(server, pool, seed + 1 + index, outcome, lock) for index in range(streams)]
    threads = [threading.Thread(target=client.run, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.seconds = time.monotonic() - began
    outcome.peak_rss_bytes = server.peak_rss_bytes()
    return outcome


def start() -> Server:
    flags = [word for name, value in FLAGS.items() for word in (f"--{name}", value)]
    # As the image sets it: huge pages make the resident set larger than what is held.
    return Server.start(*flags, env={"MIMALLOC_ALLOW_THP": "0"})


def unexpected_lines(server: Server) -> list[str]:
    """WARN and ERROR, and panics, that nobody has listed."""
    found = [line for line in server.logs().splitlines() if re.search(r"\b(WARN|ERROR)\b|panicked", line)]
    return [line for line in found if not any(re.search(expected, line) for expected in EXPECTED_LINES)]
