"""The tables of kernels.py that a person reads, and the raw figures under `results/`."""

import json
from pathlib import Path

import kernel_goals
from kernel_goals import MEMCPY, Verdict
from kernel_rows import DEQUANTIZE, Key, Rows
from report import told

HEAD = """\
GB/s is 1e9 bytes of f32 a second, 4 bytes for each element, whatever its type; of `dequantize`, of the bytes that come
out. /memcpy is the best rate over the best of memcpy. Other ratios are medians over the rounds of the ratio within a round: /f32 of elements a second,
/peer of the time of the fastest peer (for quantize+metrics: of its quantize, as no peer measures)."""


def text(record: dict, rows: Rows, asked: list[str] | None) -> str:
    lines = [f"{key}: {told(value)}" for key, value in record.items()]
    lines += ["memcpy of 64 MiB, GB/s: " + ", ".join(f"{rows.copied(level):.2f} ({level})" for level in rows.levels)]
    lines += ["", HEAD, "", *table(rows), "", *missed(rows, asked), "", *peers(rows)]
    return "\n".join(lines)


def table(rows: Rows) -> list[str]:
    levels = "".join(f"{level:>8}" for level in rows.levels)
    head = f"{'':<49}{'/memcpy':>{max(8 * len(rows.levels), 8)}}"
    lines = [head, f"{'':<36}{'GB/s':>7}{'Gel/s':>6}{levels}{'/f32':>6}{'/peer':>7}  {'peer':<20}goal"]
    return lines + [line(key, rows) for key in rows.ours()]


def line(key: Key, rows: Rows) -> str:
    peer = rows.over_peer(key) or (None, "")
    levels = "".join(f"{shown(rows.over_memcpy(key._replace(by=level))):>8}" for level in rows.levels)
    over_f32 = None if key.dtype == "f32" else rows.over_f32(key)
    return (
        f"{name(key):<36}{rows.rate(key):>7.2f}{speed(key, rows) / 1e9:>6.2f}{levels}"
        f"{shown(over_f32):>6}{shown(peer[0]):>7}  {peer[1]:<20}"
        + "; ".join(map(str, kernel_goals.verdicts(key, rows)))
    ).rstrip()


def name(key: Key) -> str:
    return f"{key.format:<13}{key.op:<18}{key.dtype}"


def speed(key: Key, rows: Rows) -> float:
    row = rows.found[key]
    return row.elements / row.best


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 99.995 else f"{value:.0f}"


def missed(rows: Rows, asked: list[str] | None) -> list[str]:
    all_of_them = [verdict for key in rows.ours() for verdict in kernel_goals.verdicts(key, rows)]
    found = [verdict for verdict in all_of_them if verdict.missed]
    lines = [f"Goals missed: {len(found)} of {len(all_of_them)}"]
    lines += [f"  {told_in_full(verdict, rows)}" for verdict in found]
    return lines + [f"  {format}: NOT MEASURED" for format in kernel_goals.unmeasured(rows, asked)]


def told_in_full(verdict: Verdict, rows: Rows) -> str:
    goal, key = verdict.goal, verdict.key
    about = f"{name(key)}  at {key.by}: "
    if verdict.reached is None:
        return f"{about}not measured, goal {goal.least:.2f} of {goal.over}"
    about += f"{verdict.reached:.2f} of {goal.over}, goal {goal.least:.2f}; {rows.rate(key):.2f} GB/s"
    return about + (f", memcpy {rows.copied(key.by):.2f}" if goal.over == MEMCPY else "")


def peers(rows: Rows) -> list[str]:
    """Their own rates: a ratio to a slow peer says little."""
    lines = ["The peers, one thread, results in warm memory" + (":" if rows.peers() else ": not measured")]
    return lines + [
        f"{name(key):<36}{rows.rate(key):>7.2f}{speed(key, rows) / 1e9:>6.2f}  {key.by}" for key in rows.peers()
    ]


def write(folder: Path, record: dict, rows: Rows, text: str) -> None:
    """The text as printed, and as JSON every measurement and the table, as `DATE-COMMIT-kernels`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}-kernels"
    (folder / f"{name}.txt").write_text(text + "\n")
    memcpy = {level: rows.copied(level) for level in rows.levels}
    head = json.dumps(record | {"memcpy_gb_per_second": memcpy}, indent=1).removesuffix("\n}")
    table = one_a_line(entry(key, rows) for key in rows.ours())
    (folder / f"{name}.json").write_text(f'{head},\n "table": {table},\n "rows": {one_a_line(rows.raw())}\n}}\n')
    print(f"\nrecorded as {folder / name}.txt and .json")


def entry(key: Key, rows: Rows) -> dict:
    """A line of the table. choosing.py reads it."""
    peer = rows.over_peer(key) or (None, None)
    return key._replace(by=rows.best_level)._asdict() | {
        "bytes": "out" if key.op == DEQUANTIZE else "f32 in",
        "gb_per_second": rounded(rows.rate(key)),
        "elements_per_second": round(speed(key, rows)),
        "over_memcpy": {level: rounded(rows.over_memcpy(key._replace(by=level))) for level in rows.levels},
        "over_f32": rounded(rows.over_f32(key)),
        "over_peer": rounded(peer[0]),
        "peer": peer[1],
        "goals": [str(verdict) for verdict in kernel_goals.verdicts(key, rows)],
    }


def rounded(value: float | None) -> float | None:
    return value and round(value, 4)


def one_a_line(values) -> str:
    return "[\n" + ",\n".join(f"  {json.dumps(value)}" for value in values) + "\n ]"
