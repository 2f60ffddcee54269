"""How fast others compute our formats on one core: torch by hand, torchao, compressed-tensors, bitsandbytes, hqq.

One process, one thread, 4096 x 4096 weights, rows interleaved within a round, the best of the rounds after a first one
that is not timed. The first line says the versions; then comes one JSON object a row, of the same fields as those of
`server/kernels/benches/speed.rs`, with `peer` in the place of `level`.
"""

import argparse
import gc
import json
import math
import time
from importlib.metadata import version

import torch

import ao
import bnb
import compressed
import eager
import half_quadratic
from peer import QUANTIZE, Peer, size

SIDE = 4096
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--format", action="append", help="of these alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    versions = {name: version(name) for name in ("torch", "torchao", "compressed-tensors", "bitsandbytes", "hqq")}
    say(versions=versions | {"torch's CPU code": torch.backends.cpu.get_cpu_capability()})
    for dtype in options.dtype or DTYPES:
        weights = (torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.02).to(DTYPES[dtype])
        rows = [
            row for module in (eager, ao, compressed, bnb, half_quadratic) for format in module.FORMATS
            if not options.format or format in options.format
            for row in module.peers(format, weights)
        ]
        check(rows)
        measure(rows, dtype, options.rounds)


def check(rows: list[Peer]) -> None:
    """What is written here by hand is the format: its codes are those of compressed-tensors."""
    expected = {row.format: list(row.run())[0] for row in rows if row.name == compressed.NAME and row.op == QUANTIZE}
    for row in rows:
        if row.name in (eager.WHOLE, eager.BLOCKS) and row.op == QUANTIZE:
            codes, _ = row.run()
            same = torch.equal(codes.view(torch.uint8), expected[row.format].view(torch.uint8))
            assert same, f"{row.name} makes other codes of {row.format} than {compressed.NAME}"


def measure(rows: list[Peer], dtype: str, rounds: int) -> None:
    best = [math.inf] * len(rows)
    made = [size(row.run()) for row in rows]
    gc.disable()
    for _ in range(rounds):
        best = [min(before, timed(row)) for before, row in zip(best, rows, strict=True)]
        gc.collect()
    for row, seconds, bytes_out in zip(rows, best, made, strict=True):
        say(format=row.format, op=row.op, dtype=dtype, peer=row.name, seconds=round(seconds, 9), elements=SIDE * SIDE,
            bytes_in=row.bytes_in, bytes_out=bytes_out)


def timed(row: Peer) -> float:
    start = time.perf_counter()
    row.run()
    return time.perf_counter() - start


def say(**line) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
