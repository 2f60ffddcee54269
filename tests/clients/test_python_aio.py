"""The async twin gives the same layers, and a cancelled task leaves nothing behind."""

import asyncio
import threading

import numpy as np
import pytest

import quarrel
from harness import oracle
from harness.server import binary

LAYER = np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
MODEL = {f"layer{number}": LAYER for number in range(20)}


def left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("quarrel")]


@pytest.fixture
def run(server):
    """Runs `main(client)`; after it, no thread of ours lives."""

    def running(main):
        async def connected():
            async with quarrel.aio.connect(server.location) as client:
                return await main(client)

        found = asyncio.run(asyncio.wait_for(connected(), 120))
        assert left() == []
        return found

    return running


async def slowly(model):
    for pair in model.items():
        await asyncio.sleep(0)
        yield pair


async def endless(log=None):
    try:
        number = 0
        while True:
            yield f"layer{number}", LAYER
            number += 1
    finally:
        if log is not None:
            log.append("closed")


def test_results_that_failed_say_why_to_whoever_asks_again(run):
    async def main(client):
        results = client.quantize({"hostile": np.full((2, 2), np.nan, np.float32)}, scheme="int8")
        for _ in range(2):
            with pytest.raises(quarrel.InvalidInputError, match="NaN"):
                await results.collect()

    run(main)


@pytest.mark.parametrize("source", [lambda model: model, lambda model: iter(model.items()), slowly])
def test_layers_come_as_from_the_blocking_client(run, source):
    async def main(client):
        results = client.quantize(source(MODEL), scheme="int8")
        layers = [layer async for layer in results]
        return layers, results.summary, results.command

    layers, summary, command = run(main)
    assert [layer.name for layer in layers] == list(MODEL)
    assert layers[0].packed.tobytes() == oracle.integers(LAYER, 8).data
    assert summary.layers_quantized == len(MODEL) and command["quantize"]["scheme"] == "int8"


@pytest.mark.parametrize("how", [
    {"scheme": "NVFP4A16", "amax": np.float32(50)},
    {"recipe": {"rules": [{"targets": ["*"], "scheme": "NVFP4A16", "amax": 50.0}]}},
])
def test_layers_that_share_a_global_scale_come_as_from_the_blocking_client(run, how):
    array = LAYER[:16]

    async def main(client):
        quantized = await client.quantize(slowly({"q": array, "k": array / 4}), **how).collect()
        return quantized, await client.dequantize(quantized).collect()

    quantized, arrays = run(main)
    for name, given in (("q", array), ("k", array / 4)):
        expected = oracle.nvfp4(given, 50)
        assert quantized[name].packed.tobytes() == expected.data
        assert quantized[name].global_scale.tobytes() == expected.global_scale.tobytes()
        assert arrays[name].tobytes() == expected.values.tobytes()


def test_everything_of_the_blocking_client_is_there(run):
    async def main(client):
        quantized = await client.quantize(MODEL, scheme="int8", progress=lambda _: None).collect()
        runs = [each.name async for each in client.quantize(MODEL, scheme="int8").runs()]
        arrays = await client.dequantize(quantized, dtype="f16").collect()
        one = {name: array async for name, array in client.dequantize([quantized["layer0"]])}
        return quantized, runs, arrays, one, await client.schemes(), client.info()

    quantized, runs, arrays, one, schemes, info = run(main)
    assert list(quantized) == runs == list(arrays) == list(MODEL)
    assert np.array_equal(one["layer0"], oracle.integers(LAYER, 8).values)
    assert schemes and info.verbs
    methods = {name for name in dir(quarrel.Client) if not name.startswith("_")}
    assert methods | {"location"} == {name for name in dir(quarrel.aio.AsyncClient) if not name.startswith("_")}


def test_many_streams_share_a_loop(run):
    """More at once than asyncio has threads for blocking calls."""

    async def main(client):
        async def one():
            return [layer.name async for layer in client.quantize(slowly(MODEL), scheme="W4A16")]

        return await asyncio.gather(*(one() for _ in range(16)))

    assert run(main) == [list(MODEL)] * 16


def test_errors_are_the_same(run):
    class Mine(Exception):
        pass

    async def failing():
        yield "a", LAYER
        raise Mine

    async def main(client):
        with pytest.raises(quarrel.InvalidInputError) as caught:
            await client.quantize(MODEL, scheme="int99").collect()
        assert caught.value.reason == "scheme_unknown"
        with pytest.raises(Mine):
            await client.quantize(failing(), scheme="int8").collect()
        with pytest.raises(TypeError):
            client.quantize(17, scheme="int8")

    run(main)


@pytest.mark.parametrize("many", [lambda log: endless(log), lambda log: ((f"l{n}", LAYER) for n in range(10**6))])
def test_a_cancelled_task_cancels_its_stream(run, many):
    async def main(client):
        log, begun = [], asyncio.Event()

        async def consume():
            async for _ in client.quantize(many(log), scheme="int8"):
                begun.set()

        task = asyncio.create_task(consume())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [name for name in left() if name.startswith("quarrel-")] == []
        return log

    assert run(main) in ([], ["closed"])


def test_a_task_that_waits_for_its_own_slow_source_can_be_cancelled(run):
    async def main(client):
        log, waiting = [], asyncio.Event()

        async def source():
            try:
                yield "a", LAYER
                waiting.set()
                await asyncio.Event().wait()
            finally:
                log.append("closed")

        task = asyncio.create_task(client.quantize(source(), scheme="int8").collect())
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return list(log)  # now, not when the loop ends

    assert run(main) == ["closed"]


def test_leaving_the_block_half_way_closes_the_source(run):
    async def main(client):
        log = []
        async with client.quantize(endless(log), scheme="int8") as results:
            async for _ in results:
                break
        return list(log)

    assert run(main) == ["closed"]


def test_a_server_of_its_own_ends_with_the_block():
    async def main():
        async with quarrel.aio.connect(binary=binary()) as client:
            await client.quantize(MODEL, scheme="int8").collect()
        awaited = await quarrel.aio.connect(binary=binary())
        location = awaited.location
        await awaited.close()
        with pytest.raises(quarrel.UnavailableError):
            await quarrel.aio.connect(location)

    asyncio.run(asyncio.wait_for(main(), 120))
