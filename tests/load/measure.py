"""One timed pass over a row: wall clock, and the CPU time of both ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from server import Server


@dataclass
class Measurement:
    gigabytes: float  # 1e9 bytes of input
    seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float | None  # in ticks of 10 ms

    @property
    def rate(self) -> float:
        """GB/s of input."""
        return self.gigabytes / self.seconds


@dataclass
class Row:
    """A line of the report.

    `check` raises if the row is wrong and may return what the server said of itself; `work` moves the input once and
    returns how many bytes that was.
    """

    name: str
    check: Callable[[], dict[str, str] | None]
    work: Callable[[], int]
    server: Server | None = None
    client: Server | None = None  # where it is not this process
    fault: str | None = None
    said: dict[str, str] | None = None
    measurements: list[Measurement] = field(default_factory=list)


def timed(row: Row) -> Measurement:
    client_cpu = row.client.cpu_seconds if row.client else time.process_time
    server_before = row.server.cpu_seconds() if row.server else 0.0
    client_before, start = client_cpu(), time.perf_counter()
    moved = row.work()
    seconds, client_after = time.perf_counter() - start, client_cpu()
    return Measurement(
        gigabytes=moved / 1e9,
        seconds=seconds,
        client_cpu_seconds=client_after - client_before,
        server_cpu_seconds=row.server.cpu_seconds() - server_before if row.server else None,
    )
