"""Streams of the Python client end well however they end: paused, dropped, interrupted, failed. Nothing is left."""

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow import flight

import quarrel
from harness import oracle, wire
from harness.server import eventually
from quarrel import stream

MIB = 1 << 20
LAYER = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)  # 2 MiB; its codes are 0.5
# Half of it, 16 MiB, is what a stream may hold: a sixth of the results of `MANY` layers.
SMALL = ("--memory-bytes-max", 32 * MIB, "--layer-bytes-max", 8 * MIB, "--message-bytes-max", 8 * MIB)
IMPATIENT = ("--idle-seconds", 2, "--stall-seconds", 1)
MANY = 200


def many(made=None):
    for number in range(MANY):
        if made is not None:
            made.append(number)
        yield f"layer{number}", LAYER


def threads() -> list[str]:
    """Ours that live."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("quarrel")]


def outlast_idleness(server):
    """Returns when the server has ended, as idle, a stream that began now and sent nothing: longer than it waits."""
    descriptor = flight.FlightDescriptor.for_command(b'{"quantize": {"scheme": "int8"}}')
    with wire.connect(server.location) as client:
        writer, reader = client.do_exchange(descriptor)
        with pytest.raises(flight.FlightTimedOutError, match="idle"):
            reader.read_all()
        with pytest.raises(flight.FlightTimedOutError):
            writer.close()


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as connected:
        yield connected


@pytest.fixture(autouse=True)
def nothing_left():
    """Every stream of a test is over after it, threads and all."""
    before = threads()
    yield
    gc.collect()
    assert threads() == before


def works(client):
    [layer] = client.quantize({"after": LAYER}, scheme="int8")
    assert layer.packed.tobytes() == oracle.integers(LAYER, 8).data


# -- pauses -----------------------------------------------------------------------------------------------------------

def test_results_larger_than_the_servers_memory_flow_through(fresh_server):
    server = fresh_server(*SMALL, *IMPATIENT)
    with quarrel.connect(server.location) as client:
        assert sum(layer.codes.nbytes for layer in client.quantize(many(), scheme="int8")) == MANY * LAYER.size


def test_a_consumer_that_pauses_stops_the_sending_and_loses_nothing(fresh_server):
    """Longer than the server waits for anybody, and with more to come than it can hold."""
    server = fresh_server(*SMALL, *IMPATIENT)
    made = []
    with quarrel.connect(server.location) as client:
        results = client.quantize(many(made), scheme="int8")
        first = next(results)
        outlast_idleness(server)
        assert len(made) < MANY // 2
        assert [first.name, *(layer.name for layer in results)] == [f"layer{number}" for number in range(MANY)]


def test_a_producer_that_pauses_keeps_its_stream(fresh_server):
    server = fresh_server(*IMPATIENT)

    def slow():
        yield "a", LAYER
        outlast_idleness(server)
        yield "b", LAYER

    with quarrel.connect(server.location) as client:
        assert [layer.name for layer in client.quantize(slow(), scheme="int8")] == ["a", "b"]


def test_untaken_results_are_bounded(fresh_server):
    """What lies untaken in the client is what was on its way when it had enough: not all."""
    server = fresh_server(*SMALL, *IMPATIENT)
    with quarrel.connect(server.location) as client:
        results = client.quantize(many(), scheme="int8")
        next(results)
        outlast_idleness(server)
        untaken = results._answers._stream.untaken_bytes
        assert stream.UNTAKEN_BYTES_MAX < untaken < 8 * stream.UNTAKEN_BYTES_MAX
        results.close()


def test_many_streams_of_one_client_do_not_wait_for_each_other(client):
    paused = client.quantize(many(), scheme="int8")
    next(paused)

    def one(number):
        return sum(1 for _ in client.quantize({f"{number}.{each}": LAYER for each in range(8)}, scheme="W4A16"))

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(12))) == [8] * 12
    assert sum(1 for _ in paused) == MANY - 1


# -- early ends -------------------------------------------------------------------------------------------------------

def take_one_and_drop(client):
    results = client.quantize(many(), scheme="int8")
    next(results)
    del results


def take_one_run_and_drop(client):
    runs = client.quantize(many(), scheme="int8").runs()
    next(runs)
    del runs


def leave_a_loop(client):
    for _ in client.quantize(many(), scheme="int8"):
        break


def leave_a_block(client):
    with client.quantize(many(), scheme="int8") as results:
        next(results)
    with pytest.raises(quarrel.UnavailableError, match="closed"):
        next(results)
    with pytest.raises(quarrel.UnavailableError, match="closed"):
        next(results.runs())


def read_it_twice(client):
    results = client.quantize(many(), scheme="int8")
    next(results)
    with pytest.raises(quarrel.UnavailableError, match="read already"):
        next(results.runs())


def close_twice(client):
    results = client.quantize(many(), scheme="int8")
    next(results)
    results.close()
    results.close()


def raise_in_a_loop(client):
    with pytest.raises(ZeroDivisionError):
        for _ in client.quantize(many(), scheme="int8"):
            1 / 0  # noqa: B018


def never_begin(client):
    client.quantize(many(), scheme="int8")


ENDS = [take_one_and_drop, take_one_run_and_drop, leave_a_loop, leave_a_block, read_it_twice, close_twice,
        raise_in_a_loop, never_begin]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_stream_that_is_left_half_way_ends_at_once(fresh_server, end):
    server = fresh_server("--streams-max", 1)
    with quarrel.connect(server.location) as client:
        end(client)
        assert threads() == []

        def place_is_free():
            try:
                works(client)
            except quarrel.BusyError as error:
                assert error.reason == "streams_exceeded" and error.retryable
                return False
            return True

        eventually(place_is_free)


def test_a_client_that_closes_ends_its_streams(server):
    client = quarrel.connect(server.location)
    results = client.quantize(many(), scheme="int8")
    layer = next(results)
    client.close()
    client.close()
    assert threads() == []
    with pytest.raises(quarrel.UnavailableError, match="closed"):
        next(results)
    for call in (lambda: list(client.quantize({"a": LAYER}, scheme="int8")), client.schemes, layer.dequantize):
        with pytest.raises(quarrel.UnavailableError, match="the client is closed"):
            call()
    assert layer.codes.shape == LAYER.shape


def test_a_generator_is_closed_with_its_stream(client):
    closed = []

    def layers():
        try:
            yield from many()
        finally:
            closed.append(True)

    results = client.quantize(layers(), scheme="int8")
    next(results)
    results.close()
    assert closed == [True]


class Collecting:
    """A lock under which the collector runs, as it may wherever something is made under a lock."""

    def __init__(self, lock):
        self.lock = lock

    def __enter__(self):
        self.lock.__enter__()
        gc.collect()

    def __exit__(self, *raised):
        return self.lock.__exit__(*raised)


def test_the_collector_may_close_a_stream_where_threads_cannot_end(client, monkeypatch):
    """`threading.enumerate` makes a list under the lock that threads need to end."""
    monkeypatch.setattr(stream, "JOIN_SECONDS", 0.2)
    gc.disable()
    try:
        results = iter(client.quantize(many(), scheme="int8"))
        next(results)
        cycle = [results]
        cycle.append(cycle)
        del results, cycle
        with monkeypatch.context() as patched:
            patched.setattr(threading, "_active_limbo_lock", Collecting(threading._active_limbo_lock))
            threads()
    finally:
        gc.enable()
    eventually(lambda: not threads())
    works(client)


# -- exceptions -------------------------------------------------------------------------------------------------------

class Mine(Exception):
    """Raised by the caller's code, for the caller."""


@pytest.mark.parametrize("kind", [Mine, ValueError, OSError, KeyboardInterrupt, SystemExit, quarrel.InvalidInputError,
                                  flight.FlightServerError])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_what_the_iterable_raises_reaches_the_caller_unchanged(client, kind, at):
    error = kind("told by the iterable")

    def layers():
        for number in range(at):
            yield f"layer{number}", LAYER
        raise error

    with pytest.raises(kind) as caught:
        list(client.quantize(layers(), scheme="int8"))
    assert caught.value is error
    works(client)


def test_what_a_progress_function_raises_reaches_the_caller(client):
    def shown(_):
        raise Mine

    with pytest.raises(Mine):
        list(client.quantize(many(), scheme="int8", progress=shown))


def test_the_servers_error_comes_after_the_layers_before_it(client):
    bad = LAYER.copy()
    bad[3, 4] = np.inf
    names = []
    with pytest.raises(quarrel.InvalidInputError) as caught:
        for layer in client.quantize({"a": LAYER, "b": LAYER, "c": bad}, scheme="int8"):
            names.append(layer.name)
    assert names == ["a", "b"]
    assert (caught.value.reason, caught.value.layer) == ("non_finite", "c")
    works(client)


def test_a_failed_command_ends_a_sender_that_has_much_to_send(client):
    made = []
    with pytest.raises(quarrel.InvalidInputError, match="scheme_unknown|unknown scheme"):
        list(client.quantize(many(made), scheme="int99"))
    assert len(made) < MANY


def test_a_server_that_dies_is_an_unavailable_error(fresh_server):
    server = fresh_server(faults=True)
    with quarrel.connect(server.location) as client:
        results = client.quantize(many(), scheme="int8")
        next(results)
        server.terminate()
        with pytest.raises(quarrel.UnavailableError) as caught:
            list(results)
            list(client.quantize(many(), scheme="int8"))
        assert caught.value.retryable
        assert isinstance(caught.value, ConnectionError)


INTERRUPTED = """
import sys, threading
import numpy as np
import quarrel

def layers():
    number = 0
    while True:
        yield f"layer{number}", np.ones((512, 1024), np.float32)
        number += 1

client = quarrel.connect(sys.argv[1])
try:
    for taken, _ in enumerate(client.quantize(layers(), scheme="int8")):
        if taken == 3:
            print("taken", flush=True)
except KeyboardInterrupt:
    pass
print([thread.name for thread in threading.enumerate() if thread.name.startswith("quarrel")])
print(len(client.quantize({"after": np.ones((4, 64), np.float32)}, scheme="int8").collect()))
"""


def script(code, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code, *arguments], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_ctrl_c_in_a_loop_ends_the_stream_and_the_client_goes_on(server):
    process = script(INTERRUPTED, server.location)
    assert process.stdout.readline() == "taken\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, process.returncode) == ("[]\n1\n", 0), err


WAITING = """
import sys, queue
import numpy as np
import quarrel

def layers():
    yield "a", np.ones((4, 64), np.float32)
    print("waiting", flush=True)
    queue.Queue().get()

client = quarrel.connect(sys.argv[1])
for _ in client.quantize(layers(), scheme="int8"):
    pass
"""


def test_ctrl_c_ends_a_program_whose_iterable_waits_for_ever(server):
    process = script(WAITING, server.location)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in err


UNFINISHED = """
import sys
import numpy as np
import quarrel

def layers():
    while True:
        yield from ((f"layer{number}", np.ones((512, 1024), np.float32)) for number in range(100000))

results = quarrel.connect(sys.argv[1]).quantize(layers(), scheme="int8")
print(next(results).name)
"""


def test_a_program_ends_though_a_stream_is_under_way(server):
    process = script(UNFINISHED, server.location)
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == ("layer0\n", "", 0)


def test_results_may_be_taken_in_another_thread(client):
    found = queue.Queue()
    results = client.quantize(many(), scheme="int8")
    threading.Thread(target=lambda: found.put([layer.name for layer in results])).start()
    assert len(found.get(timeout=120)) == MANY


def test_an_error_while_the_last_layers_are_sent_is_an_exception_and_never_the_end_of_the_process(server):
    """pyarrow's `done_writing`, called while the other thread meets the server's error, makes gRPC abort."""
    code = (
        "import sys, numpy as np, quarrel\n"
        "layers = {f'l{i}': np.full((1024, 1024), .5, np.float32) for i in range(3)}\n"
        "layers['l1'][7, 7] = np.nan\n"
        "with quarrel.connect(sys.argv[1]) as client:\n"
        "    for _ in range(20):\n"
        "        try:\n"
        "            client.quantize(layers, scheme='int8').collect()\n"
        "        except quarrel.InvalidInputError as error:\n"
        "            assert error.reason == 'non_finite', error\n"
        "print('alive')\n"
    )
    source = Path(quarrel.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, server.location], env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True, text=True, timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
