"""How fast ggml's C makes and reads blocks of its types on one core: `libggml-base`, as tests/golden/ggml.py builds it.

Says the same lines as speed.py. 4096 x 4096 weights of f32, the best of the rounds after a first one that is not timed; of the types that ggml
searches for, one round; of those by importance of columns too (`Q4_K+importance`). Results lie in warm memory.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from golden import ggml  # noqa: E402
from golden.blocks import BY_IMPORTANCE, TYPES  # noqa: E402

SIDE = 4096
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", action="append")
    parser.add_argument("--format", action="append", help="of these alone")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps({"versions": {"ggml": ggml.PACKAGE}}))
    # ggml reads f32 alone.
    names = (*TYPES, *(f"{kind}+importance" for kind in BY_IMPORTANCE))
    formats = [name for name in names if not options.format or name in options.format]
    if options.dtype and "f32" not in options.dtype or not formats:
        return
    library = ggml.Ggml(ggml.built())
    weights = (np.random.default_rng(0).standard_normal((SIDE, SIDE)) * 0.02).astype(np.float32)
    values = np.ones_like(weights)
    importance = np.square(np.random.default_rng(1).standard_normal(SIDE)).astype(np.float32)
    for name in formats:
        kind, _, is_weighed = name.partition("+")
        number, elements, size = TYPES[kind]
        made = np.ones((SIDE, SIDE // elements * size), np.uint8)
        quantize = library.library.ggml_quantize_chunk
        to_float = library.traits(kind).to_float

        counts = importance.ctypes.data if is_weighed else None

        def forth(number=number, made=made, counts=counts):
            quantize(number, weights.ctypes.data, made.ctypes.data, 0, SIDE, SIDE, counts)

        def back(made=made, to_float=to_float):
            to_float(made.ctypes.data, values.ctypes.data, values.size)

        rounds = 1 if is_weighed or kind in SEARCHED else options.rounds + 1
        say(name, "quantize", best(forth, rounds), weights.nbytes, made.nbytes)
        if not is_weighed:
            say(name, "dequantize", best(back, options.rounds + 1), made.nbytes, values.nbytes)


def best(run, rounds: int) -> float:
    """The first of several is not counted."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found[1:] or found, default=math.inf)


def say(kind: str, op: str, seconds: float, bytes_in: int, bytes_out: int) -> None:
    print(json.dumps({"format": kind, "op": op, "dtype": "f32", "peer": "ggml", "seconds": round(seconds, 9), "elements": SIDE * SIDE,
                      "bytes_in": bytes_in, "bytes_out": bytes_out}), flush=True)


if __name__ == "__main__":
    main()
