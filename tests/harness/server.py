"""A `quarrel serve` process: started on a free port, watched through /proc, stopped by its process id."""

import atexit
import os
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 30
FAULT = re.compile(r"\bERROR\b|panicked")


def binary() -> Path:
    """The server under test: QUARREL_BINARY, or what `cargo build --release --bin quarrel` made."""
    return Path(os.environ.get("QUARREL_BINARY") or REPO / "target/release/quarrel")


class Server:
    """One server process. Start it with `Server.start`, end it with `stop`."""

    def __init__(self, process: subprocess.Popen, log: Path):
        self._process = process
        self._was_killed = False
        self._log = log
        self.pid = process.pid
        atexit.register(process.kill)  # does nothing to a process that has ended
        self.first_line = self._read_first_line()
        self.location = self.first_line.removeprefix("listening ")
        # Whatever else comes on standard output must not fill the pipe.
        threading.Thread(target=self._drain, daemon=True).start()

    @classmethod
    def start(cls, *flags, env: dict | None = None, listen: str = "127.0.0.1:0") -> "Server":
        """Starts `quarrel serve --listen LISTEN FLAGS` and returns when it listens.

        `env` is added to our environment, whose own QUARREL_ variables are left out.
        """
        handle, path = tempfile.mkstemp(prefix="quarrel-", suffix=".log")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("QUARREL_")}
        with os.fdopen(handle, "wb") as log:
            process = subprocess.Popen(
                [str(binary()), "serve", "--listen", listen, *map(str, flags)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env={**inherited, **(env or {})},
            )
        return cls(process, Path(path))

    def _read_first_line(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        pipe, line = self._process.stdout.fileno(), b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0, deadline - time.monotonic()))
            byte = os.read(pipe, 1) if ready else b""
            if not byte:
                self._process.kill()
                code = self._process.wait()
                raise RuntimeError(f"the server did not listen (exit code {code}, printed {line!r}):\n{self.logs()}")
            line += byte
        text = line.decode().rstrip("\n")
        assert text.startswith("listening "), f"first line is {text!r}, expected `listening LOCATION`"
        return text

    def _drain(self):
        for _ in iter(lambda: self._process.stdout.read1(65536), b""):
            pass

    def logs(self) -> str:
        """Standard error so far."""
        return self._log.read_text(errors="replace")

    def faults(self) -> list[str]:
        """Log lines that a person would have to look at."""
        return [line for line in self.logs().splitlines() if FAULT.search(line)]

    def _status(self, key: str) -> int:
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{key}:\s+(\d+) kB$", text, re.M)[1]) * 1024

    def rss_bytes(self) -> int:
        return self._status("VmRSS")

    def peak_rss_bytes(self) -> int:
        """Highest RSS since the start, or since `forget_peak`."""
        return self._status("VmHWM")

    def forget_peak(self):
        """Peak RSS counts from now on (proc(5), clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self):
        """Sends SIGTERM and returns at once."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """The exit code; an error, after SIGKILL, if it does not come within `timeout`."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"server {self.pid} did not end within {timeout} s; its log:\n{self.logs()}") from None

    def stop(self, timeout: float = 60) -> int:
        """SIGTERM, then the exit code. A server that has ended already returns the code it ended with."""
        if self._process.poll() is None:
            self.terminate()
        return self.wait(timeout)

    def kill(self):
        """SIGKILL, and waits until it is gone."""
        self._was_killed = True
        self._process.kill()
        self._process.wait()

    def end(self, *, faults=False):
        """Stops it, and asserts that it ended well: exit code 0, and a log that calls for nobody unless `faults`."""
        code = self.stop()
        print(self.logs()[-4000:])  # pytest shows it if the test failed
        assert code == 0 or self._was_killed, f"exit code {code}"
        assert faults or not self.faults(), "\n".join(self.faults())


def eventually(condition, *, seconds: float = 30, what: str = ""):
    """Waits until `condition()` is true, for states of the server that announce no event. Returns its value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}")
        time.sleep(0.02)
