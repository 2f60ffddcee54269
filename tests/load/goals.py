"""What this is to reach, in one run on one machine, and whether it did."""

from collections.abc import Callable

import small
from measure import Row
from rows import BF16, ECHO, INT8, NUMPY, PUT, RUST, TCP, W4A16

RATIOS = [
    (INT8, PUT, 0.85),
    (W4A16, PUT, 0.90),
    (BF16, PUT, 0.65),
    (INT8, ECHO, 1.4),
    (INT8, NUMPY, 1.5),
    (RUST, TCP, 0.60),
]
SMALL = [("open, one tiny layer, close", 1.0), ("10,000 layers of 1 KiB, each", 50.0)]


def lines(
    by_name: dict[str, Row],
    quick: list[small.Row],
    ratio: Callable[[Row, Row], float | None],
    cpu: Callable[[Row], float | None],
) -> list[str]:
    told = []
    for ours, peer, goal in RATIOS:
        reached = ratio(by_name[ours], by_name[peer]) if ours in by_name else None
        told.append(line(f"{ours} over {peer}", reached, "at least", goal))
    if INT8 in by_name:
        ours, put = cpu(by_name[INT8]), cpu(by_name[PUT])
        told.append(line("server CPU s/GB, ours int8, beside C++ put", ours, "at most", put))
    for name, goal in SMALL:
        row = next((row for row in quick if row.name == name), None)
        told.append(line(f"{name}, {row.unit if row else ''}", row and small.median(row, "median"), "under", goal))
    return told


def line(what: str, reached: float | None, bound: str, goal: float | None) -> str:
    if reached is None or goal is None:
        return f"  {what}: not measured"
    is_reached = {"at least": reached >= goal, "at most": reached <= goal, "under": reached < goal}[bound]
    return f"  {what}: {reached:.2f}, {bound} {goal:.2f}: {'yes' if is_reached else 'NO'}"
