"""Prints and records how fast quantization crosses a Flight connection, beside what bounds it.

One run measures, in interleaved rounds and with one set of batches: memcpy, raw TCP, the C++ pyarrow server (put, echo, int8
with numpy) and ours; and how long small requests take. README.md says how to read it.

Before it is timed, each server answers one whole layer, which is compared with `oracle`: a row that is wrong is told
and not measured, and the exit status is 1. Speed fails no run: there is no timed assertion.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import report
import rows
import small
from machine import environment, load_average
from measure import Row, timed

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent


def main() -> int:
    options = arguments()
    record = environment(REPOSITORY, options.binary) | {
        "command": " ".join(sys.argv),
        "mib_per_measurement": options.mib,
        "rounds": options.rounds,
        "load_average": [load_average()],
    }
    with ExitStack() as servers:
        measured = rows.baseline(servers, options.mib)
        ours, record["ours"], fault = rows.ours(servers, options.mib, options.binary, rust_client())
        measured += ours
        quick = small.rows(servers, options.binary) if ours else []
        run(measured, quick, options.rounds, record["load_average"])
    text = report.text(record, measured, quick)
    print(text)
    report.write(options.results, record, measured, quick, text)
    return 1 if fault or any(row.fault for row in measured) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about 20 seconds: 256 MiB a measurement, 3 rounds")
    parser.add_argument("--mib", type=int, help="input of one measurement, a multiple of 64 (default 1024)")
    parser.add_argument("--rounds", type=int, help="how often each row is measured (default 7)")
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel", help="our server")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    options.mib = options.mib or (256 if options.quick else 1024)
    options.rounds = options.rounds or (3 if options.quick else 7)
    if options.mib < 64 or options.mib % 64 or options.rounds < 1:
        parser.error("--mib must be a positive multiple of 64 (whole layers) and --rounds at least 1")
    return options


def rust_client() -> Path:
    """The Rust client's benchmark, built."""
    command = "cargo bench --locked --package quarrel-client --bench exchange --no-run --message-format=json"
    built = subprocess.run(command.split(), cwd=REPOSITORY, capture_output=True, text=True)
    found = [json.loads(line).get("executable") for line in built.stdout.splitlines() if '"executable"' in line]
    if built.returncode or not any(found):
        sys.exit(f"`{command}` failed:\n{built.stderr}")
    return Path(next(path for path in reversed(found) if path))


def run(measured: list[Row], quick: list[small.Row], rounds: int, loads: list[str]) -> None:
    """Checks every row, then times those that are right: A B C, A B C, ... so that drift meets all of them alike."""
    for row in measured:
        attempt(row, check)
    for number in range(1, rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        for row in measured:
            attempt(row, measure)
        for row in quick:
            row.figures.append(row.measure())
        loads.append(load_average())


def check(row: Row) -> None:
    row.said = row.check()


def measure(row: Row) -> None:
    row.measurements.append(timed(row))


def attempt(row: Row, step: Callable[[Row], None]) -> None:
    """Runs `step` unless the row is at fault already; what it raises becomes the fault, and the others go on."""
    if row.fault:
        return
    try:
        step(row)
    except Exception as error:  # anything that pyarrow, a socket or the oracle raises means the same here
        row.fault = f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
