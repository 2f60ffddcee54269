"""What the machine itself can do: no server of Arrow can be faster than these."""

import ctypes
import socket

import numpy as np

import layers

LIBC = ctypes.CDLL(None)
LIBC.memcpy.restype = ctypes.c_void_p
LIBC.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

TARGET = np.ones_like(layers.weights())  # `ones`, so that its pages exist


def memcpy(mib: int) -> int:
    """libc's memcpy of 64 MiB to 64 MiB, as often as `mib` holds them. A byte read and written counts once."""
    source = layers.weights()
    times = mib * layers.MIB // source.nbytes
    for _ in range(times):
        LIBC.memcpy(TARGET.ctypes.data, source.ctypes.data, source.nbytes)
    return times * source.nbytes


def send(address: str, mib: int) -> int:
    """Sends `mib` MiB of the same weights over one connection, 1 MiB a call, until the sink has counted them."""
    host, port = address.removeprefix("tcp://").split(":")
    source = memoryview(layers.weights()).cast("B")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        for number in range(mib):
            start = number * layers.MIB % len(source)
            connection.sendall(source[start:start + layers.MIB])
        connection.shutdown(socket.SHUT_WR)
        received = int(connection.recv(64))
    if received != mib * layers.MIB:
        raise AssertionError(f"expected {mib * layers.MIB} bytes at the sink, and it received {received}")
    return received
