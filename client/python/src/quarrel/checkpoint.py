"""A safetensors file as layers: the header at once, tensors run by run with `pread`.

Not mapped: pages of a map count as the process's memory, and a file that shrinks would kill it.
Source of the format: the safetensors README, section Format.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quarrel.errors import InvalidInputError
from quarrel.runs import Layer, Piece, Unsent

HEADER_BYTES_MAX = 100_000_000
"""As in the safetensors library."""

# The file's word, the wire's, and bytes of an element.
FLOATS = {
    "F64": ("f64", 8),
    "F32": ("f32", 4),
    "F16": ("f16", 2),
    "BF16": ("bf16", 2),
    "F8_E4M3": ("f8_e4m3", 1),
    "F8_E5M2": ("f8_e5m2", 1),
}


@dataclass(frozen=True)
class Tensor:
    """An entry of the header; `start` and `stop` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A file whose header has been read."""

    path: str
    tensors: list[Tensor]
    stamp: tuple[int, ...]

    @property
    def float_bytes(self) -> int:
        """Bytes of all tensors that can be sent."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors if tensor.dtype in FLOATS)

    def layers(self) -> Iterator[Layer | Unsent]:
        """Its tensors in the order of their bytes. The file is open as long as the iterator is."""
        with self._opened() as file:
            for tensor in self.tensors:
                yield self._layer(file, tensor)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        file = os.open(self.path, os.O_RDONLY)
        try:
            if _stamp(file) != self.stamp:
                raise InvalidInputError(f"`{self.path}` has changed since its header was read")
            yield file
        finally:
            os.close(file)

    def _layer(self, file: int, tensor: Tensor) -> Layer | Unsent:
        if tensor.dtype not in FLOATS:

            def whole() -> bytes:
                with self._opened() as again:  # it may be asked for when everything is sent
                    return self._read(again, tensor.start, tensor.stop)

            return Unsent(tensor.name, tensor.dtype.lower(), tensor.shape, whole)
        dtype, element_bytes = FLOATS[tensor.dtype]

        def read(piece: Piece) -> bytes:
            first, count = _range(piece, tensor.shape)
            start = tensor.start + first * element_bytes
            return self._read(file, start, start + count * element_bytes)

        return Layer(tensor.name, dtype, tensor.shape, element_bytes, read)

    def _read(self, file: int, start: int, stop: int) -> bytes:
        data = os.pread(file, stop - start, start)
        if len(data) == stop - start:
            return data
        # The system may give less than asked for; nothing at all is the end.
        parts = [data]
        while parts[-1] and (start := start + len(parts[-1])) < stop:
            parts.append(os.pread(file, stop - start, start))
        if start < stop:
            raise InvalidInputError(f"`{self.path}` ends at byte {start}: expected {stop} by its header")
        return b"".join(parts)


def _range(piece: Piece, shape: tuple[int, ...]) -> tuple[int, int]:
    """Where a piece begins in the flat layer, and its length, both in elements."""
    first, count = 0, math.prod(shape)
    for at, size in zip(piece, shape):
        count //= max(size, 1)
        if isinstance(at, slice):
            start, stop, _ = at.indices(size)
            return first + start * count, (stop - start) * count
        first += at * count
    return first, count


def open_header(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a file's header.

    Raises:
        OSError: it cannot be opened.
        InvalidInputError: it is not a safetensors file.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        stamp = _stamp(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
            raise InvalidInputError(
                f"`{path}` is no safetensors file: its first 8 bytes, {length}, are not the length of a header"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        tensors = [
            _tensor(name, entry, 8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"`{path}` is no safetensors file: its header cannot be read: {error}") from None
    tensors.sort(key=lambda tensor: tensor.start)
    for tensor in tensors:
        _check(path, tensor, size)
    return Checkpoint(path, tensors, stamp)


def _tensor(name: str, entry: Any, data_start: int) -> Tensor:
    start, stop = map(int, entry["data_offsets"])
    return Tensor(name, str(entry["dtype"]), tuple(map(int, entry["shape"])), data_start + start, data_start + stop)


def _check(path: str, tensor: Tensor, file_bytes: int) -> None:
    if not 0 <= tensor.start <= tensor.stop <= file_bytes:
        raise InvalidInputError(
            f"`{path}`: tensor `{tensor.name}` ends at byte {tensor.stop} of {file_bytes}: the file is cut off"
        )
    expected = math.prod(tensor.shape) * FLOATS.get(tensor.dtype, ("", 0))[1]
    if tensor.dtype in FLOATS and expected != tensor.stop - tensor.start:
        raise InvalidInputError(
            f"`{path}`: tensor `{tensor.name}` has {tensor.stop - tensor.start} bytes, expected {expected} by its shape"
        )


def _stamp(file: int) -> tuple[int, ...]:
    found = os.fstat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns
