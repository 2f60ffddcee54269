"""What the server says of its work and of itself, typed. Fields that a later minor version adds are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """What a stream was. Bytes in: of weights; bytes out: of codes, scales and zero points. Layers that could not
    travel (`not_float`) are not counted. None: no quantized layer defines it. `queue_seconds` and `kernel_seconds` are
    summed over the server's threads, `total_seconds` is wall time.
    """

    rows: int = 0
    layers_quantized: int = 0
    layers_kept: int = 0
    layers_failed: int = 0
    elements: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    bits_per_weight: float | None = None
    worst_layer: str | None = None
    worst_sqnr_db: float | None = None
    queue_seconds: float = 0.0
    kernel_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True)
class ServerInfo:
    """A server: its version, the contract's, the CPU level and threads that compute, limits by name, verbs."""

    version: str
    contract: str
    cpu_level: str
    threads: int
    limits: Mapping[str, int]
    verbs: tuple[str, ...]


@dataclass(frozen=True)
class Scheme:
    """A scheme that a server knows. `granularity` is `tensor`, `channel`, `group` or `block`; `packing` is
    `dense-int32`, `dense-uint8`, `int8` or `fp8`; `checkpoint_format` that of compressed-tensors, where one holds these
    bytes.
    """

    name: str
    element: str
    bit_width: int
    symmetric: bool
    granularity: str
    packing: str
    group_size: int | None = None
    block: tuple[int, ...] = ()
    checkpoint_format: str | None = None
    needs_calibration: bool = False
    profiles: tuple[str, ...] = ()


def summary(text: bytes) -> Summary:
    said = json.loads(text)
    if isinstance(said.get("worst_sqnr_db"), str):  # `-Infinity`, of a layer whose codes stand for more than f32 holds
        said["worst_sqnr_db"] = float(said["worst_sqnr_db"])
    return _typed(Summary, said)


def server_info(text: bytes) -> ServerInfo:
    said = json.loads(text)
    limits = {limit["name"]: limit["value"] for limit in said["limits"]}
    return _typed(ServerInfo, {**said, "limits": limits, "verbs": tuple(said["verbs"])})


def schemes(text: bytes) -> list[Scheme]:
    return [
        _typed(Scheme, {**said, "block": tuple(said["block"]), "profiles": tuple(said["profiles"])})
        for said in json.loads(text)["schemes"]
    ]


def _typed(kind: type[T], said: dict[str, Any]) -> T:
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in said.items() if name in known})
