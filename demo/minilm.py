"""What Quarrel does to a real model: MiniLM goes in over Arrow Flight, smaller weights and their quality come out.

    python -m demo [path of the quarrel binary]

Every layer is sent as a checkpoint holds it, twice: as W8A16 and as W4A16. Then the server dequantizes what it made,
and sentence embeddings say how much of the model is left. Every number printed comes from the server's rows or from
those embeddings; the demo fails if W8A16 costs more than it may.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import flight

from . import bert, models, server
from .exchange import dequantize, exchange, layer_batches

SCHEMES = ("W8A16", "W4A16")
W8A16_COSINE_MIN = 0.999  # a mean; with the embeddings quantized too, 8 bits were measured at 0.9995

SENTENCES = [
    "A quarrel is a short, heavy arrow shot from a crossbow.",
    "The blacksmith hammered iron heads onto the bolts.",
    "How do I make a large language model fit on a small graphics card?",
    "Quantization stores the weights of a network in fewer bits.",
    "The soup needs salt, and perhaps a little lemon.",
    "She boiled potatoes while the rain drummed on the roof.",
    "Central banks raised interest rates for the third time this year.",
    "The orchestra tuned to the oboe, and the hall fell silent.",
]


class DemoError(Exception):
    """The server answered, but not as promised."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description="MiniLM through a Quarrel server.")
    parser.add_argument("binary", nargs="?", help="the quarrel binary (default: target/release/quarrel, then PATH)")
    arguments = parser.parse_args()
    try:
        run(server.find(arguments.binary))
    except (DemoError, models.FetchError, server.ServerError, flight.FlightError, pa.ArrowException, OSError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    return 0


def run(binary):
    folder = models.minilm()
    layers = models.float_layers(folder / "model.safetensors")
    encoder = bert.Encoder(folder)
    exact = encoder.embed(layers, SENTENCES)

    with server.Server(binary) as location, flight.connect(location) as client:
        print(f"\nall-MiniLM-L6-v2 through {location}")
        weights = sum(array.size for array in layers.values())
        print(f"{len(layers)} float layers, {weights / 1e6:.1f} M weights, {megabytes(layers):.1f} MB, each time\n")

        print(TABLE_HEAD)
        quantized = {}
        for scheme in SCHEMES:
            quantized[scheme] = quantize(client, scheme, layers)
            print(table_row(quantized[scheme], layers), flush=True)
        print_kept(quantized["W8A16"].rows)

        print(f"\nMean cosine of {len(SENTENCES)} sentence embeddings to fp32. Quantized layers: as dequantized by the")
        print("server. Kept layers: their fp32 originals.")
        for scheme in SCHEMES:
            mine = encoder.embed(layers | restored(client, quantized[scheme], layers), SENTENCES)
            cosines = (exact * mine).sum(axis=1)
            print(f"  {scheme}   {cosines.mean():.5f}   (worst {cosines.min():.5f})", flush=True)
            if scheme == "W8A16" and not cosines.mean() >= W8A16_COSINE_MIN:
                raise DemoError(f"mean cosine {cosines.mean():.5f} at W8A16, expected at least {W8A16_COSINE_MIN}")

        channels = 7  # divides no layer of the model
        again = quantize(client, "W4A16", layers, channels_per_row=channels)
        compared = same_bits(quantized["W4A16"].rows, again.rows)
        print(f"\nW4A16 again, cut into {again.rows.num_rows:,} runs of at most {channels} channels:")
        print(f"the same codes and scales, bit for bit ({compared / 1e6:.1f} MB compared).\n")


@dataclass
class Quantized:
    scheme: str
    rows: pa.Table
    seconds: float


def quantize(client, scheme, layers, channels_per_row=None) -> Quantized:
    """All of `layers` under the recipe that the command line makes of `--scheme`."""
    rule = {"targets": ["*"], "scheme": scheme, "on_indivisible": "keep"}
    command = {"quantize": {"recipe": {"rules": [rule], "ignore": ["@standard"]}}}
    start = time.perf_counter()
    rows = exchange(client, command, layer_batches(layers, channels_per_row=channels_per_row))
    seconds = time.perf_counter() - start
    if list(dict.fromkeys(rows["layer_name"].to_pylist())) != list(layers):
        raise DemoError(f"{scheme}: the layers came back incomplete or in another order")
    return Quantized(scheme, rows, seconds)


TABLE_HEAD = """\
              layers      bits per      SQNR, dB       quantized, MB         whole, MB
scheme   quantized  kept    weight   worst  median     before    after     before   after    seconds
----------------------------------------------------------------------------------------------------"""


def table_row(result, layers):
    rows = with_status(result.rows, "quantized")
    names = rows["layer_name"].unique().to_pylist()
    metrics = [value for value in rows["layer_metrics"].to_pylist() if value is not None]
    if not metrics or len(metrics) != len(names):
        raise DemoError(f"{result.scheme}: {len(names)} layers quantized, and {len(metrics)} of them whole")
    decibels = [value["sqnr_db"] for value in metrics if value["sqnr_db"] is not None]  # null if exact
    bits = sum(value["elements"] * value["bits_per_weight"] for value in metrics)
    before = megabytes({name: layers[name] for name in names})
    after = stored_megabytes(rows)
    whole = megabytes(layers)
    return (
        f"{result.scheme:<9}{len(names):>9}{len(layers) - len(names):>6}"
        f"{bits / sum(value['elements'] for value in metrics):>10.2f}"
        f"{min(decibels):>8.1f}{statistics.median(decibels):>8.1f}"
        f"{before:>11.1f}{after:>9.1f}{whole:>11.1f}{whole - before + after:>8.1f}{result.seconds:>11.2f}"
    )


def print_kept(rows):
    reasons = {}
    for row in with_status(rows, "kept").select(["layer_name", "reason"]).to_pylist():
        reasons.setdefault(row["reason"], []).append(row["layer_name"])
    print("\nKept, with the server's reason:")
    for reason, names in reasons.items():
        print(f"  {reason:<12}{len(names):>4}   {names[0]}{', ..' if len(names) > 1 else ''}")


def restored(client, result, layers):
    """The quantized layers as f32 again. Kept rows carry no data, and are not sent back."""
    arrays = dequantize(client, with_status(result.rows, "quantized"))
    for name, array in arrays.items():
        if array.shape != layers[name].shape:
            raise DemoError(f"{result.scheme}: `{name}` came back as {array.shape}, expected {layers[name].shape}")
    return arrays


def same_bits(one, other) -> int:
    """How many bytes of codes and scales the two tables share; an error if they differ in any."""
    mine, theirs = whole_layers(one), whole_layers(other)
    if mine.keys() != theirs.keys():
        raise DemoError("the two cuts quantize different layers")
    for name in mine:
        if mine[name] != theirs[name]:
            raise DemoError(f"`{name}` differs between the two cuts, expected the same bytes")
    return sum(len(codes) + len(scales) for codes, scales in mine.values())


def whole_layers(rows):
    """Layer name -> codes and scales: a layer is its rows, one after the other."""
    parts = {}
    for row in with_status(rows, "quantized").select(["layer_name", "quantized_data", "scales"]).to_batches():
        for name, codes, scales in zip(*row.columns):
            layer = parts.setdefault(name.as_py(), ([], []))
            layer[0].append(codes.as_py())
            layer[1].append(scales.values.to_numpy().tobytes())
    return {name: (b"".join(codes), b"".join(scales)) for name, (codes, scales) in parts.items()}


def with_status(rows, status):
    return rows.filter(pc.equal(rows["status"], status))


def megabytes(layers):
    return sum(array.nbytes for array in layers.values()) / 1e6


def stored_megabytes(rows):
    """Codes and scales; scales are f32 here, as the weights that they scale are."""
    codes = pc.sum(pc.binary_length(rows["quantized_data"])).as_py()
    scales = pc.sum(pc.list_value_length(rows["scales"])).as_py() * np.dtype("f4").itemsize
    return (codes + scales) / 1e6
