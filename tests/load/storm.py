"""Minutes of two hundred streams of random sizes, speeds, cancels and faults: tests/hostile/storm.py, and what came of it under `results/`."""

import argparse
import json
import sys
from pathlib import Path

from machine import environment

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent
sys.path.append(str(LOAD.parent))

from harness.server import binary  # noqa: E402
from hostile import storm  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    record = environment(REPOSITORY, binary()) | {"command": " ".join(sys.argv), "flags": str(storm.FLAGS)}
    server = storm.start()
    try:
        outcome = storm.storm(server, options.minutes * 60, options.seed)
        lines = storm.unexpected_lines(server)
    finally:
        code = server.stop()
    is_well = not outcome.wrong and not lines and outcome.peak_rss_bytes < storm.RSS_MAX and code == 0
    text = "\n".join([
        *(f"{key}: {value}" for key, value in record.items()),
        "",
        f"{storm.STREAMS} streams at once for {outcome.seconds:.0f} s, {outcome.bytes_in / 1e9:.1f} GB",
        f"peak resident set: {outcome.peak_rss_bytes >> 20} MiB, allowed {storm.RSS_MAX >> 20}",
        f"lines of the log that nobody has listed: {len(lines)}",
        f"wrong: {len(outcome.wrong)}",
        *outcome.wrong[:20],
        *lines[:20],
        "",
        *(f"{count:8} {what}" for what, count in sorted(outcome.counts.items())),
    ])
    print(text)
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}-storm"
    (options.results / f"{name}.txt").write_text(text + "\n")
    (options.results / f"{name}.json").write_text(json.dumps(record | {"counts": outcome.counts, "wrong": outcome.wrong}) + "\n")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
