"""Quantized layers, and the rows that they come in. Both hold the server's batches and read a column when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quarrel.codes import Layout
from quarrel.elements import numpy_type
from quarrel.errors import InvalidInputError

if TYPE_CHECKING:
    from quarrel.client import Client

Status = Literal["quantized", "kept", "failed"]
GLOBAL_SCALE = "weight_global_scale"
"""The name of a tensor in `extra_tensors`."""
NESTED = {"absmax": "u1", "nested_absmax": "<f4", "nested_offset": "<f4"}
"""Names of those of scales that are quantized too, and numpy's words for their types."""


@dataclass(frozen=True)
class Metrics:
    """What codes lose, over `elements` weights x with decoded values y.

    `mse`: mean (x-y)^2. `sqnr_db`: 10 log10(sum x^2 / sum (x-y)^2), in dB; None if the codes are exact. `cosine`: of
    the angle between x and y. `max_abs_error`, `amax`: max |x-y|, max |x|. `saturated`: weights beyond the codes'
    range. `bits_per_weight`: of codes with padding, scales, zero points, and a global scale. None where undefined.
    """

    elements: int
    mse: float | None
    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float | None
    amax: float | None
    saturated: int
    bits_per_weight: float | None


class _Rows:
    """What a run and a layer have in common: batches of consecutive rows of one layer."""

    _batches: Sequence[pa.RecordBatch]

    def _first(self, column: str) -> Any:
        return self._batches[0].column(column)[0].as_py()

    @property
    def name(self) -> str:
        """The layer's name."""
        return cast(str, self._first("layer_name"))

    @property
    def dtype(self) -> str:
        """The weights' element type: `f32`, `f16`, `bf16`, `f64`, `f8_e4m3`, `f8_e5m2`, or of `not_float` another."""
        return cast(str, self._first("dtype"))

    @property
    def shape(self) -> tuple[int, ...]:
        """The layer's full shape."""
        return tuple(self._first("shape"))

    @property
    def packed(self) -> npt.NDArray[np.uint8]:
        """Codes as on the wire, read-only bytes, channel after channel.

        Raises:
            InvalidInputError: the layer is not quantized.
        """
        self._need_codes("packed")
        return _joined([bytes_of(batch.column("quantized_data")) for batch in self._batches])

    @property
    def global_scale(self) -> npt.NDArray[np.float32] | None:
        """Of NVFP4, one number, by which the scales are divided: a code stands for its value times
        `scales / global_scale`. Of a layer's runs the first has it. None for other runs, and for other schemes.

        Raises:
            InvalidInputError: the layer is not quantized.
        """
        self._need_codes("global_scale")
        return self._extra(GLOBAL_SCALE, "<f4")

    @property
    def nested_scales(self) -> dict[str, npt.NDArray[Any]] | None:
        """With `double_quant=true`, `scales` as they are stored: `absmax` (uint8, one a scale, channel after channel),
        `nested_absmax` (float32, one for 256 of them) and `nested_offset` (float32 [1]), as bitsandbytes calls them.
        `scales` are `nested_quant_map[absmax] * nested_absmax + nested_offset`. Of a layer's runs the first has them.
        None for other runs, and for other schemes.

        Raises:
            InvalidInputError: the layer is not quantized.
        """
        self._need_codes("nested_scales")
        found = {name: self._extra(name, dtype) for name, dtype in NESTED.items()}
        present = {name: array for name, array in found.items() if array is not None}
        return present or None

    def _extra(self, name: str, dtype: str) -> npt.NDArray[Any] | None:
        for batch in self._batches:
            tensors = batch.column("extra_tensors").flatten()
            names = tensors.field("name").to_pylist()
            if name in names:
                return np.frombuffer(tensors.field("data")[names.index(name)].as_buffer(), dtype)
        return None

    def to_arrow(self) -> pa.Table:
        """The wire's rows, for `Client.dequantize`, Parquet, or whatever reads Arrow. Nothing is copied."""
        return pa.Table.from_batches(self._batches)

    def _flat(self, column: str) -> npt.NDArray[Any]:
        self._need_codes(column)
        return _joined([batch.column(column).flatten().to_numpy(zero_copy_only=False) for batch in self._batches])

    def _need_codes(self, what: str) -> None:
        status = self._status()
        if status != "quantized":
            about = f"layer `{self.name}`: "
            why = (self._note("message") or self._note("reason") or "").removeprefix(about)
            raise InvalidInputError(
                f"{about}it is {status} and has no {what}: {why}",
                layer=self.name,
                advice="Look at `status` before you ask for codes.",
            )

    def _status(self) -> Status:
        raise NotImplementedError

    def _note(self, column: str) -> str | None:
        notes = (note for batch in self._batches for note in batch.column(column).to_pylist())
        return next((note for note in notes if note is not None), None)


@dataclass(frozen=True, eq=False, repr=False)
class Run(_Rows):
    """One row of an answer: consecutive channels of a layer. Its arrays are parts of the layer's."""

    batch: pa.RecordBatch
    """The server's batch that holds it."""
    index: int
    """Its row in `batch`."""

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.status})"

    @cached_property
    def _batches(self) -> Sequence[pa.RecordBatch]:  # type: ignore[override]
        return [self.batch.slice(self.index, 1)]

    def _first(self, column: str) -> Any:
        return self.batch.column(column)[self.index].as_py()

    @property
    def status(self) -> Status:
        """`quantized`, `kept`, or `failed`."""
        return cast(Status, self._first("status"))

    def _status(self) -> Status:
        return self.status

    @property
    def reason(self) -> str | None:
        """Why it is not quantized: a word of `quarrel.reasons`."""
        return cast("str | None", self._first("reason"))

    @property
    def message(self) -> str | None:
        """The same as a sentence."""
        return cast("str | None", self._first("message"))

    @property
    def scheme(self) -> str | None:
        """The canonical scheme; None unless quantized."""
        return cast("str | None", self._first("scheme"))

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """Scales of the spans that begin in this run, flat."""
        return self._flat("scales")

    @property
    def zero_points(self) -> npt.NDArray[np.int32] | None:
        """One for each scale, flat; None if the scheme is symmetric."""
        return None if self._first("zero_points") is None else self._flat("zero_points")

    @property
    def metrics(self) -> Metrics | None:
        """What this run's codes lose; None unless quantized."""
        said = self._first("metrics")
        return None if said is None else Metrics(**said)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedLayer(_Rows):
    """A whole layer as the server answered it: quantized, kept as it was, or failed.

    Arrays are computed when they are asked for, and not remembered: `packed` and `scales` of a layer of one run are
    views of what came, everything else is a copy.
    """

    _batches: Sequence[pa.RecordBatch]
    _client: Client = field(compare=False)

    def __repr__(self) -> str:
        return f"QuantizedLayer({self.name!r}, {list(self.shape)}, {self.scheme or self.reason})"

    @cached_property
    def status(self) -> Status:
        """`quantized` if every run is, else `failed` or `kept`."""
        found = {status for batch in self._batches for status in batch.column("status").to_pylist()}
        return "failed" if "failed" in found else "kept" if "kept" in found else "quantized"

    def _status(self) -> Status:
        return self.status

    @property
    def reason(self) -> str | None:
        """Why it is not quantized: a word of `quarrel.reasons`."""
        return self._note("reason")

    @property
    def message(self) -> str | None:
        """The same as a sentence."""
        return self._note("message")

    @property
    def scheme(self) -> str | None:
        """The canonical scheme; None unless quantized."""
        return cast("str | None", self._first("scheme")) if self.status == "quantized" else None

    @property
    def bit_width(self) -> int | None:
        """Bits of a code; None unless quantized."""
        return cast("int | None", self._first("bit_width")) if self.status == "quantized" else None

    @property
    def metrics(self) -> Metrics | None:
        """What the layer's codes lose; None unless quantized."""
        said = self._batches[-1].column("layer_metrics")[-1].as_py()
        return None if said is None else Metrics(**said)

    @property
    def _layout(self) -> Layout:
        assert self.scheme is not None
        return Layout.of(self.scheme)

    @property
    def codes(self) -> npt.NDArray[Any]:
        """Codes in the layer's shape: int8, the signed numbers that dense bytes stand for too.

        FP8: the bits as uint8, for `.view(ml_dtypes.float8_e4m3fn)`, or of a torch tensor `.view(torch.float8_e4m3fn)`.
        FP4 and FP6: the bits of each code in a byte of its own, for `.view(ml_dtypes.float4_e2m1fn)` and
        `.view(ml_dtypes.float6_e2m3fn)`; of bitsandbytes' `nf4` and `fp4` its index in `quant_map`. ggml's types (`Q4_K`
        and the like): the bytes of each channel's blocks, uint8 [channels, bytes], as a GGUF file holds them.

        Raises:
            InvalidInputError: the layer is not quantized.
        """
        self._need_codes("codes")
        return self._layout.unpack(self.packed, self.shape)

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """Scales, widened exactly from the type they are stored in: [1] per tensor, [channels, 1] per channel,
        [channels, groups], or [rows, columns] of blocks. With `channel_dims` D, D dimensions stand for the channels.
        Of NVFP4, a code's scale is `scales / global_scale`. Of bitsandbytes' formats they are `absmax` (of
        `double_quant=true` as it is decoded) and `SCB`. Of
        ggml's types [channels, 0]: theirs are in the blocks.

        Raises:
            InvalidInputError: the layer is not quantized.
        """
        return self._shaped("scales")

    @property
    def zero_points(self) -> npt.NDArray[np.int32] | None:
        """One for each scale, in the signed domain of `codes`; None if the scheme is symmetric."""
        self._need_codes("zero_points")
        return None if self._first("zero_points") is None else self._shaped("zero_points")

    def _shaped(self, column: str) -> npt.NDArray[Any]:
        flat = self._flat(column)
        return flat.reshape(self._layout.scale_shape(self.shape))

    @property
    def weights(self) -> npt.NDArray[Any] | None:
        """A kept layer's weights as they came, if `return_kept` was asked for; FP8 as its bits, uint8.

        Raises:
            UnsupportedError: numpy has no such type; for `bf16`, ml_dtypes is not installed.
        """
        if self.status != "kept" or self._first("extra_tensors") is None:
            return None
        tensors = [batch.column("extra_tensors").flatten() for batch in self._batches]
        data = _joined([bytes_of(tensor.field("data")) for tensor in tensors])
        return data.view(numpy_type(self.dtype)).reshape(self.shape)

    def to_numpy(self) -> dict[str, npt.NDArray[Any]]:
        """`codes`, `scales` (not of ggml's types, whose codes hold them), and where they are not None `zero_points`, `global_scale`
        and what `nested_scales` holds; of a kept layer `weights`."""
        if self.status != "quantized":
            weights = self.weights
            return {} if weights is None else {"weights": weights}
        arrays = {"codes": self.codes} | ({} if self._layout.block_bytes else {"scales": self.scales})
        others = {"zero_points": self.zero_points, "global_scale": self.global_scale} | (self.nested_scales or {})
        return arrays | {name: array for name, array in others.items() if array is not None}

    def dequantize(self, dtype: str = "f32") -> npt.NDArray[Any]:
        """The weights that the codes stand for, in the layer's shape: computed by the server that made them.

        Raises:
            UnavailableError: the client is closed.
            InvalidInputError: the layer is kept without its weights, or failed.
        """
        return next(iter(self._client.dequantize([self], dtype=dtype)))[1]


def bytes_of(column: pa.LargeBinaryArray) -> npt.NDArray[np.uint8]:
    """The bytes of consecutive rows, one after the other, not copied."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    if data is None or bounds[0] == bounds[-1]:
        return np.empty(0, np.uint8)
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]


def _joined(parts: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
