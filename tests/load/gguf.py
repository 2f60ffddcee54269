"""A GGUF file to another: ours beside `llama-quantize`, in one run. `make bench-gguf`.

The model is made for it: a Llama in f16, all of whose matrices are pieces of the same random numbers. Each round runs llama.cpp and ours one after the
other, with as many threads as there are cores, each to a new file; the source is read once before, so that both find it in memory. Of llama.cpp the call is
timed (`llama_model_quantize`, in a process of its own, loaded before); of ours the whole command, its measuring of every layer and waiting for the disk
included. The files must be equal, byte for byte. Written under `results/`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import environment

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent
sys.path.append(str(LOAD.parent))

from golden import ggml, ggufs, llama  # noqa: E402

# What the issue asks for: times llama-quantize's speed.
GOALS = {"Q8_0": 2.0, "Q4_0": 2.0, "Q4_K_M": 3.0}
MODEL = ggufs.Llama(layers=8, hidden=2048, inter=8192, heads=16, kv=4, vocab=8192)

PEER = """
import sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from golden import llama
oracle = llama.LlamaCpp(llama.built())
for line in sys.stdin:
    source, made, number, threads = line.split("\\t")
    started = time.perf_counter()
    oracle.quantize(Path(source), Path(made), int(number), int(threads))
    print(time.perf_counter() - started, flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    llama.built()
    record = environment(REPOSITORY, options.binary) | {"command": " ".join(sys.argv), "peer": ggml.PACKAGE}
    with tempfile.TemporaryDirectory() as folder:
        measured = run(Path(folder), options)
    text = "\n".join([*(f"{key}: {value}" for key, value in record.items()), "", *table(measured)])
    print(text)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}-gguf"
    (options.results / f"{name}.txt").write_text(text + "\n")
    (options.results / f"{name}.json").write_text(json.dumps(record | {"measured": measured}, indent=1) + "\n")
    print(f"\nrecorded as {options.results / name}.txt and .json")
    return 0


def run(folder: Path, options) -> dict:
    source, theirs, ours = (folder / name for name in ("source.gguf", "theirs.gguf", "ours.gguf"))
    make(source)
    source.read_bytes()
    measured = {"bytes": source.stat().st_size, "llama-quantize": {}, "ours": {}}
    threads = len(os.sched_getaffinity(0))
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(LOAD.parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for _ in range(options.rounds):
        for scheme in GOALS:
            theirs.unlink(missing_ok=True)
            peer.stdin.write(f"{source}\t{theirs}\t{ggufs.MIXES[scheme]}\t{threads}\n")
            peer.stdin.flush()
            measured["llama-quantize"].setdefault(scheme, []).append(float(peer.stdout.readline()))
            ours.unlink(missing_ok=True)
            started = time.perf_counter()
            subprocess.run([options.binary, "quantize", source, ours, "--scheme", scheme, "--force", "--quiet"], check=True)
            measured["ours"].setdefault(scheme, []).append(time.perf_counter() - started)
            assert theirs.read_bytes() == ours.read_bytes(), f"{scheme}: another file than llama-quantize's"
    peer.stdin.close()
    peer.wait()
    return measured


def make(path: Path):
    drawn = (np.random.default_rng(0).standard_normal(2048 * 8192 + 99) * 0.02).astype(np.float16)
    tensors = {}
    for at, (name, shape) in enumerate(MODEL.shapes().items()):
        size = int(np.prod(shape))
        tensors[name] = drawn[at : at + size].reshape(shape) if len(shape) > 1 else np.ones(shape, np.float32)
    ggufs.write(path, MODEL.keys(), tensors)


def table(measured: dict) -> list[str]:
    size = measured["bytes"] / 1e9
    lines = [f"{size:.2f} GB of f16; seconds, median of {len(measured['ours']['Q8_0'])} rounds", ""]
    for scheme, goal in GOALS.items():
        ours, theirs = (measured[who][scheme] for who in ("ours", "llama-quantize"))
        ratio = statistics.median(one / other for one, other in zip(theirs, ours, strict=True))
        lines.append(f"{scheme:8} llama-quantize {statistics.median(theirs):6.2f}   ours {statistics.median(ours):6.2f}   "
                     f"{ratio:5.2f} times, at least {goal}: {'yes' if ratio >= goal else 'NO'}   (rounds: "
                     + ", ".join(f"{one:.2f}/{other:.2f}" for one, other in zip(theirs, ours, strict=True)) + ")")
    return lines


if __name__ == "__main__":
    sys.exit(main())
