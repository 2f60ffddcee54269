"""The table that a person reads, and the raw figures under `results/`."""

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from measure import Measurement, Row
import goals
import small
from rows import NUMPY, PUT, TCP

COLUMNS = ("", "best", "median", "/C++ put", "/raw TCP", "/C++ int8", "server CPU", "client CPU")
UNITS = ("", "GB/s", "GB/s", "", "", "", "s/GB", "s/GB")


def text(record: dict, rows: list[Row], quick: list[small.Row]) -> str:
    lines = [f"{key}: {told(value)}" for key, value in record.items()]
    lines += ["", line(COLUMNS), line(UNITS)]
    by_name = {row.name: row for row in rows}
    lines += [line((row.name, *cells(row, by_name))) for row in rows]
    lines += ["", "small requests, the medians over the rounds:", *map(small_line, quick)]
    lines += ["", "goals:", *goals.lines(by_name, quick, ratio, server_cpu)]
    lines += ["", "GB/s, round by round:"]
    lines += [f"{row.name:<32}" + "".join(f"{m.rate:>8.3f}" for m in row.measurements) for row in rows]
    lines += [f"\n{row.name} answered: {told(row.said)}" for row in rows if row.said]
    return "\n".join(lines)


def told(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return " | ".join(value)
    return str(value)


def line(cells: tuple[str, ...]) -> str:
    return f"{cells[0]:<32}" + "".join(f"{cell:>11}" for cell in cells[1:])


def cells(row: Row, by_name: dict[str, Row]) -> tuple[str, ...]:
    if row.fault:
        return (f"  NOT MEASURED: {row.fault.splitlines()[0]}",)
    rates = [measurement.rate for measurement in row.measurements]
    return (
        f"{max(rates):.3f}",
        f"{statistics.median(rates):.3f}",
        *(shown(ratio(row, by_name[name])) for name in (PUT, TCP, NUMPY)),
        shown(per_gigabyte(row, lambda measurement: measurement.server_cpu_seconds)),
        shown(per_gigabyte(row, lambda measurement: measurement.client_cpu_seconds)),
    )


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ratio(row: Row, other: Row) -> float | None:
    """The median over the rounds of the ratio within a round: what slows a whole round does not move it."""
    if row.fault or other.fault:
        return None
    return statistics.median(a.rate / b.rate for a, b in zip(row.measurements, other.measurements, strict=True))


def per_gigabyte(row: Row, cpu_seconds: Callable[[Measurement], float | None]) -> float | None:
    """Over all rounds together: one of them is too short for the clock of /proc."""
    if row.server is None and cpu_seconds(row.measurements[0]) is None:
        return None
    return sum(map(cpu_seconds, row.measurements)) / sum(measurement.gigabytes for measurement in row.measurements)


def server_cpu(row: Row) -> float | None:
    return None if row.fault else per_gigabyte(row, lambda measurement: measurement.server_cpu_seconds)


def small_line(row: small.Row) -> str:
    figures = [(figure, small.median(row, figure)) for figure in ("median", "p99")]
    return f"{row.name:<32}" + "".join(f"{value:>11.3f} {row.unit} {name}" for name, value in figures if value is not None)


def write(folder: Path, record: dict, rows: list[Row], quick: list[small.Row], text: str) -> None:
    """The text as printed, and every measurement as JSON, under one name made of date and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}"
    (folder / f"{name}.txt").write_text(text + "\n")
    raw = record | {"rows": [
        {
            "name": row.name,
            "fault": row.fault,
            "said": row.said,
            "measurements": [dataclasses.asdict(measurement) for measurement in row.measurements],
        }
        for row in rows
    ], "small": [{"name": row.name, "unit": row.unit, "rounds": row.figures} for row in quick]}
    (folder / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    print(f"\nrecorded as {folder / name}.txt and .json")
