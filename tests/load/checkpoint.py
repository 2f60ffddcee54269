"""A checkpoint from folder to folder: ours beside llm-compressor's `model_free_ptq` and the disk's own copy, in one run.

The model is made for it: bf16, two files, layers of a Llama of 1.2 G parameters. Each round runs the copy (fsync'd), ours and the peer, one after the other,
each into a new folder; the source is read once before, so that all find it in memory. Bytes are compared: our tensors with `--arith
weight-dtype`, which is what the peer computes on a CPU, must equal the peer's. Written under `results/`.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from machine import environment

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent
sys.path.append(str(LOAD.parent))

from harness import cli  # noqa: E402

BF16 = ml_dtypes.bfloat16
HIDDEN, INNER, KEYS = 2048, 8192, 512
SCHEMES = ("W4A16", "W8A8", "FP8_DYNAMIC", "NVFP4A16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="the python that has llm-compressor; without it, ours alone")
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of the raw output")
    options = parser.parse_args()
    os.environ["QUARREL_BINARY"] = str(options.binary)  # what `cli` runs
    record = environment(REPOSITORY, options.binary) | {"command": " ".join(sys.argv)}
    with tempfile.TemporaryDirectory() as folder:
        measured, equal = run(Path(folder), options)
    text = "\n".join([*(f"{key}: {value}" for key, value in record.items()), "", *table(measured), "", *equal])
    print(text)
    name = f"{record['date'][:19].replace(':', '')}Z-{record['commit'].split()[0]}-checkpoint"
    (options.results / f"{name}.txt").write_text(text + "\n")
    (options.results / f"{name}.json").write_text(json.dumps(record | {"measured": measured}, indent=1) + "\n")
    print(f"\nrecorded as {options.results / name}.txt and .json")
    return 1 if any("differ" in line for line in equal) else 0


def run(folder: Path, options) -> tuple[dict, list[str]]:
    source = make(folder / "model", options.gib)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    measured = {"bytes": size, "copy": [], "ours": {}, "peer": {}}
    for _ in range(options.rounds):
        measured["copy"].append({"seconds": copied(source, folder / "copy")})
        for scheme in SCHEMES:
            measured["ours"].setdefault(scheme, []).append(ours(source, folder / "ours", scheme))
            if options.peer:
                measured["peer"].setdefault(scheme, []).append(theirs(options.peer, source, folder / "theirs", scheme))
    equal = [compared(options, source, folder, scheme) for scheme in SCHEMES] if options.peer else []
    return measured, equal


def make(folder: Path, gib: float) -> Path:
    folder.mkdir()
    per_layer = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INNER)
    layers = max(2, round(gib * (1 << 30) / per_layer))
    block = (np.random.default_rng(0).standard_normal(HIDDEN * INNER, dtype=np.float32) * 0.02).astype(BF16)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    homes = {}
    for file in range(2):
        tensors = {}
        for at in range(file * layers // 2, (file + 1) * layers // 2):
            for index, (name, shape) in enumerate(shapes.items()):
                rolled = np.roll(block, 7 * at + index)[: shape[0] * shape[1]]
                tensors[f"model.layers.{at}.{name}.weight"] = rolled.reshape(shape)
            tensors[f"model.layers.{at}.input_layernorm.weight"] = np.ones(HIDDEN, BF16)
        name = f"model-{file + 1:05}-of-00002.safetensors"
        cli.write(folder / name, tensors)
        homes |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copied(source: Path, destination: Path) -> float:
    """Seconds of a copy that is on the disk, as ours is."""
    shutil.rmtree(destination, ignore_errors=True)
    began = time.perf_counter()
    shutil.copytree(source, destination)
    for path in destination.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(destination)
    return seconds


def ours(source: Path, destination: Path, scheme: str) -> dict:
    shutil.rmtree(destination, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with cli.Running("quantize", source, destination, "-s", scheme, "--quiet") as running:
        # Its own peak: `ru_maxrss` of a child begins with its parent's.
        peak = 0
        while not running.is_over():
            peak = max(peak, running.peak_rss_bytes())
            time.sleep(0.002)
        seconds = time.perf_counter() - began
        ended = running.end()
    if ended.code:
        sys.exit(f"`quarrel quantize` failed with {ended.code}: {ended.err}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "peak_kib": peak / 1024, "cpu_seconds": cpu}


def theirs(python: Path, source: Path, destination: Path, scheme: str) -> dict:
    shutil.rmtree(destination, ignore_errors=True)
    script = LOAD / "checkpoint_peer/ptq.py"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([python, script, source, destination, scheme], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(f"the peer failed:\n{ended.stderr[-4000:]}")
    said = json.loads(ended.stdout.splitlines()[-1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return said | {"cpu_seconds": cpu}


def compared(options, source: Path, folder: Path, scheme: str) -> str:
    """Whether the tensors are the same, in the arithmetic that the peer has."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    subprocess.run([options.binary, "quantize", source, folder / "ours", "-s", scheme, "--arith", "weight-dtype", "-q"], check=True)
    theirs(options.peer, source, folder / "theirs", scheme)
    found = [tensors(folder / name) for name in ("ours", "theirs")]
    if found[0].keys() != found[1].keys():
        return f"{scheme}: the names of tensors differ: {sorted(found[0].keys() ^ found[1].keys())[:4]}"
    unlike = [name for name, (file, dtype, shape) in found[0].items() if read(found[1][name]) != read((file, dtype, shape))]
    return f"{scheme}: {len(found[0])} tensors, {len(unlike)} of them differ: {unlike[:4]}" if unlike else f"{scheme}: {len(found[0])} tensors, all the same bytes"


def tensors(folder: Path) -> dict:
    """Name to file, and where in it."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = (path, (entry["dtype"], tuple(entry["shape"])), (8 + length + start, end - start))
    return found


def read(place) -> tuple:
    path, kind, (start, length) = place
    with path.open("rb") as file:
        file.seek(start)
        return kind, file.read(length)


def table(measured: dict) -> list[str]:
    size = measured["bytes"]
    median = lambda rows, key: statistics.median(row[key] for row in rows)  # noqa: E731
    copy = median(measured["copy"], "seconds")
    lines = [
        f"{size / 1e9:.2f} GB of bf16, medians of {len(measured['copy'])} rounds",
        f"{'':24}{'GB/s':>8}{'seconds':>9}{'of copy':>9}{'of peer':>9}{'CPU s':>8}{'peak MiB':>10}{'of peer':>9}",
        f"{'copy, on the disk':24}{size / copy / 1e9:8.3f}{copy:9.2f}{1:9.2f}",
    ]
    for scheme, rows in measured["ours"].items():
        seconds, peak = median(rows, "seconds"), median(rows, "peak_kib") / 1024
        peer = measured["peer"].get(scheme)
        of_peer = [f"{median(peer, 'seconds') / seconds:9.1f}", f"{peak / (median(peer, 'peak_kib') / 1024):9.3f}"] if peer else ["", ""]
        lines.append(f"{'ours ' + scheme:24}{size / seconds / 1e9:8.3f}{seconds:9.2f}{copy / seconds:9.2f}{of_peer[0]}"
                     f"{median(rows, 'cpu_seconds'):8.2f}{peak:10.0f}{of_peer[1]}")
        if peer:
            seconds, peak = median(peer, "seconds"), median(peer, "peak_kib") / 1024
            lines.append(f"{'model_free_ptq ' + scheme:24}{size / seconds / 1e9:8.3f}{seconds:9.2f}{copy / seconds:9.2f}{1:9.1f}"
                         f"{median(peer, 'cpu_seconds'):8.2f}{peak:10.0f}{1:9.3f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
