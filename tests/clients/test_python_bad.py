"""Bad input, from Python: one table, a row per thing that a caller of the package can get wrong.

Each row says what is done, and what comes of it: the class, the reason, the layer, words of the message. The message
always says what to do, and afterwards the same client quantizes as ever, compared with its golden. Rows that might end
a process run in one of their own. What `test_python_errors.py` and `test_python_stream.py` hold is not repeated.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

import quarrel
from harness import oracle, wire
from harness.server import REPO, Server, eventually
from hostile import bad
from hostile.bad import X, lists, names, shapes, weights
from quarrel.reasons import REASONS
from quarrel.results import Answers, Results

MIB = 1 << 20
TEXT_BYTES_MAX = 2500  # the contract's 2,000 of a message, and its advice
ENDS_SECONDS = 60  # what takes longer hangs
INT8, TENSOR = {"scheme": "int8"}, {"scheme": "int8/tensor"}
NAN, INF = float("nan"), float("inf")
Invalid = quarrel.InvalidInputError


@dataclass(frozen=True)
class User:
    """Whom a row is about: somebody with a client, a folder, and a habit."""

    client: quarrel.Client
    folder: Path

    def quantize(self, layers, **options) -> list[quarrel.QuantizedLayer]:
        return list(self.client.quantize(layers, **(options or INT8)))

    def good_stream(self):
        """Two small layers, compared with their golden."""
        rng = np.random.default_rng(1)
        layers = {name: rng.standard_normal((8, 32)).astype(np.float32) for name in ("good.a", "good.b")}
        quantized = self.client.quantize(layers, scheme="int8").collect()
        assert list(quantized) == list(layers)
        for name, array in layers.items():
            expected = oracle.integers(array, 8)
            assert quantized[name].packed.tobytes() == expected.data
            assert np.array_equal(quantized[name].scales.ravel(), expected.scales)


@dataclass(frozen=True)
class Case:
    """A row. `kind` None: it is answered, and `do` gives the layers. `apart`: in a process of its own."""

    name: str
    do: Callable[[User], object]
    kind: type | tuple | None
    reason: str | None = None
    layer: str | None = None
    says: tuple[str, ...] = ()
    flags: tuple = ()
    apart: bool = False

    def play(self, user: User):
        error, layers = outcome(lambda: self.do(user))
        if self.kind is None:
            assert error is None, repr(error)
            judge_rows(self, layers)
        else:
            assert error is not None, f"answered: {layers}"
            judge(self, error)
        user.good_stream()


def outcome(do):
    """What `do` raises, and what it gives; it must end."""
    found = SimpleQueue()

    def run():
        try:
            found.put((None, do()))
        except BaseException as error:
            found.put((error, None))

    threading.Thread(target=run, daemon=True).start()
    return found.get(timeout=ENDS_SECONDS)


def judge(case: Case, error: BaseException):
    """One of ours, or a TypeError or OSError; it names the value and says what to do."""
    kinds = case.kind if isinstance(case.kind, tuple) else (case.kind,)
    assert type(error) in kinds, repr(error)
    text = str(error)
    assert len(text.encode("utf-8", "surrogatepass")) <= TEXT_BYTES_MAX, f"{len(text)} characters"
    missing = [word for word in case.says if word not in text]
    assert not missing, f"{text!r} does not hold {missing}"
    if isinstance(error, quarrel.Error):
        assert (error.reason, error.layer) == (case.reason, case.layer), text
        assert error.advice and error.advice in text, f"{text!r} does not say what to do"
        assert error.retryable == isinstance(error, (quarrel.BusyError, quarrel.UnavailableError))
        if case.reason:
            assert (type(error), error.advice) == (REASONS[case.reason].error, REASONS[case.reason].advice)


def judge_rows(case: Case, layers):
    """The layer comes back as kept or failed, with the reason, and a sentence that names it."""
    found = {layer.name: layer for layer in layers}[case.layer]
    assert (found.status in ("kept", "failed"), found.reason) == (True, case.reason)
    missing = [word for word in (f"`{case.layer}`", *case.says) if word not in found.message]
    assert not missing, f"{found.message!r} does not hold {missing}"
    assert REASONS[case.reason].advice


def refused(name, layers: Callable[[], object], reason, *says, layer=X, flags=(), apart=False, **options) -> Case:
    """The server refuses a stream with that reason. `layers()`: whatever `quantize` is given."""
    def do(user):
        return user.quantize(layers(), **options)
    return Case(name, do, REASONS[reason].error, reason, layer, says, flags, apart)


def answered(name, layers: Callable[[], object], reason, *says, layer=X, **options) -> Case:
    """The stream is answered, and `layer` has a reason."""
    return Case(name, lambda user: user.quantize(layers(), **options), None, reason, layer, says)


def optioned(name, reason, *says, **options) -> Case:
    """A good layer, and options that the server refuses."""
    return refused(name, lambda: {X: weights()}, reason, *says, layer=None, **options)


def told(name, do: Callable[[User], object], kind, *says, layer=None, reason=None, **more) -> Case:
    """The package itself refuses it."""
    return Case(name, do, kind, reason, layer, says, **more)


def unfit(name, array, *says) -> Case:
    """A value that is no layer, beside a good one; in an iterable too, where the good one has been sent."""
    def do(user):
        layers = {"good": weights(), X: array}
        with pytest.raises(Invalid) as caught:
            user.quantize(iter(layers.items()))
        assert caught.value.layer == X
        return user.quantize(layers)
    return told(name, do, Invalid, f"`{X}`", *says, "expected", layer=X)


def columns(name, reason, *says, layer=None, apart=False, **given) -> Case:
    """A table of one row with these columns; None leaves one out."""
    return refused(name, lambda: pa.Table.from_batches(bad.batch(**given)), reason, *says, layer=layer, apart=apart)


def binary(dtype, data, **given):
    """Columns of a row of binary weights."""
    return {"weights": pa.array([data], pa.large_binary()), "dtype": names(dtype), **given}


def runs(*counts: int, shape=(4, 9), name=X) -> pa.RecordBatch:
    """The first channels of a layer of `shape`, in rows of so many channels; they need not complete it."""
    whole = wire.layer_batch(name, weights((sum(counts), *shape[1:])), channels_per_row=list(counts))
    said = pa.array([list(shape)] * len(counts), pa.list_(pa.int64()))
    return whole.set_column(whole.schema.get_field_index("shape"), "shape", said)


def table(*batches) -> pa.Table:
    return pa.Table.from_batches(batches)


def reader(schema, batches) -> pa.RecordBatchReader:
    return pa.RecordBatchReader.from_batches(schema, batches)


def pairs(*given):
    """An iterable that makes them when asked."""
    yield from given


def binary_of(kind, offsets, data) -> pa.Array:
    """What pyarrow does not check when it is made: texts that are no UTF-8, offsets that go back."""
    told_offsets = np.array(offsets, np.int64 if kind == pa.large_binary() else np.int32)
    return pa.Array.from_buffers(kind, len(offsets) - 1, [None, pa.py_buffer(told_offsets), pa.py_buffer(data)])


def cut_stream() -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, runs(4).schema) as writer:
        writer.write_batch(runs(4))
    return sink.getvalue()[:-100]


# -- rows that come back damaged --------------------------------------------------------------------------------------

def altered(name, reason, *says, layer=X, command=INT8, array=None, **changed) -> Case:
    """A row as `quantize` answered it, given to `dequantize` with some columns changed."""
    def do(user):
        row = user.client.quantize({X: weights() if array is None else array}, **command).collect().to_arrow()
        row = row.combine_chunks()
        for column, value in changed.items():
            at = row.schema.get_field_index(column)
            row = row.set_column(at, row.schema.field(at), pa.array([value], row.schema.field(at).type))
        return list(user.client.dequantize(row))
    return Case(name, do, REASONS[reason].error, reason, layer, says)


FLOATS, NVFP4 = weights((3, 32)), {"scheme": "NVFP4A16"}


def global_scale(**changed) -> list:
    """What stands in `extra_tensors` of an NVFP4 layer's first row, with some of it changed."""
    return [{"name": "weight_global_scale", "dtype": "f32", "shape": [1], "data": bytes(4), **changed}]


def answers(user, name=X, shape=(4, 64), **options) -> quarrel.Quantized:
    return user.client.quantize({name: weights(shape)}, **(options or INT8)).collect()


def rearranged(name, change: Callable[[pa.Table], object], reason, *says, layer=X) -> Case:
    """The three rows of a layer of 12 MiB, given to `dequantize` when `change` has been at them."""
    def do(user):
        return list(user.client.dequantize(change(answers(user, shape=(3000, 1024)).to_arrow())))
    return Case(name, do, REASONS[reason].error, reason, layer, says)


def decoded(name, given: Callable[[User], object], kind, *says, reason=None, layer=None, **options) -> Case:
    return Case(name, lambda user: list(user.client.dequantize(given(user), **options)), kind, reason, layer, says)


# -- files ------------------------------------------------------------------------------------------------------------

def filed(name, content: bytes, *says, layer=None, reason=None) -> Case:
    """`content` as a safetensors file."""
    def do(user):
        path = user.folder / "bad.safetensors"
        path.write_bytes(content)
        return user.quantize(path)
    return Case(name, do, Invalid, reason, layer, says if reason else ("bad.safetensors", *says))


def safetensors(header, data=bytes(16)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(*shape, at=(0, 16), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


def shrunk(user):
    """A file that is cut while it is read: nothing is sent before an answer is asked for, and not all at once."""
    path = user.folder / "shrunk.safetensors"
    path.write_bytes(safetensors({f"{n}.weight": entry(1024, 1024, at=(n * 4 * MIB, (n + 1) * 4 * MIB))
                                  for n in range(8)}, np.ones(8 * MIB, np.float32).tobytes()))
    results = user.client.quantize(path, scheme="int8", return_kept=True)
    next(results)
    os.truncate(path, 1000)
    return list(results)


def integers_in_a_file(user):
    path = user.folder / "integers.safetensors"
    path.write_bytes(safetensors({X: entry(2, dtype="I64")}))
    return user.quantize(path)


def recipe_file(name, content: bytes, kind, *says, ending="json", reason=None) -> Case:
    def do(user):
        path = user.folder / f"recipe.{ending}"
        path.write_bytes(content)
        return user.quantize({X: weights()}, recipe=path)
    return Case(name, do, kind, reason, None, says if reason else (f"recipe.{ending}", *says))


def recipe_of(*rules, **more) -> dict:
    return {"recipe": {"rules": list(rules), **more}}


def rule(**fields) -> dict:
    return {"targets": ["*"], "scheme": "int8", **fields}


def nested(levels: int) -> list:
    found: list = []
    for _ in range(levels):
        found = [found]
    return found


# -- streams that are over --------------------------------------------------------------------------------------------

def many(count=200):
    for number in range(count):
        yield f"layer{number}", np.ones((512, 1024), np.float32)


def begun(user) -> quarrel.Results:
    results = user.client.quantize(many(), scheme="int8")
    next(results)
    return results


def closed(ask):
    """`ask` of results that were closed half-way."""
    def do(user):
        results = begun(user)
        results.close()
        return ask(results)
    return do


def failed(ask):
    """`ask` of results that have failed: as somebody does who tries again."""
    def do(user):
        results = user.client.quantize({X: weights(at_7=NAN)}, scheme="int8")
        with pytest.raises(Invalid):
            list(results)
        return ask(results)
    return do


def taken_by_a_closer(user):
    """One thread waits for an answer, another closes."""
    asked, release = threading.Event(), threading.Event()

    def layers():
        yield X, weights()
        asked.set()
        release.wait(ENDS_SECONDS)

    results = user.client.quantize(layers(), scheme="int8")
    next(results)

    def close():
        asked.wait(ENDS_SECONDS)
        results.close()
        release.set()

    closer = threading.Thread(target=close)
    closer.start()
    try:
        return next(results)
    finally:
        closer.join()


def closed_client(call):
    def do(user):
        client = quarrel.connect(user.client.location)
        client.close()
        return call(client)
    return do


def busy(user):
    """Three streams, each half-way through a layer that the server buffers, and room for two."""
    array = np.ones((384, 4096), np.float32)
    halves = wire.rows(wire.layer_batch("span", array, channels_per_row=192))
    refused_one, outcomes = threading.Event(), SimpleQueue()

    def one():
        def batches():
            yield halves[0]
            refused_one.wait(ENDS_SECONDS)
            yield halves[1]

        try:
            given = reader(halves[0].schema, batches())
            outcomes.put(user.client.quantize(given, **TENSOR).collect()["span"].packed.tobytes())
        except quarrel.Error as error:
            outcomes.put(error)
            refused_one.set()

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [outcomes.get() for _ in threads]
    [error] = [each for each in found if isinstance(each, Exception)]
    assert [each for each in found if each is not error] == [oracle.integers(array, 8, per_tensor=True).data] * 2
    raise error


SMALL = ("--message-bytes-max", 4 * MIB, "--memory-bytes-max", 64 * MIB, "--layer-bytes-max", 16 * MIB,
         "--batch-rows-max", 4, "--layers-max", 3, "--name-bytes-max", 32)
ROOM_FOR_TWO = ("--memory-bytes-max", 32 * MIB, "--layer-bytes-max", 8 * MIB, "--message-bytes-max", 8 * MIB,
                "--stall-seconds", 1)
UNICODE = "bad\udcff"
HIGH = pa.array([np.ones(2 * MIB, np.float32)], pa.large_list(pa.float32()))
DEEP = b"[" * 200_000

CASES = [
    # numbers
    refused("-inf in bf16", lambda: {X: weights(dtype=ml_dtypes.bfloat16, at_5=-INF)}, "non_finite", " 5 ", "-inf"),
    refused("NaN in f16", lambda: {X: weights(dtype=np.float16, at_9=NAN)}, "non_finite", " 9 ", "NaN"),
    refused("NaN in f8_e4m3", lambda: {X: np.array([[1, 2, NAN]], ml_dtypes.float8_e4m3fn)}, "non_finite", " 2 "),
    refused("an f64 beyond f32", lambda: {X: weights(dtype=np.float64, at_3=1e300)}, "non_finite", " 3 "),
    refused("NaN in the last run of a large layer",
            lambda: pairs(("good", weights()), (X, weights((3000, 1024), at_3071999=NAN))), "non_finite", "3071999"),
    refused("NaN in a transposed array", lambda: {X: weights(at_1=NAN).T}, "non_finite", " 3 "),
    refused("a range beyond f32", lambda: {X: weights(at_3=3e38, at_4=-3e38)}, "scale_overflow", "f32",
            scheme="int8-asym"),
    answered("NaN, and on_error: continue", lambda: {"good": weights(), X: weights(at_7=NAN)}, "non_finite", " 7 ",
             scheme="int8", on_error="continue"),
    answered("a range beyond f32, and on_error: continue", lambda: {X: weights(at_3=3e38, at_4=-3e38)},
             "scale_overflow", scheme="int8-asym", on_error="continue"),
    refused("a weight above the amax", lambda: {"good": weights((2, 16)), X: weights((3, 32), at_40=-9.5)},
            "amax_exceeded", "9.5", " 9", scheme="NVFP4A16", amax=9),
    answered("a weight above the amax, and on_error: continue",
             lambda: {"good": weights((2, 16)), X: weights((3, 32), at_40=-9.5)}, "amax_exceeded", "9.5", " 9",
             scheme="NVFP4A16", amax=9, on_error="continue"),
    refused("NaN under an amax", lambda: {X: weights((3, 32), at_40=NAN)}, "non_finite", " 40 ", scheme="NVFP4A16",
            amax=9.0),
    refused("infinity in NVFP4", lambda: {X: weights((3, 32), at_95=INF)}, "non_finite", " 95 ", scheme="NVFP4A16"),
    answered("NaN in MX, and on_error: continue", lambda: {X: weights((3, 32), at_40=NAN)}, "non_finite", " 40 ",
             scheme="MXFP6A16;mx=floor", on_error="continue"),

    # values that are no layers
    unfit("int64", np.ones((2, 2), np.int64), "`int64`", "float32"),
    unfit("complex", np.ones((2, 2), np.complex128), "`complex128`"),
    unfit("objects", weights().astype(object), "`object`"),
    unfit("texts", np.array([["1.0"]]), "`str"),
    unfit("records", np.zeros((2, 2), [("x", "f4")]), "`void"),
    unfit("dates", np.zeros((2, 2), "M8[s]"), "`datetime64"),
    unfit("rank 0", np.array(1, np.float32), "rank 0"),
    unfit("a numpy scalar", np.float32(1), "`float32`"),
    unfit("nothing", None, "`NoneType`"),
    unfit("a list", [[1.0, 2.0]], "`list`"),
    unfit("a pyarrow array", pa.array([1.0]), "`DoubleArray`"),
    # What lies under a mask is no weight, and codes would not say which were masked.
    unfit("a masked array", np.ma.masked_array(weights(), weights() > 0), "mask"),

    # names
    told("a name of bytes", lambda user: user.quantize({b"raw": weights()}), TypeError, "b'raw'", "name"),
    told("a name that is None", lambda user: user.quantize(pairs((None, weights()))), TypeError, "None", "name"),
    told("a name that is no UTF-8", lambda user: user.quantize({UNICODE: weights()}), Invalid, "UTF-8", layer=UNICODE),
    told("a name that is no UTF-8, of a large layer, in an iterable",
         lambda user: user.quantize(pairs(("good", weights()), (UNICODE, np.ones((1024, 1024), np.float32)))),
         Invalid, "UTF-8", layer=UNICODE),
    refused("a name of a megabyte", lambda: {"n" * MIB: weights()}, "name_too_long", "1024", str(MIB),
            layer="n" * 98 + "..." + "n" * 98),  # as the server cuts values
    told("a name of a megabyte, of integers", lambda user: user.quantize({"n" * MIB: np.ones((2, 2), int)}),
         Invalid, "`int64`", layer="n" * MIB),
    refused("a name with a line break and a zero", lambda: {"a\n\0b": weights(at_1=NAN)}, "non_finite", " 1 ",
            layer="a\n\0b"),
    refused("an empty name", lambda: {"": weights(at_1=NAN)}, "non_finite", "``", layer=""),
    refused("a name twice, at once", lambda: [(X, weights()), (X, weights())], "layer_repeated"),
    refused("a name twice, later", lambda: pairs((X, weights()), ("a", weights()), (X, weights())), "layer_repeated"),

    # what is given as layers
    told("a path of bytes", lambda user: user.quantize(b"model.safetensors"), TypeError, "`bytes`", "path"),
    told("quantized layers once more", lambda user: user.quantize(answers(user)), Invalid, "`QuantizedLayer`", layer=X),
    told("results of another stream", lambda user: user.quantize(user.client.quantize({X: weights()}, **INT8)),
         TypeError, "`QuantizedLayer`", "a name and an array"),
    told("a column of Arrow", lambda user: user.quantize(pa.array([1.0])), TypeError, "expected"),
    told("an array and no name", lambda user: user.quantize([weights()]), TypeError, "`ndarray`", "a name"),

    # options
    told("a keyword that is none", lambda user: user.quantize({X: weights()}, shceme="int8"), TypeError,
         "shceme"),
    told("a scheme of bytes", lambda user: user.quantize({X: weights()}, scheme=b"int8"), TypeError, "bytes"),
    told("a group size of numpy's", lambda user: user.quantize({X: weights()}, scheme="int4", group_size=np.int64(9)),
         TypeError, "int64"),
    told("a recipe that is a number", lambda user: user.quantize({X: weights()}, recipe=3), TypeError, "recipe", "int"),
    told("a recipe that is a list", lambda user: user.quantize({X: weights()}, recipe=[1]), TypeError, "recipe",
         "list"),
    told("ignore that is a number", lambda user: user.quantize({X: weights()}, scheme="int8", ignore=3), TypeError,
         "ignore", "int"),
    told("progress that is a number", lambda user: user.quantize({X: weights()}, scheme="int8", progress=3), TypeError,
         "progress", "int"),
    optioned("a scheme that is a number", "command_malformed", "`8`", "string", scheme=8),
    optioned("a scheme that is a number, beside ignore", "command_malformed", "`8`", "string", scheme=8, ignore=["y"]),
    optioned("a ladder that is a number, beside ignore", "command_malformed", "`3`", scheme="int4", ignore=["y"],
             fallback={"schemes": 3}),
    told("a recipe's path with a zero", lambda user: user.quantize({X: weights()}, recipe="a\0.json"), Invalid,
         ".json"),
    optioned("a scheme that is a list", "command_malformed", "sequence", "string", scheme=["int8"]),
    optioned("a scheme of two megabytes", "command_malformed", "1048576", scheme="x" * 2 * MIB),
    optioned("a scheme that is no UTF-8", "command_malformed", "surrogate", scheme=UNICODE),
    optioned("an empty scheme", "scheme_unknown", "``", "W4A16", scheme=""),
    optioned("an unknown scheme in a rule", "scheme_unknown", "W5", **recipe_of(rule(scheme="W5"))),
    optioned("an unknown scheme in a ladder", "scheme_unknown", "int9", scheme="int4",
             fallback={"schemes": ["int9"], "sqnr_db_min": 20}),
    optioned("an unknown profile", "profile_unknown", "`moon`", "`edge`", profile="moon"),
    optioned("an unknown key in a rule", "field_unknown", "colour", **recipe_of(rule(colour="red"))),
    optioned("an unknown key in a ladder", "field_unknown", "db", scheme="int4",
             fallback={"schemes": ["int8"], "db": 1}),
    optioned("a group size where there are no groups", "option_conflict", "W8A8", "64", scheme="W8A8", group_size=64),
    optioned("a group size beside a profile", "option_conflict", "group_size", "profile", profile="edge", group_size=4),
    optioned("on_indivisible without groups", "option_conflict", "on_indivisible", scheme="int8",
             on_indivisible="keep"),
    optioned("a ladder without a threshold", "option_conflict", "sqnr_db_min", scheme="int4",
             fallback={"schemes": ["int8"]}),
    optioned("a group size below zero", "command_malformed", "group_size", scheme="int4", group_size=-1),
    optioned("a group size with a fraction", "command_malformed", "group_size", scheme="int4", group_size=64.5),
    refused("channel dims of 5,000 digits", lambda: {X: weights()}, "scheme_unknown", layer=None,
            scheme="int8;channel_dims=" + "9" * 5000),
    told("a recipe of many levels", lambda user: user.quantize({X: weights()}, recipe={"rules": nested(100_000)}),
         Invalid, "`recipe`", "nested"),
    optioned("channel dims of zero", "option_invalid", "channel_dims", scheme="int8", channel_dims=0),
    optioned("an unknown arith", "option_invalid", "f64", "weight-dtype", scheme="int8", arith="f64"),
    optioned("an unknown on_error", "option_invalid", "maybe", "`continue`", scheme="int8", on_error="maybe"),
    told("a threshold that is NaN", lambda user: user.quantize(
        {X: weights()}, scheme="int4", fallback={"schemes": ["int8"], "sqnr_db_min": NAN}),
        (TypeError, Invalid), "nan"),
    optioned("an amax where there is no global scale", "option_conflict", "`amax`", "`int8`", scheme="int8", amax=1.0),
    optioned("an amax of MX", "option_conflict", "`amax`", "`MXFP4A16`", scheme="MXFP4A16", amax=1.0),
    optioned("an amax of MX, beside ignore", "option_conflict", "`amax`", "`MXFP4A16`", scheme="MXFP4A16", amax=1.0,
             ignore=["y"]),
    optioned("an amax beside a profile", "option_conflict", "`amax`", "profile", profile="edge", amax=1.0),
    optioned("an amax beside a recipe", "option_conflict", "`amax`", "recipe", amax=1,
             **recipe_of(rule(scheme="NVFP4A16"))),
    optioned("an amax in a rule without a global scale", "option_conflict", "`amax`", "`int8`",
             **recipe_of(rule(amax=1.0))),
    optioned("an amax below zero", "option_invalid", "`amax`", "-1", scheme="NVFP4A16", amax=-1),
    optioned("an amax beyond f32", "option_invalid", "`amax`", scheme="NVFP4A16", amax=1e39),
    optioned("an amax that is a word", "command_malformed", "much", scheme="NVFP4A16", amax="much"),
    optioned("an amax that is a truth", "command_malformed", "amax", scheme="NVFP4A16", amax=True),
    told("an amax that is NaN", lambda user: user.quantize({X: weights()}, scheme="NVFP4A16", amax=NAN), Invalid,
         "`amax`", "nan"),
    told("an amax that is numpy's infinity", lambda user: user.quantize({X: weights()}, scheme="NVFP4A16",
         amax=np.float32(INF)), Invalid, "`amax`", "inf"),
    told("an amax that is an array", lambda user: user.quantize({X: weights()}, scheme="NVFP4A16", amax=np.ones(3)),
         TypeError, "`amax`", "ndarray"),
    told("an amax that is complex", lambda user: user.quantize({X: weights()}, scheme="NVFP4A16", amax=np.complex64(1)),
         TypeError, "`amax`", "complex64"),
    optioned("a group size of NVFP4", "option_conflict", "group_size", "`NVFP4A16`", scheme="NVFP4A16", group_size=16),
    optioned("a group in the name of MX", "scheme_unknown", "`MXFP4A16/g32`", scheme="MXFP4A16/g32"),
    optioned("an unknown rule of MX", "scheme_unknown", "mx=ceil", scheme="MXFP4A16;mx=ceil"),
    optioned("a rule of MX where there is none", "scheme_unknown", "mx=floor", scheme="NVFP4A16;mx=floor"),
    refused("a group of NVFP4 that does not divide", lambda: {X: weights((4, 24))}, "group_size_indivisible", "16",
            "24", scheme="NVFP4A16"),
    refused("a group of MX that does not divide", lambda: {X: weights((4, 48))}, "group_size_indivisible", "32", "48",
            scheme="MXFP8A16;mx=rceil"),
    optioned("an unknown set in ignore", "recipe_invalid", "@nope", "@standard", scheme="int8", ignore=["@nope"]),
    optioned("a regex that is none", "recipe_invalid", "re:(", "unclosed", scheme="int8", ignore=["re:("]),
    optioned("a regex that looks around", "recipe_invalid", "(?!a)b", **recipe_of(rule(targets=["re:(?!a)b"]))),
    optioned("a rule without targets", "recipe_invalid", "target", **recipe_of(rule(targets=[]))),
    refused("a group that does not divide", lambda: {X: weights((4, 96))}, "group_size_indivisible", "64", "96",
            scheme="int4", group_size=64),
    refused("blocks in rank 3", lambda: {X: weights((2, 3, 9))}, "rank_unsupported", "FP8_BLOCK", scheme="FP8_BLOCK"),
    refused("channel dims that leave no columns", lambda: {X: weights()}, "rank_unsupported", "channel_dims", "[3, 9]",
            scheme="int8", channel_dims=2),
    refused("33 dimensions", lambda: {X: np.ones((1,) * 33, np.float32)}, "shape_invalid", "33", "32"),

    # layers that are kept, and why
    answered("a layer that ignore names", lambda: {X: weights()}, "ignored", scheme="int8", ignore=[X]),
    answered("a layer that no rule matches", lambda: {X: weights()}, "unmatched", **recipe_of(rule(targets=["y"]))),
    answered("a layer of rank 1", lambda: {X: weights((9,))}, "rank_1", scheme="int8"),
    answered("a layer of no elements", lambda: {X: weights((0, 9))}, "empty", scheme="int8"),
    answered("a ladder that no rung of reaches", lambda: {X: weights()}, "below_threshold", scheme="int4",
             fallback={"schemes": ["int8"], "sqnr_db_min": 500}),
    answered("a group that does not divide, and ignore", lambda: {X: weights((4, 96))}, "group_size_indivisible", "96",
             scheme="W4A16", ignore=["y"]),
    answered("blocks in rank 3, and on_error: continue", lambda: {X: weights((2, 3, 9))}, "rank_unsupported",
             scheme="FP8_BLOCK", on_error="continue"),

    # columns of Arrow
    columns("a null name", "name_null", "row 0", layer_name=names(None)),
    columns("null weights", "weights_null", layer=X, weights=lists(None)),
    columns("a null element", "element_null", "1", layer=X, weights=lists([1.0, None, 3.0])),
    refused("importance of another length", lambda: {X: weights((4, 256))}, "importance_invalid", "7", "256",
            scheme="Q4_K", importance={X: [1.0] * 7}),
    refused("importance that a scheme does not go by", lambda: {X: weights()}, "importance_invalid", "int8", "Q4_K",
            scheme="int8", importance={X: [1.0]}),
    told("importance of no layer", lambda user: user.quantize({X: weights((4, 256))}, scheme="Q4_K", importance={"y": [1.0]}),
         Invalid, "`y`", "no layer"),
    told("importance that is no dict", lambda user: user.quantize({X: weights()}, scheme="Q4_K", importance=[1.0]),
         TypeError, "list"),
    told("importance that is no numbers", lambda user: user.quantize({X: weights()}, scheme="Q4_K", importance={X: "a"}),
         TypeError, f"`{X}`"),
    told("importance beside a table", lambda user: user.quantize(table(*bad.batch()), scheme="Q4_K", importance={X: [1.0]}),
         Invalid, "`importance`", "column"),
    columns("a shape larger than its elements", "layer_incomplete", "3", "6", layer=X, shape=shapes([2, 3])),
    columns("a shape smaller than its elements", "layer_too_long", "[1, 2]", layer=X, shape=shapes([1, 2])),
    columns("a negative shape", "shape_invalid", "-1", layer=X, shape=shapes([-1, 3])),
    columns("a null in a shape", "shape_invalid", "null", layer=X, shape=shapes([None, 3])),
    columns("a shape that overflows", "shape_invalid", str(2**48), layer=X, shape=shapes([2**33, 2**33])),
    columns("a run cut inside a channel", "channel_cut", "13", "[4, 9]", layer=X, weights=lists([1.0] * 13),
            shape=shapes([4, 9])),
    columns("bytes that are no whole number of elements", "bytes_ragged", "7", layer=X, **binary("f32", bytes(7))),
    columns("names of integers", "column_type", "layer_name", "expected", layer_name=pa.array([1])),
    columns("weights of integers", "column_type", "weights", "expected", weights=lists([1], type=pa.list_(pa.int32()))),
    columns("weights of no type", "column_type", "weights", weights=pa.nulls(1)),
    columns("weights as structs", "column_type", "weights", weights=pa.array([{"a": 1.0}])),
    columns("weights as a list view", "column_type", "weights", weights=lists([1.0], type=pa.list_view(pa.float32()))),
    columns("run-end encoded names", "column_type", "layer_name",
            layer_name=pa.RunEndEncodedArray.from_arrays([1], ["a"])),
    columns("permuted tensors", "permuted", "weights", weights=bad.tensors([2, 3], permutation=[1, 0])),
    columns("no names", "column_missing", "layer_name", layer_name=None),
    columns("no weights", "column_missing", "weights", weights=None),
    columns("binary weights without dtype", "column_missing", "dtype", **{**binary("f32", bytes(4)), "dtype": None}),
    columns("a null dtype", "dtype_invalid", "null", layer=X, **binary(None, bytes(4))),
    columns("an unknown dtype", "dtype_invalid", "f31", "bf16", layer=X, **binary("f31", bytes(4))),
    columns("a column more", "column_unexpected", "comment", comment=names("hello")),
    columns("a column of a long name", "column_unexpected", "c" * 50, **{"c" * 100_000: names("hello")}),
    columns("names that are no UTF-8", "frame_invalid", "UTF8", layer_name=binary_of(pa.string(), [0, 3], b"\xff\xfex"),
            apart=True),
    refused("offsets of bytes that go back", lambda: pa.table({
        "layer_name": ["a", "b", "c"], "dtype": ["f32"] * 3,
        "weights": binary_of(pa.large_binary(), [0, 12, 4, 12], bytes(12))}), "frame_invalid", layer=None, apart=True),
    refused("a dictionary without the index", lambda: pa.table({
        "layer_name": pa.DictionaryArray.from_arrays(pa.array([7], pa.int32()), ["a"], safe=False),
        "weights": lists([1.0])}), "frame_invalid", layer=None, apart=True),
    refused("a table without columns", lambda: pa.table({}), "column_missing", "layer_name", layer=None),
    refused("a column twice", lambda: pa.Table.from_arrays([names("a"), names("b"), lists([1.0])],
            ["layer_name", "layer_name", "weights"]), "column_unexpected", "layer_name", "twice", layer=None),
    refused("a shape that changes", lambda: table(runs(1), runs(3, shape=(3, 9))), "shape_changed", "[3, 9]"),
    refused("a dtype that changes", lambda: table(*(bad.batch(**binary(dtype, bytes(8), shape=shapes([4, 2])))[0]
            for dtype in ("f32", "bf16"))), "dtype_changed", "bf16", "f32"),
    refused("a layer that is interrupted", lambda: table(runs(2), runs(4, name="other"), runs(2)), "layer_interrupted",
            "`other`"),
    refused("runs too long", lambda: table(runs(1), runs(4)), "layer_too_long", "45", "36"),
    refused("runs incomplete at the end", lambda: reader(runs(1).schema, iter([runs(1), runs(2)])), "layer_incomplete",
            "27", "36"),
    told("a reader of batches that differ", lambda user: user.quantize(
        reader(runs(1).schema, iter([runs(4), bad.batch()[0]]))), Invalid, "schema", apart=True),
    told("a reader whose file is cut short", lambda user: user.quantize(pa.ipc.open_stream(cut_stream())),
         (Invalid, OSError), "body"),

    # limits
    refused("a name over the limit", lambda: {"n" * 33: weights()}, "name_too_long", "33", "32", layer="n" * 33,
            flags=SMALL),
    refused("a layer over the limit", lambda: pairs(*((f"layer{number}", weights()) for number in range(4))),
            "layers_exceeded", "4", "3", layer="layer3", flags=SMALL),
    refused("a batch of rows over the limit", lambda: bad.many(5)[0], "batch_rows_exceeded", "5", "4", layer=None,
            flags=SMALL),
    refused("a row over the limit", lambda: pa.table({"layer_name": [X], "weights": HIGH}), "message_too_large",
            str(4 * MIB), layer=None, flags=SMALL),
    refused("a channel over the limit, by its shape", lambda: bad.batch(shape=shapes([4, 2 * MIB]))[0],
            "channel_too_large", str(4 * MIB), flags=SMALL),
    refused("a channel over the limit, of an array", lambda: {X: np.ones((2, 2 * MIB), np.float32)},
            "channel_too_large", str(4 * MIB), flags=SMALL),
    refused("a span over the limit", lambda: {X: np.ones((8192, 1024), np.float32)}, "span_too_large", str(16 * MIB),
            flags=SMALL, **TENSOR),
    refused("a layer over the limit whose global scale waits for its end",
            lambda: {X: np.ones((8192, 1024), np.float32)}, "span_too_large", str(16 * MIB), flags=SMALL,
            scheme="NVFP4A16"),
    Case("a third stream where two fill the server", busy, quarrel.BusyError, "busy", None, (), ROOM_FOR_TWO),

    # rows that dequantize cannot read
    altered("a checksum that does not fit", "checksum_mismatch", "0x00000007", checksum=7),
    altered("codes that were changed", "checksum_mismatch", quantized_data=bytes(27)),
    altered("too few scales", "row_inconsistent", "1 scales", "3", scales=[1.0]),
    altered("a scale that is NaN", "row_inconsistent", "NaN", scales=[1.0, NAN, 1.0]),
    altered("zero points where there are none", "row_inconsistent", "zero points", zero_points=[1, 2, 3]),
    altered("codes cut short", "row_inconsistent", "5 bytes", quantized_data=bytes(5), checksum=None),
    altered("no codes", "row_inconsistent", "quantized_data", quantized_data=None),
    altered("no scheme", "row_inconsistent", "scheme", scheme=None),
    altered("a scheme that is none", "scheme_unknown", "int9", scheme="int9"),
    altered("a status that is none", "row_inconsistent", "`nope`", status="nope"),
    altered("a shape below zero", "shape_invalid", "-3", shape=[-3, 9]),
    altered("a shape of other channels", "row_inconsistent", "27", shape=[3, 10]),
    altered("a row that failed", "row_inconsistent", "failed", array=weights(at_7=NAN),
            command={"scheme": "int8", "on_error": "continue"}),
    altered("a kept row without its weights", "kept_without_data", "return_kept",
            command={"scheme": "int8", "ignore": [X]}),
    altered("no global scale", "row_inconsistent", "weight_global_scale", array=FLOATS, command=NVFP4,
            extra_tensors=None),
    altered("a global scale of another name", "row_inconsistent", "weight_global_scale", array=FLOATS, command=NVFP4,
            extra_tensors=global_scale(name="weight")),
    altered("a global scale of two bytes", "row_inconsistent", "2 bytes", array=FLOATS, command=NVFP4,
            extra_tensors=global_scale(data=bytes(2))),
    altered("a global scale of zero", "row_inconsistent", "weight_global_scale", "0", array=FLOATS, command=NVFP4,
            extra_tensors=global_scale(data=bytes(4))),
    altered("a global scale that is NaN", "row_inconsistent", "weight_global_scale", "NaN", array=FLOATS, command=NVFP4,
            extra_tensors=global_scale(data=np.float32(NAN).tobytes())),
    altered("too few scales of MX", "row_inconsistent", "3", array=FLOATS, command={"scheme": "MXFP6A16"},
            scales=[1.0]),
    altered("a scale of MX that is infinite", "row_inconsistent", "inf", array=FLOATS, command={"scheme": "MXFP6A16"},
            scales=[1.0, INF, 1.0]),
    altered("codes of MX cut short", "row_inconsistent", "25 bytes", array=FLOATS, command={"scheme": "MXFP6A16"},
            quantized_data=bytes(25), checksum=None),
    rearranged("the first of three rows", lambda rows: rows.slice(0, 1), "layer_incomplete", "3072000"),
    rearranged("rows of one layer, twice", lambda rows: pa.concat_tables([rows, rows]), "layer_repeated"),
    rearranged("rows without their scales", lambda rows: rows.drop_columns("scales"), "column_missing", "scales",
               layer=None),
    rearranged("rows with a column more", lambda rows: rows.append_column("note", pa.nulls(3, pa.string())),
               "column_unexpected", "note", layer=None),
    decoded("weights, which have no codes", lambda user: table(*bad.batch()), Invalid, "weights", "quantized_data",
            reason="column_unexpected"),
    decoded("a dtype to decode to that is none", answers, Invalid, "`f8`", "`bf16`",
            reason="option_invalid", dtype="f8"),
    decoded("a dtype of numpy's", answers, TypeError, "dtype", dtype=np.float16),
    decoded("no dtype", answers, (TypeError, Invalid), "dtype", "None", dtype=None),
    decoded("one layer, not in a list", lambda user: answers(user)[X], TypeError, "`QuantizedLayer`", "expected"),
    decoded("a dict of layers", lambda user: dict(answers(user)), TypeError, "`str`", "expected"),
    decoded("a dict of arrays", lambda user: {X: weights()}, TypeError, "`str`", "expected"),
    decoded("an array", lambda user: weights(), TypeError, "`ndarray`", "expected"),
    decoded("a path", lambda user: "model.safetensors", TypeError, "`str`", "expected"),
    decoded("nothing to decode", lambda user: None, TypeError, "`NoneType`", "expected"),
    told("codes of a layer that failed", lambda user: user.quantize(
        {X: weights(at_7=NAN)}, scheme="int8", on_error="continue")[0].codes, Invalid, "failed", "no codes",
        "NaN", layer=X),
    told("scales of a layer that was kept", lambda user: user.quantize({X: weights((9,))})[0].scales, Invalid, "kept",
         "scales", layer=X),

    # files
    filed("an empty file", b"", "safetensors file"),
    filed("a text", b"hello, I am a letter and no tensor", "header"),
    filed("a file cut short", safetensors({X: entry(2, 2)}, bytes(15)), f"`{X}`", "cut", layer=X),
    filed("a file cut inside its header", safetensors({X: entry(2, 2)})[:30], "header"),
    filed("a header of 2^62 bytes", (1 << 62).to_bytes(8, "little") + b"{}", str(1 << 62)),
    filed("a header of garbage", safetensors(b"\xff" * 64), "header"),
    filed("a header that is a list", safetensors(b"[1]"), "header"),
    filed("a header of many brackets", safetensors(DEEP), "header"),
    filed("an entry that is a list", safetensors({X: []}), f"`{X}`", layer=X),
    filed("an entry without a dtype", safetensors({X: {"shape": [2, 2], "data_offsets": [0, 16]}}), f"`{X}`", "dtype",
          layer=X),
    filed("a dtype that is none", safetensors({X: entry(2, 2, dtype="F12")}), f"`{X}`", "F12", layer=X),
    filed("a dtype that is a number", safetensors({X: entry(2, 2, dtype=7)}), f"`{X}`", "7", layer=X),
    filed("a shape larger than the bytes", safetensors({X: entry(2, 3)}), f"`{X}`", "16", "24", layer=X),
    filed("a shape beyond all numbers", safetensors({X: entry(2**40, 2**40)}), f"`{X}`", layer=X),
    filed("a shape beyond what Python prints", safetensors({X: entry(*[2**62] * 400)}), f"`{X}`", "more than", layer=X),
    filed("a shape of truths", safetensors({X: entry(True, at=(0, 4))}, bytes(4)), f"`{X}`", "True", layer=X),
    filed("elements of four bits in half a byte", safetensors({X: entry(3, dtype="F4", at=(0, 2))}, bytes(2)), "1.5",
          layer=X),
    filed("a header in UTF-16", safetensors('{"x": {}}'.encode("utf-16")), "header"),
    filed("a shape below zero, twice", safetensors({X: entry(-2, -2)}), f"`{X}`", "-2", layer=X),
    filed("an infinite shape", safetensors(b'{"hostile": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}'),
          layer=X),
    filed("a shape of texts", safetensors({X: {"dtype": "F32", "shape": "22", "data_offsets": [0, 16]}}), f"`{X}`",
          layer=X),
    filed("a shape of integers that lies", safetensors({X: entry(2, 2, dtype="I64", at=(0, 3))}, bytes(3)), f"`{X}`",
          "3", "32", layer=X),
    filed("offsets below zero", safetensors({X: entry(2, 2, at=(-16, 0))}), f"`{X}`", "-16", layer=X),
    filed("data offsets that go back", safetensors({X: entry(2, 2, at=(16, 0))}), f"`{X}`", "16", "0", layer=X),
    filed("offsets with a fraction", safetensors({X: entry(2, 2, at=(0, 16.7))}), f"`{X}`", "16.7", layer=X),
    filed("three offsets", safetensors({X: entry(2, 2, at=(0, 8, 16))}), f"`{X}`", layer=X),
    filed("tensors that overlap", safetensors({"a": entry(2, 2), X: entry(2, 2, at=(8, 24))}, bytes(24)), f"`{X}`",
          layer=X),
    filed("bytes that belong to no tensor", safetensors({X: entry(2, 2)}, bytes(32)), "bytes"),
    filed("a tensor named twice", safetensors(b'{"hostile": %b, "hostile": %b}' % (
        json.dumps(entry(2, 2)).encode(), json.dumps(entry(2, 2, at=(16, 32))).encode()), bytes(32)), f"`{X}`", "twice",
        layer=X),
    filed("a tensor whose name is no UTF-8", safetensors(b'{"bad\\udcff": %b}' % json.dumps(entry(2, 2)).encode()),
          "UTF-8", layer=UNICODE),
    filed("NaN in a tensor", safetensors({X: entry(2, 2)}, np.array([0, 1, NAN, 3], np.float32).tobytes()), " 2 ",
          "NaN", layer=X, reason="non_finite"),
    Case("a tensor of integers in a file", integers_in_a_file, None, "not_float", X, ("`i64`",)),
    told("a file that shrinks while it is read", shrunk, Invalid, "shrunk.safetensors", "ends at byte"),
    told("a missing file", lambda user: user.quantize(user.folder / "none.safetensors"), FileNotFoundError,
         "none.safetensors"),
    told("a folder", lambda user: user.quantize(user.folder), IsADirectoryError, "Is a directory"),
    told("an empty path", lambda user: user.quantize(""), FileNotFoundError, "''"),
    told("a path with a zero", lambda user: user.quantize("a\0.safetensors"), (Invalid, OSError), ".safetensors"),
    told("a device", lambda user: user.quantize("/dev/zero"), Invalid, "/dev/zero"),
    told("a missing recipe", lambda user: user.quantize({X: weights()}, recipe=user.folder / "none.json"),
         FileNotFoundError, "none.json"),
    told("a folder as a recipe", lambda user: user.quantize({X: weights()}, recipe=user.folder), IsADirectoryError,
         "Is a directory"),
    recipe_file("an empty recipe", b"", Invalid, "JSON"),
    recipe_file("a recipe file that holds a list", b"[1]", Invalid, "list", "`rules`"),
    recipe_file("a recipe that is no UTF-8", b"\xff\xfe", Invalid, "UTF-8"),
    recipe_file("a recipe of many brackets", DEEP, Invalid, "JSON"),
    recipe_file("a recipe of another ending", b"{}", Invalid, ".json", ending="toml"),
    recipe_file("a recipe that names a field that is none", b'{"rules": [], "hue": 1}', Invalid, "hue",
                reason="field_unknown"),

    # streams and clients that are over
    told("next of closed results", closed(next), quarrel.UnavailableError, "closed"),
    told("collect of closed results", closed(lambda results: results.collect()), quarrel.UnavailableError, "closed"),
    told("runs of closed results", closed(lambda results: next(results.runs())), quarrel.UnavailableError, "closed"),
    told("collect of results that have failed", failed(lambda results: results.collect()), Invalid, " 7 ",
         reason="non_finite", layer=X),
    told("next of results that have failed", failed(next), Invalid, " 7 ", reason="non_finite", layer=X),
    told("runs of results that have failed", failed(lambda results: next(results.runs())), Invalid, " 7 ",
         reason="non_finite", layer=X),
    told("results that another thread closes", taken_by_a_closer, quarrel.UnavailableError, "closed", apart=True),
    told("quantize of a closed client", closed_client(lambda client: list(client.quantize({X: weights()}, **INT8))),
         quarrel.UnavailableError, "the client is closed"),
    told("dequantize of a closed client", closed_client(lambda client: list(client.dequantize([]))),
         quarrel.UnavailableError, "the client is closed"),
    told("schemes of a closed client", closed_client(lambda client: client.schemes()), quarrel.UnavailableError,
         "the client is closed"),
    told("an address that is a number", lambda user: quarrel.connect(7070), TypeError, "int", "address"),
    told("an address that is no UTF-8", lambda user: quarrel.connect(f"unix:{UNICODE}"), Invalid, "unix:PATH"),
    told("a binary that is a number", lambda user: quarrel.connect(binary=3), TypeError, "`binary`", "`int`"),
    told("flags that are one text", lambda user: quarrel.connect(flags="--threads 1"), TypeError, "`flags`", "`str`"),
    told("a flag with a zero", lambda user: quarrel.connect(binary=sys.executable, flags=["a\0"]), quarrel.StartError,
         "null byte"),
    told("an address beside flags", lambda user: quarrel.connect(user.client.location, flags=["--threads", "1"]),
         Invalid, "flags"),
]


# -- the table --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clients():
    """A client for each set of flags, and a server behind it; rows share them, as a program does."""
    with contextlib.ExitStack() as open_things:
        found = {}

        def of(flags) -> quarrel.Client:
            if flags not in found:
                server = Server.start(*flags)
                open_things.callback(server.end)
                found[flags] = open_things.enter_context(quarrel.connect(server.location))
            return found[flags]

        yield of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_answered_with_what_to_do_and_harms_nothing(case, clients, tmp_path):
    client = clients(case.flags)
    if case.apart:
        child = in_a_process_of_its_own("play", client.location, case.name, tmp_path)
        assert child.communicate(timeout=ENDS_SECONDS) == ("played\n", "") and child.returncode == 0
    else:
        case.play(User(client, tmp_path))


def in_a_process_of_its_own(scene: str, *arguments) -> subprocess.Popen:
    """A function of this module, in a process that may end as it likes; what it prints is read here."""
    code = "import sys; from clients import test_python_bad as these; getattr(these, sys.argv[1])(*sys.argv[2:])"
    paths = os.pathsep.join(map(str, (REPO / "tests", REPO / "client/python/src")))
    return subprocess.Popen(
        [sys.executable, "-c", code, scene, *map(str, arguments)], env={**os.environ, "PYTHONPATH": paths}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )


def play(location: str, name: str, folder: str):
    [case] = [case for case in CASES if case.name == name]
    with quarrel.connect(location) as client:
        case.play(User(client, Path(folder)))
    print("played")


# -- what has no single outcome, or needs the process or the server to stop -------------------------------------------

def test_a_dict_of_more_layers_than_rows_of_a_batch_is_sent_in_more_batches(clients, tmp_path):
    """Nobody who gives arrays can "send fewer rows in a batch": the client knows the limit and keeps to it."""
    client = clients(("--batch-rows-max", 4))
    layers = {f"layer{number}": weights() for number in range(9)}
    quantized = client.quantize(layers, scheme="int8").collect()
    assert {layer.packed.tobytes() for layer in quantized.values()} == {oracle.integers(weights(), 8).data}
    assert list(quantized) == list(layers)


def test_two_threads_that_iterate_one_results_lose_nothing_in_silence(clients):
    child = in_a_process_of_its_own("two_threads_take", clients(()).location)
    assert child.communicate(timeout=ENDS_SECONDS) == ("told or shared\n", "") and child.returncode == 0


def two_threads_take(location: str):
    """Who comes while another takes is told so in our words; the other goes on, and every layer is taken once."""
    count, found, errors = 500, SimpleQueue(), SimpleQueue()
    with quarrel.connect(location) as client:
        results = client.quantize({f"layer{number}": np.ones((64, 64), np.float32) for number in range(count)}, **INT8)
        ready = threading.Barrier(2)

        def take():
            ready.wait()
            try:
                for layer in results:
                    found.put(layer.name)
            except Exception as error:
                errors.put(error)

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        late = [errors.get() for _ in range(errors.qsize())]
        assert all(isinstance(error, quarrel.Error) and error.advice for error in late), late
        taken = sorted(found.get() for _ in range(found.qsize()))
        assert taken == sorted(f"layer{number}" for number in range(count))
        User(client, Path()).good_stream()
    print("told or shared")


def test_a_process_that_was_stopped_for_too_long_is_told_that_it_was_idle(fresh_server):
    """As of a laptop whose lid was closed: not even a heartbeat goes out."""
    server = fresh_server("--idle-seconds", 1)
    child = in_a_process_of_its_own("stop_half_way", server.location)
    assert child.stdout.readline() == "half-way\n"
    child.send_signal(signal.SIGSTOP)
    outlast_idleness(server)
    child.send_signal(signal.SIGCONT)
    assert child.communicate("go on\n", timeout=ENDS_SECONDS) == ("told\n", "") and child.returncode == 0


def stop_half_way(location: str):
    go_on = threading.Event()

    def layers():
        yield X, weights()
        go_on.wait(ENDS_SECONDS)
        yield "late", weights()

    with quarrel.connect(location) as client:
        results = client.quantize(layers(), scheme="int8")
        next(results)
        say_and_wait("half-way")
        go_on.set()
        error, rest = outcome(lambda: list(results))
        assert error is not None, rest
        judge(Case("idle", print, quarrel.IdleError, "idle", None, ("1",)), error)
        User(client, Path()).good_stream()
    print("told")


def test_a_stream_that_lasts_too_long_is_told_so(fresh_server):
    server = fresh_server("--stream-seconds", 1)

    def layers():
        for number in range(100):
            yield f"layer{number}", weights()
            time.sleep(0.1)

    with quarrel.connect(server.location) as client:
        error, rest = outcome(lambda: list(client.quantize(layers(), scheme="int8")))
        assert error is not None, rest
        judge(Case("too long", print, quarrel.IdleError, "stream_timeout", None, ("1 s", "`stream_seconds`")), error)
        User(client, Path()).good_stream()


def outlast_idleness(server):
    """Returns when the server has ended, as idle, a stream that began now and sent nothing."""
    descriptor = flight.FlightDescriptor.for_command(b'{"quantize": {"scheme": "int8"}}')
    with wire.connect(server.location) as client:
        writer, reader = client.do_exchange(descriptor)
        with pytest.raises(flight.FlightTimedOutError, match="idle"):
            reader.read_all()
        with pytest.raises(flight.FlightTimedOutError):
            writer.close()


ENDS = {"killed": (signal.SIGKILL, None), "stopped": (signal.SIGTERM, "stopping")}


@pytest.mark.parametrize("end, reason", ENDS.values(), ids=ENDS)
def test_a_server_that_ends_mid_stream_is_unavailable_and_its_successor_serves_the_same_client(end, reason):
    first = Server.start("--drain-seconds", 1)
    child = in_a_process_of_its_own("lose_the_server", first.location, reason or "")
    assert child.stdout.readline() == "mid-stream\n"
    os.kill(first.pid, end)
    assert first.wait(ENDS_SECONDS) == (0 if end == signal.SIGTERM else -end)
    successor = Server.start(listen=first.location.removeprefix("grpc://"))
    assert child.communicate("it has ended\n", timeout=ENDS_SECONDS) == ("served again\n", "")
    assert child.returncode == 0
    successor.end()


def lose_the_server(location: str, reason: str):
    client = quarrel.connect(location)
    results = client.quantize(many(), scheme="int8")  # more than is sent before anybody takes answers
    next(results)
    say_and_wait("mid-stream")
    error, _ = outcome(lambda: list(results))
    judge(Case("lost", print, quarrel.UnavailableError, reason or None), error)

    def served():
        try:
            User(client, Path()).good_stream()
        except quarrel.UnavailableError as still:
            assert still.retryable and still.advice in str(still)
            return False
        return True

    eventually(served, what="the successor serves")
    client.close()
    print("served again")


def say_and_wait(word: str):
    """In a process of its own: says where it is, and goes on when the test says so."""
    print(word, flush=True)
    sys.stdin.readline()


# -- every reason -----------------------------------------------------------------------------------------------------

IN_TESTS_OF_THEIR_OWN = {
    "idle",  # above
    "stopping",  # above
    "stream_timeout",  # above
    "streams_exceeded",  # test_python_errors.py, test_python_stream.py
}
CANNOT_REACH_PYTHON = {
    "command_missing",  # the client always sends a command
    "header_timeout",  # at once
    "schema_missing",  # and a schema before every batch
    "verb_unsupported",  # it has no method for a verb that is not served
    "client_not_reading",  # a thread of it reads, whatever the caller does
    "needs_calibration",  # of checkpoints, which the command line writes
    "not_a_weight",  # the same
    "already_quantized",  # the same
    # of jobs, DoGet and DoPut, for which it has no method
    "end_missing", "end_invalid", "fused_scales_differ",
    "uri_invalid", "uri_not_allowed", "source_missing", "source_malformed", "sink_exists", "sink_taken", "storage_failed",
    "storage_denied",
    "quality_missed", "job_unknown", "jobs_exceeded",
    "internal",  # a fault of the server, of which none is known
}


def test_every_reason_reaches_a_row_or_cannot_reach_python():
    rows = {case.reason for case in CASES if case.reason}
    assert rows.isdisjoint(CANNOT_REACH_PYTHON) and IN_TESTS_OF_THEIR_OWN.isdisjoint(CANNOT_REACH_PYTHON)
    assert set(REASONS) - rows - IN_TESTS_OF_THEIR_OWN == CANNOT_REACH_PYTHON


def test_what_cannot_be_written_is_told_and_not_the_cancelling_that_follows(clients):
    """A source that breaks its own schema: pyarrow refuses the second batch, and we cancel the stream for it."""
    client = clients(())
    [first], [second] = bad.batch(), bad.batch(weights=pa.array([1]))
    source = quarrel.runs.Source(first.schema, iter([first, second]))
    results = Results(Answers(client._begin({"quantize": INT8}), source, None), client)
    with pytest.raises(Invalid, match="schema"):
        results.collect()


def test_names_of_rows_are_different():
    assert len({case.name for case in CASES}) == len(CASES)
