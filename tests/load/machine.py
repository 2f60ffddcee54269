"""What a figure is worth nothing without: date, versions, machine, load, commit."""

import datetime
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa

# The x86-64 psABI's levels, by the names that Linux gives their features.
LEVELS = {
    "x86-64-v2": "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2",
    "x86-64-v3": "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
}


def environment(repository: Path, binary: Path) -> dict:
    cpu = lscpu()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(repository),
        "binary": built(binary),
        "cpu": cpu.get("Model name", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "level": level(set(cpu.get("Flags", "").split())),
        "caches": ", ".join(f"{name} {cpu[name]}" for name in ("L2 cache", "L3 cache") if name in cpu),
        "hypervisor": cpu.get("Hypervisor vendor", "none"),
        "kernel": platform.release(),
        "versions": {
            "python": platform.python_version(),
            "pyarrow": pa.__version__,
            "numpy": np.__version__,
            "libc": " ".join(platform.libc_ver()),
        },
    }


def lscpu() -> dict[str, str]:
    output = subprocess.run(["lscpu"], env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, check=True)
    pairs = (line.partition(":") for line in output.stdout.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def level(flags: set[str]) -> str:
    """The highest level whose features, and those of all levels below, are there."""
    if platform.machine() != "x86_64":
        return platform.machine()
    found = "x86-64-v1"
    for name, features in LEVELS.items():
        if not flags.issuperset(features.split()):
            break
        found = name
    return found


def commit(repository: Path) -> str:
    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    name = head.stdout.strip() if head.returncode == 0 else "none"
    # Results of earlier runs are no change of what is measured.
    changes = git("status", "--porcelain", "--", ".", ":!tests/load/results").stdout
    return f"{name} with uncommitted changes" if changes else name


def built(binary: Path) -> str:
    """Which build ran: the commit alone does not say whether it was built since."""
    if not binary.exists():
        return "missing"
    when = datetime.datetime.fromtimestamp(binary.stat().st_mtime, datetime.UTC).isoformat(timespec="seconds")
    return f"sha256 {hashlib.sha256(binary.read_bytes()).hexdigest()[:12]}, built {when}"


def load_average() -> str:
    """Over 1, 5 and 15 minutes."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg())
