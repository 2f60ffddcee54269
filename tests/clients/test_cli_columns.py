"""Files of layers in columns, Arrow IPC and Parquet: what a stream would be sent is read, and what it would answer is written."""

import json
import signal
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from golden.model_free import digests
from harness import cli, wire
from harness.model import INDEX, tensors, write_model


def batches(layers: dict[str, np.ndarray], **options) -> list[pa.RecordBatch]:
    return [wire.layer_batch(name, array, **options) for name, array in layers.items()]


def write(path, sent: list[pa.RecordBatch], **options):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_batches(sent), path, **options)
        return path
    make = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
    with make(path, sent[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in sent:
            writer.write_batch(batch)
    return path


def read(path) -> pa.Table:
    if path.suffix == ".parquet":
        return pq.read_table(path)
    return pa.ipc.open_file(path).read_all()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "model", shards=1)


@pytest.mark.parametrize("ending", ["arrow", "arrows", "ipc", "parquet"])
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_BLOCK", "int8/tensor"])
def test_layers_of_a_file_become_the_model_that_their_folder_becomes(scheme, ending, model, tmp_path):
    source = write(tmp_path / f"layers.{ending}", batches(tensors(), channels_per_row=100))
    cli.quantize(source, tmp_path / "out", "-s", scheme)
    cli.quantize(model, tmp_path / "expected", "-s", scheme)
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model-00001.safetensors", INDEX, "quarrel.report.json"}
    assert json.loads((tmp_path / "out/config.json").read_bytes()).keys() == {"quantization_config"}
    told = json.loads((tmp_path / "out/quarrel.report.json").read_bytes())
    expected = json.loads((tmp_path / "expected/quarrel.report.json").read_bytes())
    assert told["source"] == str(source) and told["totals"]["quantized"] == 14
    assert {layer["name"]: layer["metrics"] for layer in told["layers"]} == {
        layer["name"]: layer["metrics"] for layer in expected["layers"]}


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "NVFP4A16", "Q8_0", "Q4_K"])
def test_a_model_becomes_a_file_of_what_a_stream_answers(scheme, ending, model, tmp_path, server):
    out = tmp_path / f"out.{ending}"
    cli.quantize(model, out, "-s", scheme)
    table = read(out)
    command = json.loads(table.schema.metadata[b"quarrel.command"])
    answered = wire.exchange(server.location, command, batches(tensors()))
    assert table.schema.metadata.keys() == {b"quarrel.command", b"quarrel.version", b"quarrel.level"}
    assert table.schema.remove_metadata().equals(answered.table.schema.remove_metadata())
    found = {row["layer_name"]: row for row in table.to_pylist()}
    for row in answered.table.to_pylist():
        assert found[row["layer_name"]] == row
    told = json.loads((tmp_path / f"out.{ending}.report.json").read_bytes())
    assert {layer["name"] for layer in told["layers"]} == tensors().keys() == found.keys()


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_from_columns_to_columns_and_back_to_weights(ending, tmp_path, server):
    layers = {"a.weight": np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32), "b": np.ones(3, np.float32)}
    source = write(tmp_path / f"in.{ending}", batches(layers, channels_per_row=8))
    cli.quantize(source, tmp_path / f"out.{ending}", "-s", "int8", "--report", tmp_path / "report.json")
    table = read(tmp_path / f"out.{ending}")
    assert table.num_rows == 9 and set(table["status"].to_pylist()) == {"quantized", "kept"}
    dense = wire.exchange(server.location, {"dequantize": {}}, table.to_batches())
    weights = np.concatenate([np.array(row["weights"], np.float32) for row in dense.rows if row["layer_name"] == "a.weight"])
    assert np.abs(weights.reshape(64, 256) - layers["a.weight"]).max() < 0.02
    assert json.loads((tmp_path / "report.json").read_bytes())["totals"]["quantized"] == 1


def test_a_gate_that_is_missed_leaves_nothing(tmp_path):
    source = write(tmp_path / "in.arrow", batches(tensors()))
    for sink in ["out", "out.arrow", "out.parquet"]:
        ended = cli.run("quantize", source, tmp_path / sink, "-s", "int2/g64", "--sqnr-db-min", 60)
        assert ended.code == 7 and "SQNR" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.arrow"]


def test_what_is_there_is_left_alone_unless_it_is_to_be_replaced(tmp_path):
    source = write(tmp_path / "in.arrow", batches({"a.weight": np.ones((4, 128), np.float32)}))
    for sink in ["out", "out.arrow"]:
        cli.quantize(source, tmp_path / sink, "-s", "int8")
        assert cli.run("quantize", source, tmp_path / sink, "-s", "int4").code == 2
        cli.quantize(source, tmp_path / sink, "-s", "int4/g128", "--force")
    assert read(tmp_path / "out.arrow")["bit_width"].to_pylist() == [4]
    assert "a.weight_packed" in cli.read(tmp_path / "out/model-00001.safetensors").tensors


LAYER = {"a.weight": np.ones((4, 128), np.float32)}


def good(tmp_path) -> bytes:
    return write(tmp_path / "good.arrow", batches(LAYER)).read_bytes()


def claims(data: bytes, at: int, format: str, number: int) -> bytes:
    return data[:at] + struct.pack(format, number) + data[at + struct.calcsize(format):]


# what the file is, of a good one; what is said
BAD = {
    "empty": (lambda data: b"", "does not begin with a schema"),
    "cut in its prefix": (lambda data: data[:12], "cut short"),
    "cut in a header": (lambda data: data[:40], "claims"),
    "cut in a body": (lambda data: data[: len(data) * 2 // 3], "claims"),
    "no Arrow": (lambda data: b"hello, this is no Arrow at all", "no message"),
    "a header of 2 GiB": (lambda data: claims(data, 12, "<I", (1 << 31) - 1), "claims 2147483647 bytes"),
    "a header of garbage": (lambda data: data[:16] + b"\xff" * 64 + data[80:], "no valid Arrow IPC"),
}


@pytest.mark.parametrize("sink", ["out", "out.arrow"])
@pytest.mark.parametrize("case", BAD)
def test_files_that_lie_are_told_and_nothing_is_left(case, sink, tmp_path):
    spoil, said = BAD[case]
    (tmp_path / "in.arrow").write_bytes(spoil(good(tmp_path)))
    ended = cli.run("quantize", tmp_path / "in.arrow", tmp_path / sink, "-s", "int8")
    assert ended.code == 3 and said in ended.err and "panicked" not in ended.err, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.arrow", "in.arrow"]


@pytest.mark.parametrize("case, layers, options, said", [
    ("a layer that is cut off", {"a.weight": np.ones((4, 128), np.float32)}, {"channels_per_row": [2, 2]}, "layer_incomplete"),
    ("numbers that are none", {"a.weight": np.full((4, 128), np.nan, np.float32)}, {}, "non_finite"),
    ("a name twice", {"a.weight": np.ones((4, 128), np.float32)}, {}, "layer_repeated"),
], ids=lambda value: value if isinstance(value, str) and " " in value else "")
def test_what_is_wrong_with_layers_is_told_and_nothing_is_left(case, layers, options, said, tmp_path):
    sent = batches(layers, **options)
    if said == "layer_incomplete":
        sent = [sent[0].slice(0, 1)]
    if said == "layer_repeated":
        sent = [*sent, *batches({"b.weight": np.ones((1, 128), np.float32)}), *sent]
    source = write(tmp_path / "in.arrow", sent)
    for sink in ["out", "out.arrow"]:
        ended = cli.run("quantize", source, tmp_path / sink, "-s", "int8")
        assert ended.code == 3 and f"[{said}]" in ended.err, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.arrow"]


def test_compressed_bodies_are_told(tmp_path):
    source = write(tmp_path / "in.arrow", batches(LAYER), compression="lz4")
    ended = cli.run("quantize", source, tmp_path / "out", "-s", "int8")
    assert ended.code == 3 and "compress" in ended.err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("sink", ["out", "out.arrow", "out.parquet"])
def test_a_stopped_run_leaves_nothing(sink, number, code, tmp_path):
    layer = np.random.default_rng(0).normal(size=(1024, 4096)).astype(np.float32)
    source = write(tmp_path / "in.arrow", batches({f"{at}.weight": layer for at in range(20)}, channels_per_row=128))
    flags = ("-s", "int4/g32;solver=mse", "--cpu-level", "scalar", "--threads", "1")
    with cli.Running("quantize", source, tmp_path / sink, *flags, env=cli.environment(QUARREL_SHARD_BYTES_MAX="3000000")) as running:
        started = (lambda: list((tmp_path / sink).glob("*.safetensors"))) if sink == "out" else (lambda: running.spooled_bytes() > 1 << 20)
        running.when(started, "some of it is written")
        running.send(number)
        ended = running.end()
    assert (ended.code, [path.name for path in tmp_path.iterdir()]) == (code, ["in.arrow"]), ended.err


def test_a_server_elsewhere_is_not_asked(tmp_path, server):
    source = write(tmp_path / "in.arrow", batches(LAYER))
    ended = cli.run("quantize", source, tmp_path / "out", "-s", "int8", "--server", server.location)
    assert ended.code == 2 and "job" in ended.err


@pytest.mark.parametrize("command", [["inspect"], ["estimate", "-s", "int8"], ["dequantize", "out"], ["measure"]])
def test_commands_that_read_no_columns_say_who_does(command, tmp_path):
    source = write(tmp_path / "in.parquet", batches(LAYER))
    ends = [source, source] if command == ["measure"] else [source]
    ended = cli.run(command[0], *ends, *command[1:])
    assert ended.code == 3 and "`quantize` alone" in ended.err, ended.err
