"""Runs the peers of this folder, and records what came of it under `tests/interop/results`: date, versions, commit, every test."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent
REPOSITORY = PEERS.parents[2]
PACKAGES = ("torch", "transformers", "compressed-tensors", "bitsandbytes", "safetensors", "pyarrow", "numpy")


def main() -> int:
    tests = sorted(str(path.relative_to(REPOSITORY)) for path in PEERS.glob("peer_*.py"))
    command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "-v", "--no-header", *tests]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    print(ended.stdout + ended.stderr)
    now = datetime.datetime.now(datetime.UTC)
    git = ["git", "-C", str(REPOSITORY)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in ended.stdout.splitlines() if "::" in line or "passed" in line or "failed" in line]
    told = [
        f"date: {now.isoformat(timespec='seconds')}",
        f"commit: {commit}{' with uncommitted changes' if changed else ''}",
        f"python: {platform.python_version()}",
        *(f"{name}: {importlib.metadata.version(name)}" for name in PACKAGES),
        "",
        *lines,
    ]
    out = PEERS.parent / "results" / f"{now:%Y-%m-%dT%H%M%SZ}-{commit}.txt"
    out.write_text("\n".join(told) + "\n")
    print(f"recorded as {out.relative_to(REPOSITORY)}")
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
