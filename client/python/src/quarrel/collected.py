"""All layers of a stream, by name, with a table to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from quarrel.report import Summary
from quarrel.runs import CODED

if TYPE_CHECKING:
    from quarrel.layer import QuantizedLayer

NAME_CHARACTERS_MAX = 60
"""Of a name in the table; a longer one loses its middle."""


class Quantized(Mapping[str, "QuantizedLayer"]):
    """Quantized layers by name, in order.

    >>> quantized = client.quantize(model, scheme="int8").collect()
    >>> print(quantized.table())
    layer    shape       scheme  bits/weight  SQNR dB   cosine
    q_proj   [128, 256]  int8          8.125    43.08  0.99998  < worst
    up_proj  [256, 128]  int8          8.250    43.61  0.99998
    2 quantized, 0 kept, 0 failed: 65,536 weights, 8.188 bits a weight
    """

    def __init__(self, layers: Mapping[str, QuantizedLayer], summary: Summary | None) -> None:
        self._layers = dict(layers)
        self.summary = summary
        """The server's totals; None for layers put together by hand."""

    def __getitem__(self, name: str) -> QuantizedLayer:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Quantized({len(self)} layers)"

    def to_arrow(self) -> pa.Table:
        """The wire's rows of all layers: for `Client.dequantize`, Parquet, or whatever reads Arrow."""
        tables = [layer.to_arrow() for layer in self.values()]
        return pa.concat_tables(tables) if tables else pa.Table.from_batches([], CODED)

    def table(self, *, kept: bool = False) -> str:
        """A line for each layer: bits per weight, SQNR in dB and cosine, or why it failed; then totals.

        Layers that were kept are counted by reason, or have a line each if `kept`.
        """
        head = ("layer", "shape", "scheme", "bits/weight", "SQNR dB", "cosine")
        layers = [layer for layer in self.values() if kept or layer.status != "kept"]
        lines = [_line(layer) for layer in layers]
        widths = [max(map(len, column)) for column in zip(head, *(line[:6] for line in lines))]
        worst = self._worst()
        out = [_aligned(head, widths)]
        for layer, line in zip(layers, lines):
            if layer.status == "quantized":
                out.append(_aligned(line, widths) + ("  < worst" if layer.name == worst else ""))
            else:
                out.append(_aligned(line[:2], widths) + f"  {layer.status}: {layer.reason}")
        if not kept:
            out += self._kept()
        return "\n".join([*(line.rstrip() for line in out), self._totals()])

    def _kept(self) -> list[str]:
        names: dict[str, list[str]] = {}
        for layer in self.values():
            if layer.status == "kept":
                names.setdefault(layer.reason or "", []).append(layer.name)
        return [
            f"kept: {reason}  {len(those)}: {those[0]}{', ..' * (len(those) > 1)}" for reason, those in names.items()
        ]

    def _worst(self) -> str | None:
        quality = {
            name: layer.metrics.sqnr_db
            for name, layer in self.items()
            if layer.metrics is not None and layer.metrics.sqnr_db is not None
        }
        return min(quality, key=lambda name: quality[name]) if len(quality) > 1 else None

    def _totals(self) -> str:
        count = {"quantized": 0, "kept": 0, "failed": 0}
        elements, bits = 0, 0.0
        for layer in self.values():
            count[layer.status] += 1
            if layer.status == "quantized" and layer.metrics is not None:
                elements += layer.metrics.elements
                bits += (layer.metrics.bits_per_weight or 0.0) * layer.metrics.elements
        text = ", ".join(f"{number} {status}" for status, number in count.items())
        return text + (f": {elements:,} weights, {bits / elements:.3f} bits a weight" if elements else "")


def _line(layer: QuantizedLayer) -> tuple[str, ...]:
    name = layer.name
    if len(name) > NAME_CHARACTERS_MAX:
        half = NAME_CHARACTERS_MAX // 2 - 1
        name = f"{name[:half]}..{name[-half:]}"
    metrics = layer.metrics
    if layer.status != "quantized" or metrics is None:
        return name, str(list(layer.shape)), "", "", "", ""
    return (
        name,
        str(list(layer.shape)),
        layer.scheme or "",
        f"{metrics.bits_per_weight:.3f}" if metrics.bits_per_weight is not None else "-",
        f"{metrics.sqnr_db:.2f}" if metrics.sqnr_db is not None else "exact",
        f"{metrics.cosine:.5f}" if metrics.cosine is not None else "-",
    )


def _aligned(line: tuple[str, ...], widths: list[int]) -> str:
    """Words to the left, numbers to the right."""
    return "  ".join(
        text.ljust(width) if at < 3 else text.rjust(width) for at, (text, width) in enumerate(zip(line, widths))
    )
