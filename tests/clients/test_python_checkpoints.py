"""The Python client with checkpoints that the server reads and writes: `submit`, `pull`, `put`."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

import quarrel
from golden.model_free import digests
from harness import cli
from harness.model import files, tensors, write_model
from harness.server import eventually


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path / "read/model")
    (tmp_path / "write").mkdir()
    return tmp_path


@pytest.fixture
def client(fresh_server, folder):
    server = fresh_server("--allow-read", folder / "read", "--allow-write", folder / "write", "--shard-bytes-max", 300_000)
    with quarrel.connect(server.location) as client:
        yield client


OPTIONS = {
    "a scheme": ({"scheme": "W4A16"}, ["-s", "W4A16"]),
    "an option": ({"scheme": "W4A16", "group_size": 64}, ["-s", "W4A16", "--group-size", 64]),
    "ignored": ({"scheme": "MXFP4A16", "ignore": ["@standard", "re:.*down_proj"]}, ["-s", "MXFP4A16", "--ignore", "re:.*down_proj"]),
    "a profile": ({"profile": "local"}, ["--profile", "local"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_job_a_put_and_the_command_line_make_the_same(case, client, folder):
    options, flags = OPTIONS[case]
    cli.quantize(folder / "read/model", folder / "expected", *flags)
    job = client.submit(folder / "read/model", folder / "write/job", **options)
    summary = job.wait()
    assert files(folder / "write/job") == files(folder / "expected")
    config = json.loads((folder / "read/model/config.json").read_bytes())
    sent = client.put(tensors(), folder / "write/put", config=config, **options)
    assert digests(folder / "write/put") == digests(folder / "expected")
    assert json.loads((folder / "write/put/config.json").read_bytes()) == json.loads((folder / "expected/config.json").read_bytes())
    assert (sent.layers_quantized, sent.worst_layer) == (summary.layers_quantized, summary.worst_layer)
    assert sent.layers_quantized > 0


def test_what_a_job_knows(client, folder):
    source = (folder / "read/model").as_uri()
    job = client.submit(source, folder / "write/out", scheme="W8A8")
    shown = []
    summary = job.wait(60, progress=shown.append)
    assert (job.state, job.summary, job.error) == ("done", summary, None)
    assert (job.source, job.sink) == (source, (folder / "write/out").as_uri())
    assert job.bytes_done == job.bytes_total == shown[-1].bytes_in == shown[-1].bytes_total > 0
    assert shown[-1].layers == summary.layers_quantized + summary.layers_kept
    assert "recipe" in job.command["quantize"] and job.seconds > 0 and job.name in repr(job)
    assert [found.name for found in client.jobs()] == [job.name] and client.job(job.name).state == "done"
    with pytest.raises(quarrel.InvalidInputError) as caught:  # the folder that it writes may not be read
        client.submit(folder / "write/out", folder / "write/dense", dequantize="bf16")
    assert caught.value.reason == "uri_not_allowed"


def test_a_job_that_dequantizes(client, folder):
    cli.quantize(folder / "read/model", folder / "read/coded", "-s", "W4A16")
    client.submit(folder / "read/coded", folder / "write/dense", dequantize="f32").wait()
    cli.done("dequantize", folder / "read/coded", folder / "expected", "--dtype", "f32")
    assert digests(folder / "write/dense") == digests(folder / "expected")
    with pytest.raises(quarrel.InvalidInputError, match="beside `dequantize`"):
        client.submit(folder / "read/coded", folder / "write/x", dequantize="f32", scheme="int8")


def test_errors_of_jobs_have_the_servers_word(client, folder):
    with pytest.raises(quarrel.InvalidInputError) as caught:
        client.submit("file:///etc", folder / "write/out", scheme="int8")
    assert caught.value.reason == "uri_not_allowed"
    with pytest.raises(quarrel.InvalidInputError) as caught:
        client.job("none")
    assert caught.value.reason == "job_unknown"
    worse = client.submit(folder / "read/model", folder / "write/worse", scheme="int2/g64", sqnr_db_min=60)
    with pytest.raises(quarrel.Error) as caught:
        worse.wait()
    assert caught.value.reason == "quality_missed" == worse.error.reason and worse.state == "failed"
    client.submit(folder / "read/model", folder / "write/out", scheme="W8A8").wait()
    again = client.submit(folder / "read/model", folder / "write/out", scheme="W4A16", replace=True)
    assert again.wait().bits_per_weight < 5


def test_a_job_is_cancelled_and_waited_for_in_vain(fresh_server, folder):
    layer = np.ones((4096, 2048), np.float32)
    cli.write(folder / "read/large.safetensors", {f"{at}.weight": layer for at in range(4)})
    flags = "--allow-read", folder / "read", "--allow-write", folder / "write", "--cpu-level", "scalar", "--threads", 1
    with quarrel.connect(fresh_server(*flags).location) as client:
        job = client.submit(folder / "read/large.safetensors", folder / "write/out.safetensors", scheme="int4/g32;solver=mse")
        with pytest.raises(TimeoutError, match="goes on"):
            job.wait(0.01)
        assert job.cancel().state in ("running", "cancelled")
        with pytest.raises(quarrel.UnavailableError, match="cancelled"):
            job.wait()
    assert not list((folder / "write").iterdir())


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16"])
def test_pulled_layers_are_those_of_quantize(scheme, client, folder):
    results = client.pull(folder / "read/model", scheme=scheme)
    pulled = results.collect()
    expected = client.quantize(tensors(), recipe=results.command["quantize"]["recipe"], return_kept=True).collect()
    assert pulled.keys() == expected.keys() == tensors().keys()
    for name, layer in expected.items():
        found = pulled[name]
        assert (found.status, found.scheme, found.metrics) == (layer.status, layer.scheme, layer.metrics)
        assert found.dequantize().tobytes() == layer.dequantize().tobytes()
    assert pulled.summary.layers_quantized == 14


def test_pulling_is_left_half_way_and_says_what_is_wrong(client, folder):
    with client.pull(folder / "read/model", scheme="int8") as results:
        next(results)
    with pytest.raises(quarrel.UnavailableError):
        next(results)
    with pytest.raises(quarrel.InvalidInputError) as caught:
        client.pull("file:///etc", scheme="int8").collect()
    assert caught.value.reason == "uri_not_allowed"
    with pytest.raises(quarrel.Error) as caught:
        client.pull(folder / "read/nothing", scheme="int8").collect()
    assert caught.value.reason == "source_missing"
    assert client.pull(folder / "read/model", scheme="int8").collect()


def test_layers_are_put_as_they_are_made(client, folder):
    made = []

    def layers():
        for name, array in tensors().items():
            made.append(name)
            yield name, array.astype(np.float32)

    shown = []
    summary = client.put(layers(), folder / "write/out", scheme="W8A8", progress=shown.append)
    assert made == list(tensors()) and summary.layers_quantized == 14
    assert shown[-1].layers == len(made) and shown[-1].bytes_in == sum(array.nbytes for array in tensors().values()) * 2
    assert len(list((folder / "write/out").glob("*.safetensors"))) > 1


FAULTS = {
    "an iterable that raises": (lambda: _raises(), ZeroDivisionError, None),
    "numbers that are none": (lambda: {"a.weight": np.full((4, 128), np.nan, np.float32)}, quarrel.InvalidInputError, "non_finite"),
    "a name twice": (lambda: [("a.weight", np.ones((4, 128), np.float32))] * 2, quarrel.InvalidInputError, "layer_repeated"),
    "integers": (lambda: {"a.weight": np.ones((4, 128), np.int32)}, quarrel.InvalidInputError, None),
    "nothing": (dict, quarrel.InvalidInputError, "end_invalid"),
}


def _raises():
    yield "a.weight", np.ones((4, 128), np.float32)
    raise ZeroDivisionError


@pytest.mark.parametrize("case", FAULTS)
def test_what_goes_wrong_leaves_nothing(case, client, folder):
    layers, kind, reason = FAULTS[case]
    with pytest.raises(kind) as caught:
        client.put(layers(), folder / "write/out", scheme="int8")
    assert reason is None or caught.value.reason == reason
    _gone(folder)


def _gone(folder):
    """The server takes back what there is when it hears of it."""
    eventually(lambda: not list((folder / "write").iterdir()), seconds=30, what="a folder without what was begun")


def test_tensors_that_cannot_travel_are_told(client, folder):
    path = cli.write(folder / "x.safetensors", {"a.weight": np.ones((4, 128), np.float32), "n": np.ones(3, np.int64)})
    with pytest.raises(quarrel.InvalidInputError, match="`n` has dtype") as caught:
        client.put(path, folder / "write/out", scheme="int8")
    assert caught.value.layer == "n" and "submit" in caught.value.advice
    _gone(folder)


def test_a_sink_that_is_taken_or_not_allowed(client, folder):
    layers = {"a.weight": np.ones((4, 128), np.float32)}
    client.put(layers, folder / "write/out", scheme="int8")
    for sink, reason in [(folder / "write/out", "sink_exists"), (folder / "elsewhere", "uri_not_allowed")]:
        with pytest.raises(quarrel.InvalidInputError) as caught:
            client.put(layers, sink, scheme="int8")
        assert caught.value.reason == reason
    assert not (folder / "elsewhere").exists()


def test_a_pause_is_no_absence(fresh_server, folder):
    server = fresh_server("--allow-write", folder / "write", "--idle-seconds", 1)

    def layers():
        yield "a.weight", np.ones((4, 128), np.float32)
        time.sleep(2.5)  # more than twice the time in which an idle stream ends
        yield "b.weight", np.ones((4, 128), np.float32)

    with quarrel.connect(server.location) as client:
        assert client.put(layers(), folder / "write/out", scheme="int8").layers_quantized == 2


def test_asyncio(fresh_server, folder):
    server = fresh_server("--allow-read", folder / "read", "--allow-write", folder / "write")
    cli.quantize(folder / "read/model", folder / "expected", "-s", "W4A16")

    async def layers():
        for name, array in tensors().items():
            await asyncio.sleep(0)
            yield name, array

    async def main():
        async with quarrel.aio.connect(server.location) as client:
            job = await client.submit(folder / "read/model", folder / "write/job", scheme="W4A16")
            put = client.put(layers(), folder / "write/put", scheme="W4A16")
            made, sent = await asyncio.gather(job.wait(), put)
            assert made.layers_quantized == sent.layers_quantized == 14
            assert [found.job.name for found in await client.jobs()] == [job.job.name]
            assert (await client.job(job.job.name)).job.state == "done"
            assert len([layer async for layer in client.pull(folder / "read/model", scheme="int8")]) == len(tensors())

    asyncio.run(main())
    assert digests(folder / "write/job") == digests(folder / "write/put") == digests(folder / "expected")


@pytest.mark.parametrize("kind", ["async", "plain"])
def test_a_task_that_is_cancelled_seals_nothing(kind, client, folder):
    began, go_on = threading.Event(), threading.Event()
    layer = np.ones((4, 128), np.float32)

    def plain():
        yield "a.weight", layer
        began.set()
        go_on.wait(30)
        yield "b.weight", layer

    async def later():
        yield "a.weight", layer
        began.set()
        await asyncio.sleep(30)

    async def main():
        async with quarrel.aio.connect(client.location) as own:
            task = asyncio.create_task(own.put(later() if kind == "async" else plain(), folder / "write/out", scheme="int8"))
            await asyncio.to_thread(began.wait, 30)
            task.cancel()
            asyncio.get_running_loop().call_later(0.1, go_on.set)
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert began.is_set()
    _gone(folder)
