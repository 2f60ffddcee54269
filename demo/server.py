"""A Quarrel server as a child process: started on a free port, stopped by its process id."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

from .models import REPOSITORY

start_seconds_max = 30  # a loaded machine; the server itself needs a fraction of a second
stop_seconds_max = 40  # the server drains for `drain_seconds` (30) before it gives up


class ServerError(Exception):
    """The server could not be found, started or stopped."""


def find(path: str | None = None) -> Path:
    """The binary at `path`, else the release build of this repository, else the one on PATH."""
    built = REPOSITORY / "target" / "release" / "quarrel"
    found = Path(path) if path else built if built.is_file() else shutil.which("quarrel")
    if found is None:
        raise ServerError(f"no server at `{built}` or on PATH: run `cargo build --release`, or pass its path")
    if not Path(found).is_file():
        raise ServerError(f"no server at `{found}`")
    return Path(found).resolve()


class Server:
    """`with Server(binary) as location:` runs `binary serve` for as long as the block."""

    def __init__(self, binary: Path):
        self.binary = binary

    def __enter__(self) -> str:
        self.log = tempfile.TemporaryFile("w+")  # its log would tear the table apart; shown if it fails
        command = [str(self.binary), "serve", "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        # A server that says nothing is killed, which ends the wait for its first line.
        silence = threading.Timer(start_seconds_max, self.process.kill)
        silence.start()
        line = self.process.stdout.readline()
        silence.cancel()
        if not line.startswith("listening grpc://"):
            self.process.kill()
            self.process.wait()
            said = f"said `{line.strip()}`" if line else "ended"
            raise ServerError(f"`{' '.join(command)}` {said}, expected `listening grpc://..`{self._tail()}")
        return line.split()[1]

    def __exit__(self, failure, *_):
        self.process.terminate()
        try:
            code = self.process.wait(stop_seconds_max)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise ServerError(f"the server did not stop within {stop_seconds_max} s of SIGTERM{self._tail()}") from None
        finally:
            self.process.stdout.close()
        if code != 0 and failure is None:  # what failed inside says more than how the server ended
            raise ServerError(f"the server ended with code {code}{self._tail()}")
        self.log.close()

    def _tail(self) -> str:
        self.log.seek(0)
        lines = self.log.read().splitlines()[-20:]
        return "\n  ".join(["; the end of its log:", *lines]) if lines else ""
