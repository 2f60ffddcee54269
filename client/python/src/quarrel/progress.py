"""How far a stream is, for callers who want to see it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

LINES_SECONDS = 0.1
"""How often the plain line is written anew."""


@dataclass(frozen=True)
class Progress:
    """Totals since the stream began.

    `layers` and `rows` that have been answered; `bytes_in` of weights received, `bytes_out` of codes, scales and zero
    points; `bytes_total` of `bytes_in` to come to, where it is known; `layer` answered last.
    """

    layers: int
    rows: int
    bytes_in: int
    bytes_out: int
    bytes_total: int | None
    layer: str | None


class Display(Protocol):
    """Shows progress, and ends showing it."""

    def show(self, progress: Progress) -> None: ...

    def close(self) -> None: ...


Asked = None | bool | Callable[[Progress], object]


def checked(asked: Asked) -> Asked:
    """The option `progress`, if it is one.

    Raises:
        TypeError: it is not.
    """
    if asked is None or isinstance(asked, bool) or callable(asked):
        return asked
    raise TypeError(f"`progress` is a `{type(asked).__name__}`: expected True or a function")


def display(asked: Asked, bytes_total: int | None) -> Display | None:
    """What the option `progress` asks for: nothing, a bar on standard error, or calls."""
    if asked is None or asked is False:
        return None
    if asked is not True:
        return _Call(asked)
    try:
        from tqdm import tqdm
    except ImportError:
        return _Line()
    return _Bar(tqdm(total=bytes_total, unit="B", unit_scale=True))


class _Call:
    def __init__(self, call: Callable[[Progress], object]) -> None:
        self._call = call

    def show(self, progress: Progress) -> None:
        self._call(progress)

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def show(self, progress: Progress) -> None:
        self._bar.set_postfix_str(progress.layer or "", refresh=False)
        self._bar.update(progress.bytes_in - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Line:
    """One line on standard error, written over itself."""

    def __init__(self) -> None:
        self._shown: float | None = None
        self._last: Progress | None = None

    def show(self, progress: Progress) -> None:
        self._last = progress
        now = time.monotonic()
        if self._shown is None or now - self._shown >= LINES_SECONDS:
            self._write(progress)
            self._shown = now

    def _write(self, progress: Progress) -> None:
        of = f" of {progress.bytes_total / 1e6:,.0f}" if progress.bytes_total else ""
        text = f"{progress.bytes_in / 1e6:,.0f}{of} MB, {progress.layers} layers, {progress.layer or ''}"
        sys.stderr.write(f"\r{text[:100]:100}")
        sys.stderr.flush()

    def close(self) -> None:
        if self._last is not None:
            self._write(self._last)
            sys.stderr.write("\n")
            sys.stderr.flush()
