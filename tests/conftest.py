"""Fixtures: a server for the session, and servers with their own flags. Both must end well: see `Server.end`."""

import signal

import pytest

from harness.model import write_model
from harness.server import Server

# A shell that starts us in the background has us ignore these, and every process that we start with us: then no test that
# interrupts one could pass.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def server():
    """One server with default flags, shared by tests that leave it as they found it."""
    running = Server.start()
    yield running
    running.end()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model's folder, which nobody changes."""
    return write_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def s3():
    """An S3-compatible server with one bucket; each test has prefixes of its own."""
    from harness import stores  # boto3 takes a second

    store = stores.S3()
    yield store
    store.stop()


@pytest.fixture
def fresh_server():
    """`fresh_server(*flags, env=None, listen=..., faults=False)`: a server for this test, stopped after it.

    `faults=True` allows lines with ERROR or `panicked` in its log.
    """
    started = []

    def start(*flags, faults=False, **options):
        running = Server.start(*flags, **options)
        started.append((running, faults))
        return running

    yield start
    for running, _ in started:
        running.stop()
    for running, faults in started:
        running.end(faults=faults)
