"""Quarrel: quantizes neural-network weights, as a client of an Arrow Flight server.

>>> with quarrel.connect(address) as client:
...     print(client.quantize(model, scheme="W4A16").collect().table())
layer    shape       scheme  bits/weight  SQNR dB   cosine
q_proj   [128, 256]  W4A16         4.250    19.04  0.99382
up_proj  [256, 128]  W4A16         4.250    19.03  0.99380  < worst
2 quantized, 0 kept, 0 failed: 65,536 weights, 4.250 bits a weight
"""

from typing import Any

from quarrel.client import Client, connect
from quarrel.collected import Quantized
from quarrel.errors import (
    BusyError,
    Error,
    IdleError,
    InvalidInputError,
    ServerError,
    StartError,
    UnavailableError,
    UnsupportedError,
)
from quarrel.jobs import Job
from quarrel.layer import Metrics, QuantizedLayer, Run
from quarrel.progress import Progress
from quarrel.report import Scheme, ServerInfo, Summary
from quarrel.results import Results, Weights

__all__ = [
    "BusyError",
    "Client",
    "Error",
    "IdleError",
    "InvalidInputError",
    "Job",
    "Metrics",
    "Progress",
    "Quantized",
    "QuantizedLayer",
    "Results",
    "Run",
    "Scheme",
    "ServerError",
    "ServerInfo",
    "StartError",
    "Summary",
    "UnavailableError",
    "UnsupportedError",
    "Weights",
    "aio",
    "connect",
]


def __getattr__(name: str) -> Any:
    """`quarrel.aio` by its name alone; asyncio costs those nothing who do not use it."""
    if name == "aio":
        import quarrel.aio

        return quarrel.aio
    raise AttributeError(f"module `quarrel` has no attribute `{name}`")
