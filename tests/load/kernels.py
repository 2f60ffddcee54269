"""Prints and records how fast each format is on one core, beside memcpy and beside what others compute it with.

`make bench-kernels` runs it. A round is our program (`server/kernels/benches/speed.rs`) once at each level that the CPU
has, then the peers (`kernel_peers/`) in a process of their own. README.md says how to read it. Speed fails no run; a
program that fails ends it.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_report
from kernel_rows import SAME, Rows
from machine import environment, load_average

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent
# By the levels of the psABI, which ask for the same features and a few more.
LEVELS = {"x86-64-v3": ("avx2", "scalar"), "x86-64-v4": ("avx512", "avx2", "scalar")}
# glibc keeps what is freed, so that the peers' results land in warm memory, as ours do. By default it maps each large
# tensor anew, and page faults are up to three quarters of a peer's time.
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def main() -> None:
    options = arguments()
    program = options.program or built()
    record = environment(REPOSITORY, program) | {
        "command": " ".join(["kernels.py", *sys.argv[1:]]),
        "rounds": f"{options.rounds} of {options.inner} each",
        "load_average": [load_average()],
    }
    levels = LEVELS.get(record["level"], ("scalar",))
    if not options.peers.exists():
        print(f"{options.peers} is missing: ours alone", file=sys.stderr)
    rows = Rows(best_level=levels[0])
    for number in range(1, options.rounds + 1):
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        for level in levels:
            rows.add(lines([program, "--level", level, *asked(options)]))
        if options.peers.exists():
            words = [SAME.get(word, word) for word in asked(options)]
            peers = lines([options.peers, LOAD / "kernel_peers/speed.py", *words], WARM)
            record["versions"] |= peers.pop(0)["versions"]
            rows.add(peers)
        ggml = lines([sys.executable, LOAD / "kernel_peers/ggml.py", *asked(options)])
        record["versions"] |= ggml.pop(0)["versions"]
        rows.add(ggml)
        record["load_average"].append(load_average())
    text = kernel_report.text(record, rows, options.format)
    print(text)
    kernel_report.write(options.results, record, rows, text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1: for a look, not for a claim")
    parser.add_argument("--rounds", type=int, help="how often each process is run (default 5)")
    parser.add_argument("--inner", type=int, help="how often it measures each row, and keeps the best (default 3)")
    parser.add_argument("--dtype", action="append", choices=("f32", "bf16"), help="may be given again (default both)")
    parser.add_argument("--format", action="append", help="of these alone: `W8A8`; may be given again")
    parser.add_argument("--program", type=Path, help="our bench program (default: what `cargo bench --no-run` says)")
    parser.add_argument("--peers", type=Path, default=REPOSITORY / ".venv-bench/bin/python", help="the peers' Python")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.inner = options.inner or (1 if options.quick else 3)
    if options.rounds < 1 or options.inner < 1:
        parser.error("--rounds and --inner must be at least 1")
    return options


def built() -> Path:
    """The executable, by cargo's own word: its name has a hash. Built by now, unless this is run by hand."""
    command = ["cargo", "bench", "--locked", "--package", "quarrel-kernels", "--bench", "speed", "--no-run"]
    done = subprocess.run([*command, "--message-format=json"], cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
    for message in map(json.loads, done.stdout.splitlines()):
        if message.get("target", {}).get("name") == "speed" and message.get("executable"):
            return Path(message["executable"])
    raise SystemExit("cargo names no executable of the bench `speed`")


def asked(options: argparse.Namespace) -> list[str]:
    """Both programs take the same words."""
    words = ["--rounds", str(options.inner)]
    for name in ("dtype", "format"):
        for value in getattr(options, name) or ():
            words += [f"--{name}", value]
    return words


def lines(command: list, variables: dict[str, str] | None = None) -> list[dict]:
    """What a program prints, a JSON object a line. What it says besides is shown if it fails."""
    done = subprocess.run(list(map(str, command)), env=os.environ | (variables or {}), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}{command[0]} ended with {done.returncode}: {' '.join(map(str, command))}")
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    main()
