"""A safetensors file as layers: the header at once, tensors run by run with `pread`.

Not mapped: pages of a map count as the process's memory, and a file that shrinks would kill it.
What its header says, `header` reads.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

from quarrel import header
from quarrel.errors import InvalidInputError
from quarrel.header import Tensor
from quarrel.runs import Layer, Piece, Unsent

HEADER_BYTES_MAX = 100_000_000
"""As in the safetensors library."""
UNCHANGED = "Leave the file alone while it is read; then quantize it again."

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
                raise InvalidInputError(
                    f"`{self.path}` has changed since its header was read", advice=UNCHANGED
                )
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
            raise InvalidInputError(
                f"`{self.path}` ends at byte {start}: expected {stop} by its header", advice=UNCHANGED
            )
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
    if not isinstance(path, str):
        raise TypeError(f"the path is `{path!r}`: expected a text")
    try:
        file = open(path, "rb")
    except ValueError as error:  # a zero in it
        raise InvalidInputError(f"cannot open `{path}`: {error}", advice="Correct the path.") from None
    with file:
        stamp = _stamp(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8):
            raise header.malformed(
                path, f"is no safetensors file: its first 8 bytes, {length}, are not the length of a header"
            )
        text = file.read(length)
    return Checkpoint(path, header.parse(path, text, 8 + length, size), stamp)


def _stamp(file: int) -> tuple[int, ...]:
    found = os.fstat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns
