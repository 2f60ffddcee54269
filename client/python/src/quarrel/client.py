"""`connect`, and the `Client` that it gives: what callers do, a method each."""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import flight

from quarrel import command, report
from quarrel.child import Child
from quarrel.collected import Quantized
from quarrel.errors import InvalidInputError, UnavailableError, UnsupportedError, of_arrow
from quarrel.jobs import Job
from quarrel.layer import QuantizedLayer
from quarrel.layers import coded_source_of, source_of
from quarrel.progress import Asked, checked
from quarrel.pull import Pulled
from quarrel.put import put
from quarrel.report import Scheme, ServerInfo, Summary
from quarrel.results import Answers, Results, Weights
from quarrel.runs import Cuts, Source
from quarrel.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

S = TypeVar("S", Stream, Pulled)
CONTRACT_MAJOR = "1"
HEARTBEATS = 4
"""In the server's `idle_seconds`: some may be late."""


def connect(
    address: str | None = None,
    *,
    binary: str | os.PathLike[str] | None = None,
    flags: Sequence[str] = (),
    timeout: float = 30.0,
) -> Client:
    """A client of the server at `address`, or of one that is started for it.

    Args:
        address: `HOST:PORT`, `grpc://HOST:PORT`, `unix:PATH` or `grpc+unix://PATH`. None starts `quarrel serve` as a
            child process on a Unix socket; it ends with the client, or with the interpreter, however that ends.
        binary: the program to start; by default `quarrel` on PATH, or the build of the checkout that this package
            lies in.
        flags: more flags of `quarrel serve`, such as `["--memory-bytes-max", "4294967296"]`.
        timeout: seconds until the server must have answered.

    Raises:
        UnavailableError: nobody answers there.
        StartError: there is no program to start, or it did not start.
        InvalidInputError: `address` is not one, or `binary` or `flags` stand beside it.

    >>> with quarrel.connect(address) as client:
    ...     client.info().verbs
    ('quantize', 'dequantize')
    """
    if address is not None:
        if binary is not None or flags:
            raise InvalidInputError(
                "`binary` and `flags` are for a server to start: expected none beside `address`",
                advice="Leave them out, or leave out `address`.",
            )
        return Client(command.location(address), None, timeout)
    child = Child(binary, flags, timeout)
    try:
        return Client(child.address, child, timeout)
    except BaseException:
        child.stop()
        raise


class Client:
    """A connection to a server, for any number of threads and streams at once. `connect` makes them."""

    def __init__(self, location: str, child: Child | None, timeout: float) -> None:
        self.location = location
        """Where the server listens."""
        self._child = child
        # A connection of its own. Over a Unix socket gRPC sends an authority that the server refuses.
        options: list[tuple[str, str | int]] = [("grpc.use_local_subchannel_pool", 1)]
        if location.startswith("grpc+unix:"):
            options.append(("grpc.default_authority", "localhost"))
        try:
            self._connection = flight.connect(location, generic_options=options)
        except (pa.ArrowException, OSError, UnicodeEncodeError) as error:
            raise InvalidInputError(
                f"cannot connect to `{location}`: {error}", advice="Write `grpc://HOST:PORT` or `unix:PATH`."
            ) from None
        self._closed = False
        self._opening = threading.Lock()
        self._open: weakref.WeakSet[Stream | Pulled] = weakref.WeakSet()
        try:
            self._info = report.server_info(self._act("server.info", timeout))
            if self._info.contract.split(".")[0] != CONTRACT_MAJOR:
                raise UnsupportedError(
                    f"the server speaks contract {self._info.contract}, and this client {CONTRACT_MAJOR}.x",
                    advice="Install the client of the server's version.",
                )
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self.location!r}{', closed' if self._closed else ''})"

    def close(self) -> None:
        """Cancels all streams, closes the connection, and stops a server that was started for it."""
        with self._opening:
            closed, self._closed = self._closed, True
        if closed:
            return
        for stream in list(self._open):
            stream.close()
        self._connection.close()
        if self._child is not None:
            self._child.stop()

    def quantize(
        self,
        layers: Any,
        *,
        scheme: str | None = None,
        recipe: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        profile: str | None = None,
        ignore: Sequence[str] | None = None,
        group_size: int | None = None,
        channel_dims: int | None = None,
        arith: str | None = None,
        on_error: str | None = None,
        on_indivisible: str | None = None,
        return_kept: bool | None = None,
        fallback: Mapping[str, Any] | None = None,
        amax: float | np.floating[Any] | None = None,
        importance: Mapping[str, Any] | None = None,
        progress: Asked = None,
    ) -> Results:
        """Quantizes layers: an iterator of `QuantizedLayer`, in order, that begins when it is first asked.

        Args:
            layers: a dict, or an iterable of pairs, of names and arrays (numpy f16, f32, f64, ml_dtypes bfloat16 and
                float8; torch tensors on any device), each of one dimension or more; the path of a safetensors file,
                read run by run, whose tensors without floats come back as kept (`not_float`); or a pyarrow Table,
                RecordBatch or RecordBatchReader with the columns of the contract. An iterable is consumed in another
                thread; what it raises is raised here.
            scheme: for every layer of rank 2 or more: `W4A16`, `int8`, `NVFP4A16`, `int4/g32`, .. (`schemes()`).
            recipe: rules from names to schemes, `{"rules": [{"targets": ["*.q_proj"], "scheme": "int8"}], "ignore":
                ["@standard"]}`, or the path of such a file, .json or .yaml.
            profile: a recipe with a name: `edge`, `local`, `cloud`.
            ignore: targets of layers to keep as they are, beside `scheme`; such a scheme also keeps layers whose
                columns its groups do not divide. `["@standard"]` by default for a path, nothing else; `[]` for none.
            group_size: columns that share a scale.
            channel_dims: leading dimensions that make up the channels: 2 for fused experts.
            arith: `f32`, or `weight-dtype` to round each step to the weights' type.
            on_error: `fail`, or `continue` to fail a layer of bad numbers alone.
            on_indivisible: `fail`, or `keep` layers whose columns the groups do not divide.
            return_kept: whether kept layers carry their weights.
            fallback: `{"schemes": [..], "sqnr_db_min": dB, "cosine_min": c}`: tried in order until one is good enough.
            amax: of NVFP4, the greatest magnitude over all layers that are to have one global scale, such as q, k and v
                of one attention; by default each layer's own. In a recipe, a rule's.
            importance: by layer, how much each column counts (llama.cpp's imatrix), for K-quants, Q4_0 to Q5_1, IQ4_NL.
            progress: True for a bar on standard error, or a function that is called with a `Progress`.

        Raises:
            TypeError, InvalidInputError, OSError: at once for layers that cannot be read. While iterating: any
                `Error`, of which `reason` is the server's word, and what an iterable of yours raises.

        >>> [layer] = client.quantize({"q_proj": np.ones((2, 64), np.float32)}, scheme="int8")
        >>> layer.name, layer.codes.shape, layer.scales.tolist()
        ('q_proj', (2, 64), [[0.007843137718737125], [0.007843137718737125]])
        """
        how = command.quantize(
            is_path=isinstance(layers, (str, os.PathLike)),
            scheme=scheme,
            recipe=recipe,
            profile=profile,
            ignore=ignore,
            group_size=group_size,
            channel_dims=channel_dims,
            arith=arith,
            on_error=on_error,
            on_indivisible=on_indivisible,
            return_kept=return_kept,
            fallback=fallback,
            amax=amax,
        )
        return Results(Answers(self._begin(how), source_of(layers, self._cuts(how), importance), progress), self)

    def dequantize(
        self,
        quantized: Quantized | Iterable[QuantizedLayer] | pa.Table | pa.RecordBatch | pa.RecordBatchReader,
        *,
        dtype: str = "f32",
        progress: Asked = None,
    ) -> Weights:
        """The weights that codes stand for: an iterator of names and arrays, in order.

        Args:
            quantized: what `quantize` gave, whole or in part, or its `to_arrow()`. Kept layers need their weights
                (`return_kept`), or must be left out.
            dtype: `f32`, `f16`, or `bf16` (needs ml_dtypes).
            progress: as for `quantize`.

        >>> quantized = client.quantize(model, scheme="int8").collect()
        >>> {name: array.shape for name, array in client.dequantize(quantized)}
        {'q_proj': (128, 256), 'up_proj': (256, 128)}
        """
        if not isinstance(dtype, str):
            raise TypeError(f"`dtype` is `{dtype!r}`: expected `f32`, `f16` or `bf16`")
        how = {"dequantize": {"dtype": dtype}}
        return Weights(Answers(self._begin(how), coded_source_of(quantized, self._cuts(how)), progress), dtype)

    def pull(
        self, source: str | os.PathLike[str], *, scheme: str | None = None, progress: Asked = None, **options: Any
    ) -> Results:
        """Quantizes a checkpoint that the server reads: what `quantize` would give for its layers.

        Args:
            source: a URI of a file or a model's folder under a prefix that the server may read (`--allow-read`), of
                safetensors, or of layers in Parquet or Arrow IPC; or a path on the server's own disk.
            scheme: for layers of rank 2 or more but `@standard`, where a model has such.
            options: `recipe`, `profile`, `ignore`, `group_size`, `arith`, `on_error`, .. as for `quantize`. Kept layers
                carry their weights.
            progress: as for `quantize`.

        Raises:
            Error: `uri_not_allowed`, `source_malformed`, .. while iterating.

        >>> [layer.name for layer in client.pull(checkpoint, scheme="int8")]
        ['q_proj.weight', 'up_proj.weight']
        """
        how = command.stored(scheme, options) | {"source": command.uri(source)}
        return Results(Answers(self._pulling(how), Source(pa.schema([]), iter(())), progress), self)

    def put(
        self,
        layers: Any,
        sink: str | os.PathLike[str],
        *,
        scheme: str | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Asked = None,
        **options: Any,
    ) -> Summary:
        """Sends layers, of which the server makes a quantized checkpoint: a folder that vLLM and transformers load.

        Nothing looks like a checkpoint before all layers have come and are written; whatever is raised, nothing does
        afterwards.

        Args:
            layers: as for `quantize`. Names are those of a checkpoint: `model.layers.0.mlp.up_proj.weight`, ..
            sink: a URI of a folder that is not there or empty, under a prefix that the server may write
                (`--allow-write`), or a path on the server's own disk.
            scheme: for `Linear` layers but `@standard`. Of NVFP4, layers that are fused need a rule of `recipe` with one
                `amax`: the server sees each before the next.
            config: the model's `config.json`, to which `quantization_config` is added.
            options: `recipe`, `profile`, `ignore`, `group_size`, `arith`, .. as for `quantize`.
            progress: as for `quantize`; of what was sent.

        Raises:
            TypeError, InvalidInputError, OSError: for layers that cannot be read. Any `Error`, of which `reason` is the
                server's word; and what an iterable of yours raises.

        >>> model = {"model.layers.0.mlp.up_proj.weight": np.ones((64, 128), np.float32)}
        >>> client.put(model, folder / "quantized", scheme="W4A16", config={"model_type": "llama"}).layers_quantized
        1
        """
        return self._put(layers, sink, threading.Event(), scheme, config, progress, options)

    def _put(
        self,
        layers: Any,
        sink: str | os.PathLike[str],
        stop: threading.Event,
        scheme: str | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Asked = None,
        options: Mapping[str, Any] | None = None,
    ) -> Summary:
        """`put`, until another thread sets `stop`."""
        how = command.stored(scheme, options or {})
        source = source_of(layers, self._cuts(how))
        words = json.dumps(how | {"sink": command.uri(sink)}, default=command.number).encode()
        said = dict(command.written("config", config or {}))
        self._check_open()
        return put(self._connection, words, source, said, self._heartbeat, checked(progress), stop)

    def submit(
        self,
        source: str | os.PathLike[str],
        sink: str | os.PathLike[str],
        *,
        scheme: str | None = None,
        dequantize: str | None = None,
        replace: bool = False,
        sqnr_db_min: float | None = None,
        cosine_min: float | None = None,
        metadata: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Job:
        """Has the server make a quantized checkpoint of another. It returns at once; `Job.wait` waits.

        Args:
            source: a URI as for `pull`.
            sink: a URI as for `put`; of a file, if the source is one; of a GGUF file, if it ends in `.gguf`.
            scheme: for `Linear` layers of a model but `@standard`; of a GGUF file what `llama-quantize` calls a type.
            dequantize: `f32`, `bf16` or `f16`, to make a dense checkpoint of a quantized one instead.
            replace: what is at `sink` is replaced, and a job that was begun there starts over.
            sqnr_db_min, cosine_min: the least quality of the worst layer: a job that misses it fails.
            metadata: a URI of a GGUF file of the same model, whose metadata and tokenizer a GGUF file is to have.
            options: `recipe`, `profile`, `ignore`, `group_size`, `arith`, .. as for `quantize`.

        Raises:
            Error: `uri_not_allowed`, `sink_taken`, .. at once, or from `Job.wait`.

        >>> job = client.submit(checkpoint, folder / "int8.safetensors", scheme="int8", sqnr_db_min=30)
        >>> job.wait().layers_quantized, job.state
        (2, 'done')
        """
        how = command.stored(scheme, options, dequantize)
        body: dict[str, Any] = {"command": how | {"source": command.uri(source), "sink": command.uri(sink)}}
        given = None if metadata is None else command.uri(metadata)
        least = {"sqnr_db_min": sqnr_db_min, "cosine_min": cosine_min}
        asked: dict[str, Any] = {"replace": replace or None, "metadata": given, **least}
        body |= {name: command.written(name, value) for name, value in asked.items() if value is not None}
        return Job(self._ask, json.loads(self._ask("job.submit", body)))

    def job(self, name: str) -> Job:
        """The job that the server calls so."""
        return Job(self._ask, json.loads(self._ask("job.status", {"job": name})))

    def jobs(self) -> list[Job]:
        """Jobs that the server remembers, the newest first."""
        return [Job(self._ask, json.loads(said)) for said in self._acts("job.list")]

    def schemes(self) -> list[Scheme]:
        """Every scheme that the server knows."""
        return report.schemes(self._act("schemes.list"))

    def info(self) -> ServerInfo:
        """The server's version and limits, as they were when we connected."""
        return self._info

    def _cuts(self, how: dict[str, Any]) -> Cuts:
        return Cuts.of(how, self._info.limits)

    def _begin(self, how: dict[str, Any]) -> Callable[[Source], Stream]:
        words = json.dumps(how, default=command.number).encode()
        return lambda source: self._opened(lambda: Stream(self._connection, words, source, self._heartbeat))

    def _pulling(self, how: dict[str, Any]) -> Callable[[Source], Pulled]:
        words = json.dumps(how, default=command.number).encode()
        return lambda _: self._opened(lambda: Pulled(self._connection, words))

    def _opened(self, begin: Callable[[], S]) -> S:
        with self._opening:
            self._check_open()
            stream = begin()
            self._open.add(stream)
        return stream

    @property
    def _heartbeat(self) -> float:
        return self._info.limits["idle_seconds"] / HEARTBEATS

    def _ask(self, action: str, body: Mapping[str, Any]) -> bytes:
        [said] = self._acts(action, json.dumps(body, default=command.number).encode())
        return said

    def _act(self, action: str, timeout: float = 30.0) -> bytes:
        [said] = self._acts(action, timeout=timeout)
        return said

    def _acts(self, action: str, body: bytes = b"", timeout: float = 30.0) -> list[bytes]:
        self._check_open()
        try:
            options = flight.FlightCallOptions(timeout=timeout)
            results = list(self._connection.do_action(flight.Action(action, body), options))
        except (pa.ArrowException, OSError) as error:
            raise of_arrow(error) from None
        return [bytes(result.body.to_pybytes()) for result in results]

    def _check_open(self) -> None:
        if self._closed:
            raise UnavailableError("the client is closed", advice="Connect anew.")
