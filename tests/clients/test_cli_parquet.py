"""Parquet as its writers write it, and as nobody should: every codec, encoding and type; files that lie."""

import json
import random
import struct

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from golden.model_free import digests
from harness import cli, wire
from harness.model import INDEX, tensors, write_model

LAYERS = {
    "a.weight": np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32),
    "b.weight": np.random.default_rng(2).normal(size=(96, 128)).astype(np.float32),
    "bias": np.ones(256, np.float32),
}


def table(layers=LAYERS, **options) -> pa.Table:
    return pa.Table.from_batches([wire.layer_batch(name, array, **options) for name, array in layers.items()])


def quantized(source, scheme="int8") -> dict:
    out = source.with_suffix("")
    cli.quantize(source, out, "-s", scheme)
    return digests(out)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    source = tmp_path_factory.mktemp("ipc") / "in.arrow"
    with pa.ipc.new_file(source, table().schema) as writer:
        writer.write_table(table(channels_per_row=8))
    return quantized(source)


WRITTEN = {
    "as pyarrow does": {},
    "not compressed": {"compression": "none"},
    "snappy": {"compression": "snappy"},
    "gzip": {"compression": "gzip"},
    "zstd": {"compression": "zstd"},
    "lz4": {"compression": "lz4"},
    "pages of version 2": {"data_page_version": "2.0"},
    "pages of version 2, zstd": {"data_page_version": "2.0", "compression": "zstd"},
    "pages of version 2, not compressed": {"data_page_version": "2.0", "compression": "none"},
    "small pages": {"data_page_size": 1024, "write_batch_size": 16},
    "small row groups": {"row_group_size": 3},
    "no dictionaries": {"use_dictionary": False},
    "split bytes": {"use_dictionary": False, "column_encoding": {"weights.list.element": "BYTE_STREAM_SPLIT"}},
    "no statistics": {"write_statistics": False},
    "an index of pages": {"write_page_index": True},
    "checksums": {"write_page_checksum": True},
    "no Arrow schema": {"store_schema": False},
    "version 1.0": {"version": "1.0"},
}


@pytest.mark.parametrize("rows", [8, None], ids=["runs", "whole layers"])
@pytest.mark.parametrize("case", WRITTEN)
def test_every_way_to_write_a_file_means_the_same(case, rows, expected, tmp_path):
    pq.write_table(table(channels_per_row=rows), tmp_path / "in.parquet", **WRITTEN[case])
    assert quantized(tmp_path / "in.parquet") == expected


def typed(column: pa.Array) -> pa.Table:
    given = table()
    return given.set_column(given.column_names.index("weights"), "weights", column)


def test_types_of_lists(expected, tmp_path):
    lists = table().column("weights").combine_chunks()
    for at, of in enumerate([pa.list_(pa.float32()), pa.large_list(pa.float32())]):
        pq.write_table(typed(lists.cast(of)), tmp_path / f"{at}.parquet")
        assert quantized(tmp_path / f"{at}.parquet") == expected
    for at, name in enumerate([pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]):
        named = table().set_column(0, "layer_name", table().column(0).cast(name))
        pq.write_table(named, tmp_path / f"name-{at}.parquet")
        assert quantized(tmp_path / f"name-{at}.parquet") == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("scheme", ["int8", "W4A16"])
def test_types_of_weights(scheme, dtype, tmp_path):
    layers = {name: array.astype(dtype) for name, array in LAYERS.items()}
    source = tmp_path / "in.arrow"
    with pa.ipc.new_file(source, table(layers).schema) as writer:
        writer.write_table(table(layers))
    expected = quantized(source, scheme)
    pq.write_table(table(layers), tmp_path / "again.parquet")
    assert quantized(tmp_path / "again.parquet", scheme) == expected


def test_tensors_of_a_fixed_shape(tmp_path):
    stack = np.random.default_rng(3).normal(size=(3, 16, 64)).astype(np.float32)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(stack)
    pq.write_table(pa.table({"layer_name": [f"{at}.weight" for at in range(3)], "weights": tensors}), tmp_path / "in.parquet")
    fixed = quantized(tmp_path / "in.parquet")
    pq.write_table(table({f"{at}.weight": layer for at, layer in enumerate(stack)}), tmp_path / "lists.parquet")
    assert fixed == quantized(tmp_path / "lists.parquet")


def test_a_folder_of_files_is_one_model(tmp_path):
    """What a pipeline leaves: layers in several files, and what the model has beside them."""
    model = write_model(tmp_path / "model", shards=1)
    folder = tmp_path / "columns"
    folder.mkdir()
    layers = list(tensors().items())
    for at, part in enumerate([layers[:5], layers[5:9], layers[9:]]):
        parted = table(dict(part), channels_per_row=64)
        if at == 1:
            with pa.ipc.new_file(folder / f"part-{at}.arrow", parted.schema) as writer:
                writer.write_table(parted)
        else:
            pq.write_table(parted, folder / f"part-{at}.parquet")
    for name in ["config.json", "tokenizer.json"]:
        (folder / name).write_bytes((model / name).read_bytes() if (model / name).exists() else b"{}")
    cli.quantize(folder, tmp_path / "out", "-s", "W4A16")
    cli.quantize(model, tmp_path / "expected", "-s", "W4A16")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "tokenizer.json", "model-00001.safetensors", INDEX, "quarrel.report.json"}


def test_files_of_other_columns_in_one_folder_are_told(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(table(), folder / "a.parquet")
    pq.write_table(table({"c.weight": np.ones((4, 64), np.float16)}), folder / "b.parquet")
    ended = cli.run("quantize", folder, tmp_path / "out", "-s", "int8")
    assert ended.code == 3 and "b.parquet" in ended.err and "a.parquet" in ended.err, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("said, options", [
    ("expected none, snappy, gzip, zstd or lz4_raw", {"compression": "brotli"}),
    ("another encoding", {"use_dictionary": False, "column_encoding": {"layer_name": "DELTA_BYTE_ARRAY"}}),
    ("another encoding", {"use_dictionary": False, "column_encoding": {"shape.list.element": "DELTA_BINARY_PACKED"}}),
], ids=["a codec", "deltas of bytes", "deltas of numbers"])
def test_what_is_not_read_is_told(said, options, tmp_path):
    pq.write_table(table(), tmp_path / "in.parquet", **options)
    ended = cli.run("quantize", tmp_path / "in.parquet", tmp_path / "out", "-s", "int8")
    assert ended.code == 3 and said in ended.err, ended.err


def test_files_and_row_groups_without_rows(expected, tmp_path):
    whole = table(channels_per_row=8)
    with pq.ParquetWriter(tmp_path / "in.parquet", whole.schema) as writer:
        for part in [whole.slice(0, 0), whole.slice(0, 5), whole.slice(0, 0), whole.slice(5)]:
            writer.write_table(part)
    assert quantized(tmp_path / "in.parquet") == expected
    folder = tmp_path / "several.parquet"  # as Spark and dask call theirs
    folder.mkdir()
    pq.write_table(whole.slice(0, 0), folder / "part-0.parquet")
    with pq.ParquetWriter(folder / "part-1.parquet", whole.schema):
        pass
    pq.write_table(whole, folder / "part-2.parquet")
    for name in ["_SUCCESS", ".part-2.parquet.crc", "_metadata", "tokenizer.json"]:
        (folder / name).write_bytes(b"{}")
    (folder / "config.json").write_bytes(b'{"model_type": "llama"}')
    assert quantized(folder) == expected
    assert {path.name for path in (tmp_path / "several").iterdir()} == {
        "config.json", "tokenizer.json", "model-00001.safetensors", INDEX, "quarrel.report.json"}
    assert json.loads((tmp_path / "several/config.json").read_bytes())["model_type"] == "llama"
    pq.write_table(whole.slice(0, 0), tmp_path / "nothing.parquet")
    ended = cli.run("quantize", tmp_path / "nothing.parquet", tmp_path / "out", "-s", "int8")
    assert ended.code != 0 and "0 came" in ended.err, ended.err


def test_a_page_that_is_not_what_was_written_is_told(tmp_path):
    pq.write_table(table(), tmp_path / "in.parquet", write_page_checksum=True, compression="none", use_dictionary=False)
    data = bytearray((tmp_path / "in.parquet").read_bytes())
    at = data.index(LAYERS["a.weight"].tobytes()[:64])
    data[at + 10] ^= 1
    (tmp_path / "in.parquet").write_bytes(data)
    ended = cli.run("quantize", tmp_path / "in.parquet", tmp_path / "out", "-s", "int8")
    assert ended.code == 3 and "checksum" in ended.err, ended.err


def test_a_null_of_many_values_is_none(tmp_path):
    """Its type has them, whatever the file has."""
    lists = pa.array([None], pa.list_(pa.float32(), 1 << 28))
    pq.write_table(pa.table({"layer_name": ["a.weight"], "weights": lists}), tmp_path / "in.parquet")
    assert (tmp_path / "in.parquet").stat().st_size < 1 << 20
    ended = cli.run("quantize", tmp_path / "in.parquet", tmp_path / "out", "-s", "int8")
    assert ended.code == 3 and "fixed size of 268435456" in ended.err, ended.err


def good(tmp_path, **options) -> bytes:
    pq.write_table(table(channels_per_row=16), tmp_path / "good.parquet", **options)
    return (tmp_path / "good.parquet").read_bytes()


BAD = {
    "empty": (lambda data: b"", "fewer than"),
    "no Parquet": (lambda data: b"hello, this is none", "PAR1"),
    "cut short": (lambda data: data[:-100], "PAR1"),
    "encrypted": (lambda data: data[:-4] + b"PARE", "PAR1"),
    "a footer of 2 GiB": (lambda data: data[:-8] + struct.pack("<I", 1 << 31) + b"PAR1", "claims 2147483648 bytes"),
    "a footer of everything": (lambda data: data[:-8] + struct.pack("<I", len(data) - 8) + b"PAR1", "footer"),
    "no pages": (lambda data: b"PAR1" + bytes(len(data) // 2) + data[len(data) // 2 + 4:], "column"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_lie_are_told_and_nothing_is_left(case, tmp_path):
    spoil, said = BAD[case]
    (tmp_path / "in.parquet").write_bytes(spoil(good(tmp_path)))
    for sink in ["out", "out.parquet"]:
        ended = cli.run("quantize", tmp_path / "in.parquet", tmp_path / sink, "-s", "int8")
        assert ended.code == 3 and said in ended.err and "panicked" not in ended.err, ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.parquet", "in.parquet"]


DAMAGED = {
    "snappy": (np.float32, {}),
    "plain": (np.float32, {"data_page_version": "2.0", "compression": "none"}),
    "halves": (np.float16, {"compression": "none"}),
    "split bytes": (np.float32, {"use_dictionary": False, "column_encoding": {"weights.list.element": "BYTE_STREAM_SPLIT"}}),
    "bytes": (ml_dtypes.bfloat16, {"compression": "zstd"}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_bytes_end_in_an_error_or_in_numbers(case, tmp_path):
    dtype, options = DAMAGED[case]
    small = {name: array[:16].astype(dtype) for name, array in LAYERS.items()}
    pq.write_table(table(small, channels_per_row=4), tmp_path / "good.parquet", **options)
    data, chance = (tmp_path / "good.parquet").read_bytes(), random.Random(7)
    for _ in range(60):
        spoiled = bytearray(data)
        # Half of them in headers and the footer, of which there is little.
        start = chance.choice([0, len(data) - 4000])
        for _ in range(chance.randint(1, 4)):
            spoiled[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / "in.parquet").write_bytes(spoiled)
        ended = cli.run("quantize", tmp_path / "in.parquet", tmp_path / "out", "-s", "int8", "--force")
        assert ended.code in (0, 2, 3) and "panicked" not in ended.err, ended.err
        assert ended.code == 0 or ended.err.startswith("quarrel: ")
