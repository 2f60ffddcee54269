"""Runs that are stopped, killed, or lose their server: what they leave behind, and what others see of it.

The file is large enough that there is time to look: its results are a tenth of it, and what is copied a half.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from harness import cli
from harness.server import Server, eventually
from hostile import scenes

MIB = 1 << 20
LAYERS, LAYER = 4, (4096, 4096)  # 64 MiB of f32 each: 256 MiB, and 34 as W4A16
KEPT = (256, MIB // 4)  # 256 MiB, copied at the end
SCALAR = ("--cpu-level", "scalar", "--threads", 1)
STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    block = np.random.default_rng(11).standard_normal(LAYER).astype(np.float32)
    tensors = {f"model.layers.{index}.up_proj.weight": block for index in range(LAYERS)}
    source = tmp_path_factory.mktemp("large") / "model.safetensors"
    yield cli.write(source, tensors | {"model.table": np.ones(KEPT, np.float32)})
    source.unlink()


@pytest.fixture(scope="module")
def made(large, tmp_path_factory):
    """What an undisturbed run makes of it."""
    destination = tmp_path_factory.mktemp("made") / "model.safetensors"
    cli.quantize(large, destination, "-s", "W4A16")
    yield destination
    destination.unlink()


@pytest.fixture
def folder(tmp_path):
    """Where the destination is to be; emptied at once, since these files are large."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


def same(one: Path, other: Path) -> bool:
    return np.array_equal(np.memmap(one, np.uint8, "r"), np.memmap(other, np.uint8, "r"))


def quantizing(source: Path, folder: Path, *flags) -> cli.Running:
    return cli.Running("quantize", source, folder / "out.safetensors", "-s", "W4A16", *flags)


def partial_bytes(folder: Path) -> int:
    """Bytes of the file that is being written, under another name."""
    return max([path.stat().st_size for path in folder.glob(".*.partial")], default=0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# When a run is stopped: what is to be true of it and of its folder.
MOMENTS = {
    "once it minds signals": lambda running, folder: all(running.catches(number) for number, _ in STOPS),
    "with the first results": lambda running, folder: running.spooled_bytes() > 0,
    "half-way": lambda running, folder: running.spooled_bytes() > 17 * MIB,
    "when it begins the file": lambda running, folder: partial_bytes(folder) > 0,
    "half-way through the file": lambda running, folder: partial_bytes(folder) > 128 * MIB,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number, code", STOPS, ids=["SIGINT", "SIGTERM"])
def test_a_stopped_run_leaves_nothing_behind(number, code, moment, large, folder):
    with quantizing(large, folder) as running:
        running.when(lambda: MOMENTS[moment](running, folder), moment)
        assert running.children() == []
        running.send(number)
        ended = running.end()

    assert (ended.code, names(folder)) == (code, [])
    assert "stopped" in ended.err and not cli.FAULT.search(ended.err)


@pytest.mark.parametrize("number, code", STOPS, ids=["SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_as_it_starts_leaves_nothing_behind(number, code, large, folder):
    with quantizing(large, folder) as running:
        running.send(number)
        # Before it minds signals the kernel ends it, which shells report by the same number.
        assert running.end().code in (code, -number)

    assert names(folder) == []


@pytest.mark.parametrize("number, code", STOPS, ids=["SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_as_its_file_gets_its_name_tells_the_truth(number, code, large, made, folder):
    """The file is whole and not yet on the disk: it is either given up and said to be, or finished and said to be."""
    with quantizing(large, folder) as running:
        running.reaches(lambda: partial_bytes(folder) == made.stat().st_size)
        running.send(number)
        ended = running.end()

    whole = ["out.report.json", "out.safetensors"]
    assert (ended.code, names(folder)) in [(code, []), (0, whole)]


def test_a_stopped_run_keeps_the_file_that_it_was_to_replace(large, folder):
    (folder / "out.safetensors").write_text("mine")
    with quantizing(large, folder, "--force") as running:
        running.when(lambda: partial_bytes(folder) > 0, "it begins the file")
        running.send(signal.SIGINT)
        assert running.end().code == 130

    assert names(folder) == ["out.safetensors"] and (folder / "out.safetensors").read_text() == "mine"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_leaves_nothing_that_looks_complete(moment, large, folder):
    with quantizing(large, folder) as running:
        running.when(lambda: MOMENTS[moment](running, folder), moment)
        running.send(signal.SIGKILL)
        running.end()

    assert complete(folder) == []


def complete(folder: Path) -> list[str]:
    """All but the hidden files of runs that were killed outright."""
    return [name for name in names(folder) if not (name.startswith(".") and name.endswith(".partial"))]


@pytest.mark.parametrize("number, code", STOPS, ids=["SIGINT", "SIGTERM"])
def test_a_stopped_dequantization_leaves_nothing_behind(number, code, made, folder):
    for moment in ("with the first results", "half-way", "when it begins the file"):
        with cli.Running("dequantize", made, folder / "out.safetensors") as running:
            running.when(lambda: MOMENTS[moment](running, folder), moment)
            running.send(number)
            assert (running.end().code, names(folder)) == (code, []), moment


# -- with a server elsewhere ------------------------------------------------------------------------------------------

def lines_of_streams(server: Server) -> list[str]:
    return [line for line in server.logs().splitlines() if " stream{" in line]


@pytest.mark.parametrize("moment", ["with the first results", "half-way"])
@pytest.mark.parametrize("number, code", STOPS, ids=["SIGINT", "SIGTERM"])
def test_the_server_of_a_stopped_run_logs_one_line_and_goes_on(number, code, moment, large, folder, fresh_server):
    server = fresh_server()
    with quantizing(large, folder, "--server", server.location) as running:
        running.when(lambda: MOMENTS[moment](running, folder), moment)
        running.send(number)
        ended = running.end()

    assert (ended.code, names(folder)) == (code, [])
    eventually(lambda: lines_of_streams(server), what="a line about the broken stream")
    scenes.good_stream(server.location)
    # The line of the good stream comes last: whatever there is to be said of the other has been said.
    eventually(lambda: any(": done" in line for line in lines_of_streams(server)), what="a line about the good stream")
    lines = lines_of_streams(server)
    assert len(lines) == 2 and "the client has left" in lines[0], lines


def test_the_server_of_a_killed_run_logs_a_line_for_each_stream_and_goes_on(large, folder, fresh_server):
    server = fresh_server()
    with quantizing(large, folder, "--server", server.location, "--streams", 3) as running:
        running.when(lambda: running.spooled_bytes() > 17 * MIB, "half-way")
        running.send(signal.SIGKILL)
        running.end()

    eventually(lambda: len(lines_of_streams(server)) == 3, what="a line about each broken stream")
    assert all("the client has left" in line for line in lines_of_streams(server))
    scenes.good_stream(server.location)
    assert complete(folder) == []


@pytest.mark.parametrize("streams", [1, 3])
def test_a_run_whose_server_is_killed_ends_and_leaves_nothing(streams, large, folder):
    server = Server.start(*SCALAR)
    with quantizing(large, folder, "--server", server.location, "--streams", streams) as running:
        running.when(lambda: running.spooled_bytes() > 0, "the first results")
        os.kill(server.pid, signal.SIGKILL)
        server.wait(30)
        cli.check_refusal(running.end(), 4, "connection")

    assert names(folder) == []


@pytest.mark.parametrize("streams", [1, 3])
def test_a_run_goes_on_when_its_server_is_back(streams, large, made, folder, tmp_path_factory):
    listen = f"unix:{tmp_path_factory.mktemp('s')}/s"
    server = Server.start(*SCALAR, listen=listen)
    with quantizing(large, folder, "--server", server.location, "--streams", streams) as running:
        running.when(lambda: running.spooled_bytes() > 0, "the first results")
        os.kill(server.pid, signal.SIGKILL)
        server.wait(30)
        server = Server.start(listen=listen)
        ended = running.end()
    server.end()

    assert ended.code == 0, ended.err
    assert same(folder / "out.safetensors", made)
    report = json.loads((folder / "out.report.json").read_text())
    assert report["totals"]["quantized"] == LAYERS


# -- files that change meanwhile --------------------------------------------------------------------------------------

def test_a_file_that_appears_meanwhile_is_not_replaced(large, folder):
    """Without `--force`: two runs of one command, or a download."""
    with quantizing(large, folder) as running:
        running.when(lambda: running.spooled_bytes() > 0, "the first results")
        (folder / "out.safetensors").write_text("mine")
        ended = running.end()

    assert (folder / "out.safetensors").read_bytes() == b"mine"
    cli.check_refusal(ended, 2, "out.safetensors`", "exists")
    assert names(folder) == ["out.safetensors"]


def test_a_file_that_is_cut_short_meanwhile_is_no_checkpoint(folder, tmp_path_factory):
    block = np.ones(LAYER, np.float32)
    source = tmp_path_factory.mktemp("cut") / "in.safetensors"
    cli.write(source, {f"l.{index}.weight": block for index in range(LAYERS)})
    with quantizing(source, folder, *SCALAR) as running:
        running.when(lambda: running.spooled_bytes() > 0, "the first results")
        os.truncate(source, source.stat().st_size // 2)
        ended = running.end()
    source.unlink()

    cli.check_refusal(ended, 5, "`l.")
    assert names(folder) == []


# -- memory -----------------------------------------------------------------------------------------------------------

def peak(running: cli.Running) -> int:
    found = 0
    while not running.is_over():
        found = max(found, running.peak_rss_bytes())
    assert running.end().code == 0
    return found


@pytest.mark.parametrize("scheme", ["W4A16", "int8"])
def test_memory_does_not_grow_with_the_file(scheme, large, folder):
    """Runs are 4 MiB, and a few are under way: 110 to 150 MB were seen, for files of 0.5 and 2 GB. This is of 0.5."""
    with cli.Running("quantize", large, folder / "out", "-s", scheme) as running:
        assert peak(running) < 200 * MIB


def test_memory_of_dequantization_follows_the_budget_and_not_the_file(made, folder):
    """Half of the budget may wait to be written, and 110 MB were seen beside it; the layers alone are 256 MiB."""
    environment = cli.environment(QUARREL_MEMORY_BYTES_MAX=str(128 * MIB))
    with cli.Running("dequantize", made, folder / "out", env=environment) as running:
        assert peak(running) < 256 * MIB


@pytest.mark.parametrize("verb", ["quantize", "dequantize"])
def test_memory_does_not_grow_with_the_square_of_the_number_of_tensors(verb, folder):
    """A mixture of experts has tens of thousands. 2,500 of 1 kB each are nothing beside 64 MiB of code and threads."""
    layer = np.random.default_rng(3).standard_normal((2, 128)).astype(np.float32)
    layers = {f"model.layers.0.mlp.experts.{index}.up_proj.weight": layer for index in range(2500)}
    source = cli.write(folder / "in", layers)
    flags = ["-s", "W4A16"]
    if verb == "dequantize":
        cli.quantize(source, folder / "packed", *flags)
        source, flags = folder / "packed", []
    with cli.Running(verb, source, folder / "out", *flags) as running:
        assert peak(running) < 256 * MIB


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "in the background"])
def test_a_signal_that_was_ignored_when_it_began_stays_so(number, large, folder):
    args = ("quantize", large, folder / "out.safetensors", "-s", "W8A8")
    with cli.Running(*args, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN)) as running:
        running.when(lambda: running.spooled_bytes() > 0, "with the first results")
        running.send(number)
        assert running.end().code == 0
