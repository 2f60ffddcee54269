"""What the programs of kernels.py measured, and the figures that are made of it.

A row is a format, an operation, an element type, and who computed it: a CPU level of ours, or a peer. It keeps a time
for each round. A rate is of its best time; a ratio is the median over the rounds of the ratio within a round.
"""

import statistics
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

QUANTIZE, MEASURED, DEQUANTIZE = "quantize", "quantize+metrics", "dequantize"
# One computation under two names.
SAME = {"int8": "W8A8"}


class Key(NamedTuple):
    format: str
    op: str
    dtype: str
    by: str


@dataclass
class Row:
    elements: int
    bytes_in: int
    bytes_out: int
    seconds: list[float] = field(default_factory=list)  # round by round

    @property
    def best(self) -> float:
        return min(self.seconds)


class Rows:
    def __init__(self, best_level: str):
        self.best_level = best_level
        self.levels: list[str] = []
        self.found: dict[Key, Row] = {}

    def add(self, lines: list[dict]) -> None:
        """What one process said in a round."""
        for line in lines:
            key = Key(line["format"], line["op"], line["dtype"], line.get("peer") or line["level"])
            if "level" in line and key.by not in self.levels:
                self.levels.append(key.by)
            row = self.found.setdefault(key, Row(line["elements"], line["bytes_in"], line["bytes_out"]))
            row.seconds.append(line["seconds"])

    def ours(self) -> list[Key]:
        """At the best level, in the order in which our program says them."""
        return [key for key in self.found if key.by == self.best_level and key.op != "copy"]

    def peers(self) -> list[Key]:
        return [key for key in self.found if key.by not in self.levels]

    def copied(self, level: str) -> float:
        """memcpy's GB/s of the bytes copied, at its best in the processes of that level."""
        row = self.found[self.memcpy(level)]
        return row.bytes_in / row.best / 1e9

    def rate(self, key: Key) -> float:
        """GB/s of f32, whatever was read: 4 bytes for each element. Of `dequantize`: the bytes that come out."""
        return self.bytes(key) / self.found[key].best / 1e9

    def bytes(self, key: Key) -> int:
        row = self.found[key]
        return row.bytes_out if key.op == DEQUANTIZE else 4 * row.elements

    def over_memcpy(self, key: Key) -> float | None:
        """Of the best rates, with memcpy as the same processes measured it."""
        return self.rate(key) / self.copied(key.by) if key in self.found else None

    def over_f32(self, key: Key) -> float | None:
        """Elements per second over those of the same row of f32."""
        return self.faster(key, key._replace(dtype="f32"))

    def over_peer(self, key: Key, peer: str | None = None) -> tuple[float, str] | None:
        """How many times as fast as `peer`, or else as the fastest one; and its name.

        No peer measures what it loses, so that `quantize+metrics` too is held against plain `quantize`.
        """
        op = QUANTIZE if key.op == MEASURED else key.op
        same = (SAME.get(key.format, key.format), op, key.dtype)
        others = [other for other in self.peers() if other[:3] == same and peer in (None, other.by)]
        return min(((self.faster(key, other), other.by) for other in others), default=None)

    def faster(self, key: Key, other: Key) -> float | None:
        """How many times as fast as another row."""
        if key not in self.found or other not in self.found:
            return None
        pairs = zip(self.found[other].seconds, self.found[key].seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def memcpy(self, level: str) -> Key:
        return next(key for key in self.found if key.op == "copy" and key.by == level)

    def raw(self) -> list[dict]:
        """Everything that was measured."""
        return [key._asdict() | asdict(row) for key, row in self.found.items()]
