"""The command line as a person uses it: run to its end, or watched while it runs; and safetensors files, by hand.

Files are written and read with plain json, so that no library of the ecosystem repairs or refuses what is to be tried.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from harness.server import binary

# What nobody should ever see.
FAULT = re.compile(r"panicked|Traceback|RUST_BACKTRACE|\bError \{|report it")
ESCAPE = "\x1b"
RUN_SECONDS = 120  # ends a run that hangs; nothing is measured by it
PIPES = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def environment(**more: str) -> dict[str, str]:
    """Ours without QUARREL_ variables, and without what turns colours on or off."""
    dropped = ("QUARREL_", "CLICOLOR", "NO_COLOR", "COLORTERM", "TERM")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)} | more


# -- runs -------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def advice(self) -> str:
        """What it says to do about its failure."""
        found = re.search(r"^ *what to do: (.*)$", self.err, re.M)
        return found[1] if found else ""


def run(*args, **options) -> Ended:
    """`quarrel ARGS`, to its end. `options` are those of subprocess.run."""
    defaults = {"env": environment(), "timeout": RUN_SECONDS} | PIPES
    ended = subprocess.run([str(binary()), *map(str, args)], **(defaults | options))
    return Ended(ended.returncode, ended.stdout or "", ended.stderr or "")


def done(*args, **options) -> Ended:
    """A run that must succeed."""
    ended = run(*args, **options)
    assert ended.code == 0, f"exit code {ended.code}:\n{ended.err[-4000:]}"
    return ended


def quantize(source: Path, destination: Path, *flags, **options) -> Ended:
    return done("quantize", source, destination, *flags, **options)


class Running:
    """A run that goes on while the test looks at it."""

    def __init__(self, *args, **options):
        self._process = subprocess.Popen([str(binary()), *map(str, args)], **({"env": environment()} | PIPES | options))
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()  # does nothing to a process that has ended
        self._process.communicate()

    def send(self, number: signal.Signals):
        self._process.send_signal(number)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> Ended:
        out, err = self._process.communicate(timeout=RUN_SECONDS)
        return Ended(self._process.returncode, out, err)

    def spooled_bytes(self) -> int:
        """Bytes of results that it has written to files without their name yet, holes left out."""
        found = 0
        with contextlib.suppress(FileNotFoundError, PermissionError, ProcessLookupError):
            for entry in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(entry).endswith((" (deleted)", ".partial")):
                        found += 512 * entry.stat().st_blocks
        return found

    def peak_rss_bytes(self) -> int:
        """Highest RSS so far; 0 once it is over."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.M)
            return int(found[1]) * 1024 if found else 0
        return 0

    def children(self) -> list[int]:
        found = []
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return found

    def catches(self, number: signal.Signals) -> bool:
        """Whether it does something of its own about a signal."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = re.search(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{self.pid}/status").read_text(), re.M)
            return bool(found and int(found[1], 16) >> (number - 1) & 1)
        return False

    def within(self, seconds: float, what: str):
        """Waits for its end; a failure if it hangs. `seconds` are ample: nothing is measured."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        assert self.is_over(), f"not within {seconds} s: {what}"

    def reaches(self, condition) -> bool:
        """Waits for a state of the run, or for its end. It looks all the time: some states are short."""
        deadline = time.monotonic() + RUN_SECONDS
        while not condition() and not self.is_over():
            assert time.monotonic() < deadline, f"not within {RUN_SECONDS} s"
        return not self.is_over()

    def when(self, condition, what: str):
        """Waits for a state of the run; a failure if it is over before."""
        assert self.reaches(condition), f"it was over before: {what}\n{self.end().err}"


def check_refusal(ended: Ended, code: int, *says: str):
    """It ended with that code, named all that, said what to do, and showed none of its insides."""
    told = ended.err
    assert ended.code == code, f"exit code {ended.code}, expected {code}:\n{told}"
    missing = [word for word in says if word not in told]
    assert not missing, f"{told!r} does not hold {missing}"
    assert not FAULT.search(told + ended.out), told
    assert ESCAPE not in told + ended.out
    assert ended.advice, f"no word of what to do in {told!r}"


# -- files ------------------------------------------------------------------------------------------------------------

NAMES = {
    np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2", np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8", np.dtype(np.int32): "I32", np.dtype(np.int64): "I64", np.dtype(np.bool_): "BOOL",
}
TYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass
class File:
    """What is in a safetensors file."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str] = field(default_factory=dict)


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    """A safetensors file of the tensors, in their order."""
    header, at = ({"__metadata__": metadata} if metadata else {}), 0
    for name, tensor in tensors.items():
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        header[name], at = entry, at + tensor.nbytes
    write_raw(path, json.dumps(header).encode(), *(np.ascontiguousarray(tensor) for tensor in tensors.values()))
    return path


def write_raw(path: Path, header: bytes, *data, claimed: int | None = None) -> Path:
    """A file with that header, whatever it says."""
    with path.open("wb") as file:
        file.write((len(header) if claimed is None else claimed).to_bytes(8, "little") + header)
        for part in data:
            file.write(part if isinstance(part, bytes) else part.reshape(-1).view(np.uint8))
    return path


def read(path: Path) -> File:
    """All of a file, from its header's own words."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start + begin : start + end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return File(tensors, metadata)
