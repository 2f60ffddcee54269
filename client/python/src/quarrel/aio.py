"""The same for asyncio: `quarrel.aio.connect`. Blocking steps of the one client run in threads: no second protocol.

A cancelled task cancels its stream. Methods of `QuantizedLayer` stay what they are: `dequantize` of one blocks.

>>> async def main():
...     async with quarrel.aio.connect(address) as client:
...         async for layer in client.quantize(model, scheme="int8"):
...             print(layer.name, layer.status)
>>> asyncio.run(main())
q_proj quantized
up_proj quantized
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy.typing as npt

from quarrel import client as blocking
from quarrel.collected import Quantized
from quarrel.jobs import POLL_SECONDS, Job
from quarrel.layer import QuantizedLayer, Run
from quarrel.progress import Asked
from quarrel.report import Scheme, ServerInfo, Summary
from quarrel.results import Results, Weights

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")
_END: Any = object()


def connect(
    address: str | None = None,
    *,
    binary: str | os.PathLike[str] | None = None,
    flags: Sequence[str] = (),
    timeout: float = 30.0,
) -> Connecting:
    """As `quarrel.connect`: `async with connect(..) as client`, or `client = await connect(..)`."""
    return Connecting(partial(blocking.connect, address, binary=binary, flags=flags, timeout=timeout))


class Connecting:
    """A client to be: await it, or enter it."""

    def __init__(self, connect: Callable[[], blocking.Client]) -> None:
        self._connect = connect
        self._client: AsyncClient | None = None

    def __await__(self) -> Generator[Any, None, AsyncClient]:
        return self._connected().__await__()

    async def _connected(self) -> AsyncClient:
        return AsyncClient(await asyncio.to_thread(self._connect))

    async def __aenter__(self) -> AsyncClient:
        self._client = await self
        return self._client

    async def __aexit__(self, *_: object) -> None:
        assert self._client is not None
        await self._client.close()


class AsyncClient:
    """`quarrel.Client` for asyncio: the same methods, options and errors."""

    def __init__(self, client: blocking.Client) -> None:
        self._client = client

    @property
    def location(self) -> str:
        """Where the server listens."""
        return self._client.location

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Client.close`."""
        await asyncio.to_thread(self._client.close)

    def quantize(self, layers: Any, **options: Any) -> AsyncResults:
        """As `Client.quantize`, with the same options; `layers` may be an async iterable of names and arrays too.

        Such an iterable runs in this loop, whichever thread sends.
        """
        loop_source = _FromLoop(layers) if isinstance(layers, AsyncIterable) else None
        return AsyncResults(self._client.quantize(loop_source or layers, **options), loop_source)

    def dequantize(self, quantized: Any, **options: Any) -> AsyncWeights:
        """As `Client.dequantize`."""
        return AsyncWeights(self._client.dequantize(quantized, **options), None)

    def pull(self, source: str | os.PathLike[str], **options: Any) -> AsyncResults:
        """As `Client.pull`."""
        return AsyncResults(self._client.pull(source, **options), None)

    async def put(
        self,
        layers: Any,
        sink: str | os.PathLike[str],
        *,
        scheme: str | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Asked = None,
        **options: Any,
    ) -> Summary:
        """As `Client.put`; `layers` may be an async iterable too. A task that is cancelled seals nothing."""
        stop = threading.Event()
        source = _FromLoop(layers) if isinstance(layers, AsyncIterable) else None
        put = partial(self._client._put, source or layers, sink, stop, scheme, config, progress, options)
        putting = asyncio.ensure_future(asyncio.to_thread(put))
        try:
            return await asyncio.shield(putting)
        except asyncio.CancelledError:
            stop.set()
            if source is not None:
                source.cancel()
            await asyncio.wait([putting])
            raise
        finally:
            if source is not None:
                await source.close()

    async def submit(self, source: str | os.PathLike[str], sink: str | os.PathLike[str], **options: Any) -> AsyncJob:
        """As `Client.submit`."""
        return AsyncJob(await asyncio.to_thread(partial(self._client.submit, source, sink, **options)))

    async def job(self, name: str) -> AsyncJob:
        """As `Client.job`."""
        return AsyncJob(await asyncio.to_thread(self._client.job, name))

    async def jobs(self) -> list[AsyncJob]:
        """As `Client.jobs`."""
        return list(map(AsyncJob, await asyncio.to_thread(self._client.jobs)))

    async def schemes(self) -> list[Scheme]:
        """As `Client.schemes`."""
        return await asyncio.to_thread(self._client.schemes)

    def info(self) -> ServerInfo:
        """As `Client.info`."""
        return self._client.info()


class AsyncJob:
    """`quarrel.Job` for asyncio: what it knows is in `job`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        """As it was when the server was last asked."""

    async def refresh(self) -> Self:
        """As `Job.refresh`."""
        await asyncio.to_thread(self.job.refresh)
        return self

    async def cancel(self) -> Self:
        """As `Job.cancel`."""
        await asyncio.to_thread(self.job.cancel)
        return self

    async def wait(self) -> Summary:
        """As `Job.wait`; a time limit is `asyncio.timeout`'s."""
        while self.job.state == "running":
            await asyncio.sleep(POLL_SECONDS)
            await self.refresh()
        return self.job.wait()


class _AsyncIterator(Generic[T]):
    """An async iterator over a blocking one, which has a thread of its own: asyncio's few are for everybody."""

    def __init__(self, results: Results | Weights, source: _FromLoop | None) -> None:
        self._results = results
        self._source = source
        self._items: Iterator[Any] = results
        self._thread = ThreadPoolExecutor(1, "quarrel-aio")
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            if self._closed:  # its thread has ended, and nothing blocks: what is left to say is how it ended
                item = next(self._items, _END)
            else:
                item = await asyncio.get_running_loop().run_in_executor(self._thread, next, self._items, _END)
        except BaseException:
            await self.close()
            raise
        if item is _END:
            await self.close()
            raise StopAsyncIteration
        return item  # type: ignore[no-any-return]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is under way. Does nothing after the end."""
        if self._source is not None:
            self._source.cancel()
        await asyncio.to_thread(self._close)
        if self._source is not None:
            await self._source.close()

    def _close(self) -> None:
        self._closed = True
        self._results.close()
        self._thread.shutdown()

    @property
    def summary(self) -> Summary | None:
        """The server's totals: after the end of the stream."""
        return self._results.summary

    @property
    def command(self) -> dict[str, Any] | None:
        """The command as the server understood it: after the first answer."""
        return self._results.command


class AsyncResults(_AsyncIterator[QuantizedLayer]):
    """`quarrel.Results` for asyncio."""

    _results: Results

    async def runs(self) -> AsyncIterator[Run]:
        """Row by row, for memory that does not grow with a layer. Instead of iterating, not beside it."""
        self._items = self._results.runs()
        try:
            async for run in self:
                yield run  # type: ignore[misc]
        finally:
            await self.close()

    async def collect(self) -> Quantized:
        """All layers, by name."""
        layers = {layer.name: layer async for layer in self}
        return Quantized(layers, self.summary)


class AsyncWeights(_AsyncIterator[tuple[str, npt.NDArray[Any]]]):
    """`quarrel.Weights` for asyncio."""

    async def collect(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays, by name."""
        return {name: array async for name, array in self}


class _FromLoop:
    """An async iterable as an iterator for the sending thread: each item is made in the loop."""

    def __init__(self, items: AsyncIterable[tuple[str, Any]]) -> None:
        self._items = items.__aiter__()
        self._loop = asyncio.get_running_loop()
        self._made: Future[Any] | None = None
        self._cancelled = False

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self

    def __next__(self) -> tuple[str, Any]:
        if not self._cancelled:
            self._made = asyncio.run_coroutine_threadsafe(self._next(), self._loop)
            if self._cancelled:  # meanwhile
                self._made.cancel()
            item = self._made.result()
            if item is not _END:
                return item  # type: ignore[no-any-return]
        raise StopIteration

    async def _next(self) -> Any:
        return await anext(self._items, _END)

    def cancel(self) -> None:
        """Frees the thread that waits for an item."""
        self._cancelled = True
        if self._made is not None:
            self._made.cancel()

    async def close(self) -> None:
        """Ends the caller's generator where it stands."""
        close = getattr(self._items, "aclose", None)
        if close is not None:
            with contextlib.suppress(RuntimeError):  # it is at work yet, and has been told to stop
                await close()
