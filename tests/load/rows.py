"""The rows of the report: what each of them runs, and what makes it right."""

import functools
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import ceilings
import client
import layers
import oracle
from measure import Row
from server import Driver, Server, ServerError, peer

# The names that `report` divides by.
TCP = "raw TCP, 1 MiB send and recv"
PUT = "C++ put"
NUMPY = "C++ exchange int8 (numpy)"
ECHO = "C++ exchange echo"
INT8 = "ours exchange int8"
W4A16 = "ours exchange W4A16"
BF16 = "ours exchange int8, bf16 input"
RUST = "ours exchange int8, Rust client"

CHECKED_MIB = 64  # whole layers of either element type


def baseline(servers: ExitStack, mib: int) -> list[Row]:
    """What bounds us (memcpy, TCP) and what we are compared with (C++)."""
    tcp, put, echo, numpy = (servers.enter_context(peer(role)) for role in ("tcp", "put", "echo", "int8"))
    send = functools.partial(ceilings.send, tcp.address)
    into_put = functools.partial(client.put, client.connect(put.address))
    few, all_ = layers.f32(CHECKED_MIB), layers.f32(mib)
    return [
        Row("memcpy, 64 MiB warm to warm", counted(lambda: ceilings.memcpy(CHECKED_MIB)), lambda: ceilings.memcpy(mib)),
        Row(TCP, counted(lambda: send(CHECKED_MIB)), lambda: send(mib), tcp),
        Row(PUT, counted(lambda: into_put(few)), lambda: into_put(all_), put),
        exchange(ECHO, echo, b"echo", layers.f32, mib, oracle.check_echo),
        exchange(NUMPY, numpy, b"int8", layers.f32, mib, functools.partial(oracle.check, oracle.int8)),
    ]


def ours(servers: ExitStack, mib: int, binary: Path, driver: Path) -> tuple[list[Row], str, ServerError | None]:
    """Our rows, how our server came up, and its fault. A missing binary is said; it is no fault."""
    if not binary.exists():
        return [], f"not measured, the peers ran alone: `{binary}` is missing", None
    try:
        server = servers.enter_context(Server([str(binary), "serve", "--listen", "127.0.0.1:0"]))
        rust = servers.enter_context(Driver([str(driver), server.address, "int8"]))
    except ServerError as error:
        return [], f"not measured, the peers ran alone: {error}", error
    through_rust = functools.partial(drive, rust)
    return [
        exchange(name, server, quantize(scheme), source, mib, functools.partial(oracle.check, formula))
        for name, scheme, source, formula in [
            (INT8, "int8", layers.f32, oracle.int8),
            (W4A16, "W4A16", layers.f32, oracle.w4a16),
            (BF16, "int8", layers.bf16, oracle.int8_of_bf16),
        ]
    ] + [
        Row(RUST, counted(lambda: through_rust(CHECKED_MIB)), lambda: through_rust(mib), server, rust),
    ], "measured", None


def drive(client: Driver, mib: int) -> int:
    """Sends `mib` MiB with a client of its own process, which checks that each layer came back quantized and whole."""
    layers_sent = mib * layers.MIB // layers.weights().nbytes
    answer = client.ask(str(mib))
    if answer != str(layers_sent):
        raise AssertionError(f"expected {layers_sent} layers back, and the client said `{answer}`")
    return mib * layers.MIB


def counted(work: Callable[[], int]) -> Callable[[], None]:
    """The check of a row with no answer to compare: its `work` fails unless the other end counted all of it."""

    def check() -> None:
        work()

    return check


def quantize(scheme: str) -> bytes:
    return json.dumps({"quantize": {"scheme": scheme}}).encode()


def exchange(
    name: str, server: Server, command: bytes, source: Callable[[int], list], mib: int, check: Callable
) -> Row:
    """A row that sends `source(mib)` through DoExchange, on one connection for all rounds."""
    through = functools.partial(client.exchange, client.connect(server.address), command)
    few, all_ = source(CHECKED_MIB), source(mib)
    return Row(
        name,
        lambda: check(few, list(through(few))),
        lambda: client.drain(all_, through(all_)),
        server,
    )
