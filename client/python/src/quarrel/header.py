"""The header of a safetensors file, read as strictly as the safetensors library does.

What is wrong here would be quantized as if it were right: weights read from another tensor's bytes, or a tensor that
nobody misses. Source of the format: the safetensors README, section Format; bits of each type: its crate's `Dtype`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from quarrel.errors import InvalidInputError

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Of an element of each type that a file may hold."""


@dataclass(frozen=True)
class Tensor:
    """An entry of the header; `start` and `stop` count from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def malformed(path: str, what: str, layer: str | None = None) -> InvalidInputError:
    """The error of a file that is not what it should be."""
    about = f"`{path}`" if layer is None else f"`{path}`: tensor `{layer}`"
    return InvalidInputError(
        f"{about} {what}", layer=layer, advice="Check that it was copied whole, and that it is safetensors."
    )


def parse(path: str, text: bytes, data_start: int, file_bytes: int) -> list[Tensor]:
    """The tensors of `text`, in the order of their bytes, which fill the file from `data_start` to its end.

    Raises:
        InvalidInputError: it is no header, or not this file's; with the tensor's name, where it is about one.
    """
    try:
        # Objects as tuples of pairs: JSON has no tuples, and a dict would hide a name that is there twice.
        entries = json.loads(text.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"is no safetensors file: its header is not JSON: {error}") from None
    if not isinstance(entries, tuple):
        raise malformed(path, "is no safetensors file: its header is not an object of JSON")
    tensors: dict[str, Tensor] = {}
    for name, entry in entries:
        if name in tensors:
            raise malformed(path, "is there twice", name)
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, entry, data_start)
    in_order = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.stop))
    _check_contiguous(path, in_order, data_start, file_bytes)
    return in_order


def _tensor(path: str, name: str, entry: Any, data_start: int) -> Tensor:
    fields = dict(entry) if isinstance(entry, tuple) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not is_utf8(name):
        raise malformed(path, "has a name that is no UTF-8", name)
    if not isinstance(dtype, str) or dtype not in BITS:
        raise malformed(path, f"has dtype `{dtype}`: expected one of {', '.join(BITS)}", name)
    if not _are_counts(shape):
        raise malformed(path, f"has shape `{shape}`: expected a list of integers of 0 or more", name)
    if not (_are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise malformed(path, f"has data_offsets `{offsets}`: expected its first byte and the one after its last", name)
    start, stop = offsets
    bits = math.prod(shape) * BITS[dtype]
    if (stop - start) * 8 != bits:
        expected = f"{bits / 8:.15g}" if bits < 1 << 64 else "more than a file holds"
        raise malformed(path, f"has {stop - start} bytes: expected {expected}, by `{dtype}` and shape {shape}", name)
    return Tensor(name, dtype, tuple(shape), data_start + start, data_start + stop)


def is_utf8(name: str) -> bool:
    """Whether a name can travel: Python's texts, and JSON's, may hold halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    # By exact type: to Python `True` is an integer too.
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_contiguous(path: str, tensors: Sequence[Tensor], data_start: int, file_bytes: int) -> None:
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            found, expected = tensor.start - data_start, at - data_start
            raise malformed(path, f"begins at data byte {found}: expected {expected}, the last one's end", tensor.name)
        if tensor.stop > file_bytes:
            raise malformed(path, f"ends at byte {tensor.stop} of {file_bytes}: the file is cut off", tensor.name)
        at = tensor.stop
    if at != file_bytes:
        raise malformed(path, f"has {file_bytes - at} bytes after its last tensor: expected none")
