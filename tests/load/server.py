"""A server as a process of its own: started, asked for its CPU time, stopped."""

import os
import subprocess
import sys
import threading
from pathlib import Path

START_SECONDS_MAX = 30
STOP_SECONDS_MAX = 10
PEERS = Path(__file__).resolve().parent / "peers.py"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class ServerError(Exception):
    """The process ended, or said something else than where it listens."""


class Server:
    """Runs `command`, whose first line on standard output is `listening ADDRESS`, as ours and all peers print it."""

    def __init__(self, command: list[str], stdin: int = subprocess.DEVNULL):
        self.process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True)
        alarm = threading.Timer(START_SECONDS_MAX, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline().strip()
        alarm.cancel()
        if not line.startswith("listening "):
            self.stop()
            code = self.process.returncode
            raise ServerError(f"`{' '.join(command)}`: expected `listening ADDRESS`, got `{line}` and exit code {code}")
        self.address = line.removeprefix("listening ")

    def cpu_seconds(self) -> float:
        """User and system time of all threads so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        after_name = stat.rpartition(")")[2].split()  # the name may hold spaces; what follows starts at field 3
        utime, stime = after_name[11:13]
        return (int(utime) + int(stime)) / TICKS_PER_SECOND

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.stop()


class Driver(Server):
    """A client as a process of its own, which does what a line says and answers with another."""

    def __init__(self, command: list[str]):
        super().__init__(command, subprocess.PIPE)

    def ask(self, line: str) -> str:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


def peer(role: str) -> Server:
    return Server([sys.executable, str(PEERS), role])
