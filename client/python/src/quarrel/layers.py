"""What a caller has in hand, as layers to send: arrays, tensors, files. Reads nothing before it is sent.

torch is not imported here: a tensor is known by its class's module, and converted by its own methods.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from quarrel import checkpoint, runs
from quarrel.collected import Quantized
from quarrel.elements import WORDS
from quarrel.errors import InvalidInputError, cut
from quarrel.header import is_utf8
from quarrel.layer import QuantizedLayer
from quarrel.runs import Cuts, Layer, Piece, Source, Unsent


def source_of(layers: Any, cuts: Cuts, importance: Any = None) -> Source:
    """The source of whatever `Client.quantize` takes."""
    said = None if importance is None else _importance(importance)
    match layers:
        case str() | os.PathLike():
            file = checkpoint.open_header(layers)
            layers = file.layers()
            return runs.of_layers(layers, cuts, bytes_total=file.float_bytes, join_layers=True, importance=said)
        case pa.Table() | pa.RecordBatch() | pa.RecordBatchReader():
            if said is not None:
                raise InvalidInputError(
                    "`importance` is given beside Arrow data",
                    advice="Send it as the column `importance`, a list of float32, on the first row of each layer.",
                )
            return runs.of_table(layers, cuts)
        case dict():
            return _arrays(layers.items(), cuts, said)
        case Mapping():
            return _arrays(iter(layers.items()), cuts, said)  # which may make its values when asked for them
        case Iterable() if not isinstance(layers, (bytes, bytearray)):
            return _arrays(layers, cuts, said)
        case _:
            raise TypeError(
                f"layers are a `{type(layers).__name__}`: expected a dict or iterable of names and arrays, the path of "
                "a safetensors file, or a pyarrow Table, RecordBatch or RecordBatchReader"
            )


def coded_source_of(quantized: Any, cuts: Cuts) -> Source:
    """The source of whatever `Client.dequantize` takes."""
    match quantized:
        case pa.Table() | pa.RecordBatch() | pa.RecordBatchReader():
            return runs.of_table(quantized, cuts)
        case Quantized():
            return runs.of_coded(quantized.values(), cuts)
        case Iterable() if not isinstance(quantized, (str, bytes)):
            return runs.of_coded(map(_coded, quantized), cuts)
        case _:
            raise TypeError(f"quantized is a `{type(quantized).__name__}`: {_CODED}")


_CODED = (
    "expected what `quantize` gives, an iterable of its layers (of a dict, `values()`), or a pyarrow Table, "
    "RecordBatch or RecordBatchReader"
)


def _coded(layer: Any) -> QuantizedLayer:
    if not isinstance(layer, QuantizedLayer):
        raise TypeError(f"quantized holds a `{type(layer).__name__}`: {_CODED}")
    return layer


def _importance(importance: Any) -> runs.Importance:
    if not isinstance(importance, Mapping):
        raise TypeError(f"`importance` is a `{type(importance).__name__}`: expected a dict of names and arrays")
    found = {}
    for name, array in importance.items():
        # Of torch, f32 first: numpy knows no bfloat16 of its own.
        numbers = np.asarray(array.detach().cpu().float() if hasattr(array, "detach") else array)
        if (numbers.dtype.kind not in "fiu" and numbers.dtype.name not in WORDS) or numbers.ndim == 0:
            raise TypeError(f"`importance` of `{name}` is `{numbers.dtype}` of {numbers.ndim} dimensions: expected numbers")
        found[name] = np.ascontiguousarray(numbers, np.float32).reshape(-1)
    return found


def _arrays(pairs: Iterable[tuple[str, Any]], cuts: Cuts, said: runs.Importance | None) -> Source:
    if not isinstance(pairs, Collection):
        # Whoever makes layers one by one may wait for an answer before the next.
        return runs.of_layers(_named(pairs), cuts, bytes_total=None, join_layers=False, importance=said)
    found: list[Layer | Unsent] = list(_named(pairs))
    total = sum(layer.bytes for layer in found if isinstance(layer, Layer))
    return runs.of_layers(found, cuts, bytes_total=total, join_layers=True, importance=said)


def _named(pairs: Iterable[tuple[str, Any]]) -> Iterator[Layer]:
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"a layer is a `{type(pair).__name__}`: expected a name and an array")
        if not isinstance(pair[0], str):
            raise TypeError(cut(f"a layer's name is `{pair[0]!r}`: expected a text"))
        yield layer_of(*pair)
        del pair  # before the next one is made


def layer_of(name: str, array: Any) -> Layer:
    """One array or tensor as a layer.

    Raises:
        InvalidInputError: its type, dtype or rank cannot be sent.
    """
    if not is_utf8(name):
        raise InvalidInputError(
            f"layer `{name}`: its name is no UTF-8", layer=name, advice="Give it a name without lone surrogates."
        )
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidInputError(
            f"layer `{name}` is a masked array: expected one without a mask",
            layer=name,
            advice="Choose what stands at masked places, as with `filled(0)`.",
        )
    if isinstance(array, np.ndarray):
        kind, read = array.dtype.name, _numpy_reader(array)
        element_bytes = array.dtype.itemsize
    elif any(base.__module__.split(".")[0] == "torch" for base in type(array).__mro__):
        kind, read = str(array.dtype).removeprefix("torch."), _torch_reader(array)
        element_bytes = array.element_size()
        # Of a fake tensor of a test, or of a subclass with its own ideas, neither need be there.
        layout = str(getattr(array, "layout", "strided")).removeprefix("torch.")
        what = "without data (meta)" if getattr(array, "is_meta", False) else f"of layout `{layout}`"
        if what != "of layout `strided`":
            raise InvalidInputError(
                f"layer `{name}` is a torch tensor {what}: expected a dense one with data",
                layer=name,
                advice="Load its data, or make it dense with `to_dense()`.",
            )
    else:
        raise InvalidInputError(
            f"layer `{name}` is a `{type(array).__name__}`: expected a numpy array or a torch tensor",
            layer=name,
            advice="Leave it out, or make an array of it with `numpy.asarray`.",
        )
    if kind not in WORDS:
        raise InvalidInputError(
            f"layer `{name}` has dtype `{kind}`: expected one of {', '.join(WORDS)}",
            layer=name,
            advice="Leave it out, or convert it to one of these.",
        )
    if array.ndim == 0:
        raise InvalidInputError(
            f"layer `{name}` has rank 0: expected at least one dimension",
            layer=name,
            advice="Leave it out, or give it a shape.",
        )
    return Layer(name, WORDS[kind], tuple(map(int, array.shape)), element_bytes, read)


def _numpy_reader(array: np.ndarray[Any, Any]) -> Any:
    little = array.dtype.newbyteorder("<")

    def read(piece: Piece) -> Any:
        # Contiguous little-endian arrays stay what they are; of others, one run is copied.
        run = np.ascontiguousarray(array[piece], little)
        return run.reshape(-1).view(np.uint8)

    return read


def _torch_reader(tensor: Any) -> Any:
    def read(piece: Piece) -> Any:
        run = tensor[piece].detach().cpu().contiguous().reshape(-1)
        # numpy knows no bfloat16, but it knows bytes.
        uint8 = _torch_dtype(run, "uint8")
        return run.view(uint8).numpy()

    return read


def _torch_dtype(tensor: Any, name: str) -> Any:
    """torch's `name`, from the module that defines the tensor's own dtype: no import of ours."""
    return getattr(sys.modules[type(tensor.dtype).__module__], name)
