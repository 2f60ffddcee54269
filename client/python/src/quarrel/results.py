"""Answers as they come: `Results` of `quantize`, `Weights` of `dequantize`. Nothing is sent before one is asked for.

Answers come as messages of rows; `Answers` cuts these into `Part`s of one layer each and says where a layer ends.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from quarrel import progress, report
from quarrel.collected import Quantized
from quarrel.elements import numpy_type
from quarrel.errors import InvalidInputError, UnavailableError
from quarrel.layer import QuantizedLayer, Run, bytes_of
from quarrel.progress import Progress
from quarrel.pull import Pulled
from quarrel.report import Summary
from quarrel.runs import Source, Unsent
from quarrel.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

    from quarrel.client import Client

T = TypeVar("T")
AGAIN = "Call `quantize` or `dequantize` again for another one."


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one layer in one batch; `ends`: the layer's last."""

    batch: pa.RecordBatch
    start: int
    stop: int
    ends: bool

    def rows(self) -> pa.RecordBatch:
        return self.batch.slice(self.start, self.stop - self.start)


class Answers:
    """The answers of one stream, which begins when the first is asked for."""

    def __init__(self, begin: Callable[[Source], Stream | Pulled], source: Source, shown: progress.Asked) -> None:
        self._begin = begin
        self._source = source
        self._shown = progress.checked(shown)
        self._display: progress.Display | None = None
        self._stream: Stream | Pulled | None = None
        self._closed = False
        self._failure: BaseException | None = None
        self.summary: Summary | None = None
        self.command: dict[str, Any] | None = None

    def parts(self) -> Iterator[Part]:
        """All of them, in order. Closes the stream at its end, and where anything is raised."""
        self.check()
        if self._closed or self._stream is not None:
            what = "closed" if self._closed else "being read already"
            raise UnavailableError(f"the stream is {what}", advice=AGAIN)
        try:
            yield from self._parts()
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            self.close()

    def fail(self, error: BaseException) -> None:
        """Remembers why nothing more comes, for whoever asks again: an end without it would pass for all there is."""
        if isinstance(error, Exception):
            self._failure = self._failure or error
        elif not isinstance(error, GeneratorExit):  # Ctrl-C is not raised again
            self._failure = self._failure or UnavailableError("the stream was interrupted", advice=AGAIN)

    def check(self) -> None:
        """Raises again what ended the stream early."""
        if self._failure is not None:
            raise self._failure

    def _parts(self) -> Iterator[Part]:
        self._stream = stream = self._begin(self._source)
        self._display = progress.display(self._shown, self._source.bytes_total)
        rows = layers = 0
        while (answer := stream.take()) is not None:
            if self.command is None:
                self.command = json.loads((stream.schema.metadata or {}).get(b"quarrel.command", b"{}"))
            batch = answer.batch
            if batch.num_rows == 0:
                self.summary = report.summary(answer.report)
                continue
            said = json.loads(answer.report)
            names = batch.column("layer_name").to_pylist()
            yield from self._unsent(rows)
            start = 0
            for _, run in groupby(names):
                stop = start + sum(1 for _ in run)
                # Whether the batch's last layer is complete, its progress says; others are followed by the next.
                ends = stop < len(names) or layers + 1 <= said["layers"]
                layers += ends
                rows += stop - start
                yield Part(batch, start, stop, ends)
                start = stop
                if ends:
                    yield from self._unsent(rows)
            del answer, batch
            if self._display is not None:
                counts = {name: said[name] for name in ("layers", "rows", "bytes_in", "bytes_out")}
                self._display.show(Progress(**counts, bytes_total=self._source.bytes_total, layer=names[-1]))
        if self.summary is None:  # the server's last word: without it the end would pass for all there is
            raise UnavailableError("the stream ended before its summary", advice="Send the layers again.")
        yield from self._unsent(rows)

    def _unsent(self, rows: int) -> Iterator[Part]:
        """Layers that stand, in what the caller gave, before the row after `rows`, and did not travel."""
        unsent = self._source.unsent
        while unsent and unsent[0][0] <= rows:
            assert self._stream is not None
            yield Part(self._kept(unsent.popleft()[1], self._stream.schema), 0, 1, True)

    def _kept(self, layer: Unsent, schema: pa.Schema) -> pa.RecordBatch:
        """The row that the server would answer, if the tensor could travel."""
        row: dict[str, Any] = {
            "layer_name": layer.name,
            "status": "kept",
            "reason": "not_float",
            "message": f"layer `{layer.name}`: dtype `{layer.dtype}` holds no floating-point numbers",
            "dtype": layer.dtype,
            "shape": layer.shape,
        }
        if self.command is not None and self.command.get("quantize", {}).get("return_kept"):
            tensor = {"name": "weight", "dtype": layer.dtype, "shape": layer.shape, "data": layer.read()}
            row["extra_tensors"] = [tensor]
        return pa.RecordBatch.from_arrays(
            [pa.array([row.get(field.name)], field.type) for field in schema], schema=schema
        )

    def close(self) -> None:
        self._closed = True
        display, self._display = self._display, None
        if display is not None:
            display.close()
        if self._stream is not None:
            self._stream.close()


class _Iterator(Generic[T]):
    """An iterator over a stream that closes it when it ends, fails, is left as a context manager, or is dropped."""

    def __init__(self, answers: Answers, items: Iterator[T]) -> None:
        # `items` refers to `answers` and not to this: so dropping this, half-way, is noticed at once.
        self._answers = answers
        self._items = items
        self._finalizer = weakref.finalize(self, answers.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        try:
            return next(self._items)
        except StopIteration:
            self._answers.check()
            raise
        except BaseException as ended:
            if _is_of_next(ended):  # another thread stands in the generator, and goes on
                raise InvalidInputError(
                    "another thread is taking from these results", advice="Take in one thread, and hand on from there."
                ) from None
            self._answers.fail(ended)
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is under way. Does nothing after the end."""
        self._finalizer()

    @property
    def summary(self) -> Summary | None:
        """The server's totals: after the end of the stream."""
        return self._answers.summary

    @property
    def command(self) -> dict[str, Any] | None:
        """The command as the server understood it, defaults filled in: after the first answer."""
        return self._answers.command


def _is_of_next(error: BaseException) -> bool:
    """Whether `next` itself raised it: `generator already executing`. Everything else comes from further down."""
    return type(error) is ValueError and error.__traceback__ is not None and error.__traceback__.tb_next is None


class Results(_Iterator[QuantizedLayer]):
    """Layers in the order in which they were given, each as soon as it is complete.

    >>> with client.quantize(model, scheme="int8") as results:
    ...     for layer in results:
    ...         print(layer.name, layer.status, layer.codes.dtype, layer.scales.shape)
    q_proj quantized int8 (128, 1)
    up_proj quantized int8 (256, 1)
    """

    def __init__(self, answers: Answers, client: Client) -> None:
        super().__init__(answers, _layers(answers, client))

    def runs(self) -> Iterator[Run]:
        """The same row by row, for memory that does not grow with a layer. Instead of iterating, not beside it."""
        for part in self._answers.parts():
            for index in range(part.start, part.stop):
                yield Run(part.batch, index)

    def collect(self) -> Quantized:
        """All layers, by name."""
        layers = {layer.name: layer for layer in self}
        return Quantized(layers, self.summary)


def _layers(answers: Answers, client: Client) -> Iterator[QuantizedLayer]:
    batches: list[pa.RecordBatch] = []
    for part in answers.parts():
        batches.append(part.rows())
        if part.ends:
            yield QuantizedLayer(tuple(batches), client)
            batches = []


class Weights(_Iterator[tuple[str, npt.NDArray[Any]]]):
    """Names and dequantized arrays, in the order in which they were given, each as soon as it is complete."""

    def __init__(self, answers: Answers, dtype: str) -> None:
        super().__init__(answers, _arrays(answers, dtype))

    def collect(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays, by name."""
        return dict(self)


def _arrays(answers: Answers, dtype: str) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    flat = np.empty(0, np.uint8)
    at = 0
    for part in answers.parts():
        rows = part.rows()
        shape = rows.column("shape")[0].as_py()
        kind = numpy_type(dtype)
        if at == 0:
            flat = np.empty(math.prod(shape), kind)
        column = rows.column("weights")
        values = bytes_of(column).view(kind) if dtype != "f32" else column.flatten().to_numpy(zero_copy_only=False)
        flat[at : at + values.size] = values
        at += values.size
        if part.ends:
            yield rows.column("layer_name")[0].as_py(), flat.reshape(shape)
            at = 0
