"""A server of our own: `quarrel serve` as a child process on a Unix socket that only this user may open.

The child holds the reading end of a pipe as its standard input and stops when the pipe closes. So it stops however the
interpreter ends, also when it is killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import subprocess
import tempfile
import time
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO

from quarrel.errors import StartError

STOP_SECONDS = 10.0
"""How long a child may take to stop before it is killed. Its streams are cancelled by then."""
SOCKET_PATH_BYTES_MAX = 100
"""unix(7): 108 with the closing zero."""
RUN_IT = "Check `binary` and `flags`: run `quarrel serve` with the same flags in a terminal."
LOG_LINES = 10
"""Of the child's standard error, shown where it does not start."""

OURS = {
    "--log": "warn",  # it lies in the temporary folder until the server ends
    "--drain-seconds": "1",  # whoever a stream could be finished for is gone
}
"""Flags of a server that has one client."""


class Child:
    """A running server; `address` is its socket's."""

    def __init__(self, binary: str | os.PathLike[str] | None, flags: Sequence[str], timeout: float) -> None:
        self._program = program = find(binary)
        self._socket = _socket_path()
        command = [program, "serve", "--listen", f"unix:{self._socket}", "--stop-with-stdin", *_flags(flags)]
        # A file and no pipe: nobody has to read it, and writing to it never fails.
        with tempfile.TemporaryFile() as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    umask=0o077,
                    start_new_session=True,  # Ctrl-C in the terminal is for Python, which stops the child
                )
            except (OSError, ValueError) as error:  # a zero in a flag is the latter
                why = error.strerror if isinstance(error, OSError) else error
                raise StartError(f"cannot run `{program}`: {why}", advice=RUN_IT) from error
            self._stopped = weakref.finalize(self, _stop, self._process, self._socket, os.getpid())
            _running.add(self)
            try:
                self.address = self._listening(timeout, log)
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Ends the process and takes the socket away. Does nothing the second time."""
        self._stopped()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _listening(self, timeout: float, log: IO[bytes]) -> str:
        """The address on the first line of output."""
        assert self._process.stdout is not None
        line, deadline = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
            byte = os.read(self._process.stdout.fileno(), 1) if ready else b""
            if not byte:
                how = f"ended with code {self._process.wait()}" if ready else f"said nothing for {timeout:g} s"
                raise StartError(f"`{self._program}` {how}{_tail(log)}", advice=RUN_IT)
            line += byte
        text = line.decode(errors="replace").strip()
        if not text.startswith("listening "):
            raise StartError(f"`{self._program}` said `{text}`, expected `listening ..`", advice=RUN_IT)
        return text.removeprefix("listening ")

    def _let_go(self) -> None:
        """In a forked child: its end of the pipe closed, only the parent keeps the server."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def _flags(given: Sequence[str]) -> list[str]:
    """The caller's flags, and ours where neither these nor the environment say otherwise."""
    if isinstance(given, str) or not isinstance(given, Collection):
        raise TypeError(f"`flags` is a `{type(given).__name__}`: expected a list of texts")
    flags = [str(flag) for flag in given]
    names = {flag.split("=")[0] for flag in flags}
    for name, value in OURS.items():
        if name not in names and "QUARREL_" + name[2:].replace("-", "_").upper() not in os.environ:
            flags += [name, value]
    return flags


def _stop(process: subprocess.Popen[bytes], socket: str, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child: the server is its parent's
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(socket)


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - 4096))
    lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    return "".join(f"\n  {line}" for line in lines)


def _socket_path() -> str:
    name = f"quarrel-{secrets.token_hex(4)}.sock"
    path = os.path.join(tempfile.gettempdir(), name)
    return path if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX else os.path.join("/tmp", name)


def find(binary: str | os.PathLike[str] | None) -> str:
    """The program: `binary`, else the first of `quarrel` on PATH and the build of a checkout that we lie in.

    Raises:
        StartError: there is none.
    """
    if binary is not None and not isinstance(binary, (str, os.PathLike)):
        raise TypeError(f"`binary` is a `{type(binary).__name__}`: expected a path")
    if binary is not None:
        return os.fspath(binary)
    on_path = shutil.which("quarrel")
    if on_path:
        return on_path
    looked = ["`quarrel` on PATH"]
    checkout = Path(__file__).resolve().parents[4]
    if (checkout / "Cargo.toml").is_file():
        for profile in ("release", "debug"):
            built = checkout / "target" / profile / "quarrel"
            looked.append(f"`{built}`")
            if os.access(built, os.X_OK):
                return str(built)
    raise StartError(
        f"there is no server to start: looked for {', '.join(looked)}",
        advice="Build it with `cargo build --release --bin quarrel`, and put it on PATH or name it as `binary=`; "
        "or connect to a running server's address.",
    )


_running: weakref.WeakSet[Child] = weakref.WeakSet()


def _forked() -> None:
    for child in list(_running):
        child._let_go()


if hasattr(os, "register_at_fork"):  # not where processes do not fork
    os.register_at_fork(after_in_child=_forked)
