"""DoGet: a stored checkpoint, quantized on the way: the rows that its layers would get on a stream."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import flight

from harness import cli, wire
from harness.model import tensors

REFUSED = (flight.FlightError, pa.ArrowException)


@pytest.fixture
def model(model, tmp_path):
    """Beside it lies what else a server may read."""
    return shutil.copytree(model, tmp_path / "read/model")


@pytest.fixture
def server(fresh_server, model):
    return fresh_server("--allow-read", model.parent)


def ticket(source, how) -> bytes:
    return json.dumps({"quantize": how, "source": str(source)}).encode()


def pull(server, source, how) -> wire.Reply:
    with wire.connect(server.location) as client:
        return wire._read_all(client.do_get(flight.Ticket(ticket(source, how))))


def refused(server, sent: bytes) -> str:
    with pytest.raises(REFUSED) as caught, wire.connect(server.location) as client:
        client.do_get(flight.Ticket(sent)).read_all()
    return str(caught.value)


@pytest.mark.parametrize("scheme", ["W4A16", "NVFP4A16", "FP8_BLOCK", "int8/tensor"])
def test_a_pulled_checkpoint_is_what_its_layers_become_on_a_stream(scheme, server, model):
    pulled = pull(server, f"file://{model}", {"scheme": scheme})
    command = json.loads(pulled.schema_metadata["quarrel.command"])
    assert command["quantize"]["recipe"]["ignore"] == ["@standard"] and "source" not in command
    expected = wire.exchange(server.location, command, [wire.layer_batch(name, array) for name, array in tensors().items()])
    assert {row["layer_name"] for row in pulled.rows} == tensors().keys()
    for name, array in tensors().items():
        found, wanted = pulled.layer(name), expected.layer(name)
        status, = {row["status"] for row in found.rows}
        assert status == wanted.rows[0]["status"]
        if status == "quantized":
            assert found.bits == wanted.bits, name
            assert found.metrics == wanted.metrics
        else:
            kept, = found.rows[0]["extra_tensors"]
            assert (kept["name"], kept["data"]) == ("weight", array.tobytes()), name
    assert pulled.summary["layers_quantized"] == 14


def test_it_is_what_a_job_writes(server, model, tmp_path):
    cli.quantize(model, tmp_path / "out", "-s", "W8A8")
    written = {name: array for path in (tmp_path / "out").glob("*.safetensors") for name, array in cli.read(path).tensors.items()}
    pulled = pull(server, f"file://{model}", {"scheme": "W8A8"})
    for name in tensors():
        layer = pulled.layer(name)
        if layer.rows[0]["status"] == "quantized":
            assert layer.codes == written[name].tobytes()


def test_layers_that_are_quantized_already_are_pulled_as_what_they_decode_to(server, model):
    coded, dense = model.parent / "coded", model.parent / "dense"
    cli.quantize(model, coded, "-s", "FP8_BLOCK")
    cli.done("dequantize", coded, dense)
    found, expected = (pull(server, f"file://{folder}", {"scheme": "W4A16"}) for folder in (coded, dense))
    for name in tensors():
        assert found.layer(name).rows == expected.layer(name).rows, name
    assert found.summary["layers_quantized"] == expected.summary["layers_quantized"] == 14


@pytest.mark.parametrize("names", [pa.string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()], ids=str)
def test_layers_in_columns_are_pulled_as_they_would_be_sent(names, server, model):
    table = pa.Table.from_batches([wire.layer_batch(name, array, channels_per_row=50) for name, array in tensors().items()])
    folder = model.parent / "columns"
    folder.mkdir()
    pq.write_table(table.set_column(0, "layer_name", table["layer_name"].cast(names)), folder / "layers.parquet")
    with pa.ipc.new_file(model.parent / "layers.arrow", table.schema) as writer:
        writer.write_table(table)
    for source in [folder, folder / "layers.parquet", model.parent / "layers.arrow"]:
        pulled = pull(server, f"file://{source}", {"scheme": "W4A16"})
        command = json.loads(pulled.schema_metadata["quarrel.command"])
        assert pulled.rows == wire.exchange(server.location, command, table.to_batches()).rows
    (folder / "layers.parquet").write_bytes(b"none")
    assert "[source_malformed]" in refused(server, ticket(f"file://{folder}", {"scheme": "W4A16"}))


def test_the_flight_of_a_stored_checkpoint_has_an_endpoint(server, model):
    cmd = ticket(f"file://{model}", {"scheme": "int8"})
    with wire.connect(server.location) as client:
        info = client.get_flight_info(flight.FlightDescriptor.for_command(cmd))
        endpoint, = info.endpoints
        table = client.do_get(endpoint.ticket).read_all()
    assert table.schema.equals(info.schema)
    assert set(table["layer_name"].to_pylist()) == tensors().keys()


def test_from_a_bucket(fresh_server, s3, model):
    source = s3.put(model, "pulled")
    server = fresh_server("--allow-read", "s3://models", env=s3.environment())
    pulled, here = pull(server, source, {"scheme": "W4A16"}), pull_here(fresh_server, model)
    for name in tensors():
        assert [row["quantized_data"] for row in pulled.layer(name).rows] == [row["quantized_data"] for row in here.layer(name).rows]


def pull_here(fresh_server, model):
    return pull(fresh_server("--allow-read", model), f"file://{model}", {"scheme": "W4A16"})


def test_what_cannot_be_pulled_is_told(server, fresh_server, model, tmp_path):
    source, int8 = f"file://{model}", {"scheme": "int8"}
    shutil.copytree(model, model.parent / "damaged", dirs_exist_ok=True)
    shard = next((model.parent / "damaged").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    weights = tensors() | {"bad.weight": np.full((4, 64), np.nan, np.float32)}
    cli.write(model.parent / "nan.safetensors", weights)
    for sent, reason in [
        (b"", "command_missing"),
        (b'{"quantize": {"scheme": "int8"}}', "verb_unsupported"),
        (json.dumps({"dequantize": {}, "source": source}).encode(), "verb_unsupported"),
        (json.dumps({"quantize": int8, "source": source, "sink": source}).encode(), "verb_unsupported"),
        (ticket(source, {"scheme": "int99"}), "scheme_unknown"),
        (ticket("file:///etc/passwd", int8), "uri_not_allowed"),
        (ticket("/etc/passwd", int8), "uri_invalid"),
        (ticket(f"file://{model.parent}/nothing", int8), "source_missing"),
        (ticket(f"file://{model.parent}/damaged", int8), "source_malformed"),
        (ticket(f"file://{model.parent}/nan.safetensors", int8), "non_finite"),
    ]:
        assert f"[{reason}]" in refused(server, sent), reason
    assert pull(server, source, int8).summary["layers_quantized"] == 14
    assert "[uri_not_allowed]" in refused(fresh_server(), ticket(source, int8))


def test_a_client_that_leaves_is_missed_by_nobody(server, model):
    with wire.connect(server.location) as client:
        reader = client.do_get(flight.Ticket(ticket(f"file://{model}", {"scheme": "W4A16"})))
        reader.read_chunk()
        reader.cancel()
    assert pull(server, f"file://{model}", {"scheme": "W4A16"}).summary["layers_quantized"] == 14
