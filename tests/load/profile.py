"""Where the CPU time of an exchange goes: `perf` on our server and on the Rust client while it sends; what it said under `results/`.

perf comes with the system (Debian: linux-perf) and may want `kernel.perf_event_paranoid` at 1 or less for the kernel's part.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import REPOSITORY, rust_client
from machine import environment
from server import Driver, Server

LOAD = Path(__file__).resolve().parent
SYMBOLS = 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=8192, help="input, a multiple of 64")
    parser.add_argument("--scheme", default="int8")
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel", help="our server")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    if not shutil.which("perf"):
        sys.exit("`perf` is not there: install it (Debian: linux-perf)")
    record = environment(REPOSITORY, options.binary) | {"command": " ".join(sys.argv)}
    text = "\n".join([*(f"{key}: {value}" for key, value in record.items()), "", *profiled(options)])
    print(text)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}-profile.txt"
    (options.results / name).write_text(text + "\n")
    print(f"\nrecorded as {options.results / name}")
    return 0


def profiled(options) -> list[str]:
    """What each process did, by its own CPU time."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Server([str(options.binary), "serve", "--listen", "127.0.0.1:0", "--log", "warn"]) as server,
        Driver([str(rust_client()), server.address, options.scheme]) as client,
    ):
        client.ask("512")
        before = [end.cpu_seconds() for end in (server, client)]
        pids = [str(end.process.pid) for end in (server, client)]
        data = [Path(folder) / name for name in ("server", "client")]
        watching = [
            subprocess.Popen(["perf", "record", "-F", "999", "-g", "-o", out, "-p", pid], stderr=subprocess.DEVNULL)
            for out, pid in zip(data, pids, strict=True)
        ]
        client.ask(str(options.mib))
        for watcher in watching:
            watcher.terminate()
            watcher.wait()
        spent = [end.cpu_seconds() - start for end, start in zip((server, client), before, strict=True)]
        told = []
        for name, out, seconds in zip(("server", "Rust client"), data, spent, strict=True):
            per_gb = seconds / (options.mib * (1 << 20) / 1e9)
            told += [f"== {name}: {per_gb:.2f} CPU s/GB of f32, {options.scheme}", "", "by library:", *report(out, "dso")]
            told += ["", "by function:", *report(out, "symbol")[:SYMBOLS], ""]
        return told


def report(data: Path, key: str) -> list[str]:
    command = ["perf", "report", "-i", str(data), "--no-children", "--sort", key, "-g", "none", "--stdio"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.rstrip(" -") for line in lines if line.strip() and not line.startswith("#")]


if __name__ == "__main__":
    sys.exit(main())
