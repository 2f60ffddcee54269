"""DoPut: layers that a client sends, written quantized as a checkpoint at a URI."""

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from golden import cases
from harness import cli, wire
from harness.model import CONFIG, INDEX, files, tensors
from harness.server import eventually

REFUSED = (flight.FlightError, pa.ArrowException)
W4A16 = {"scheme": "W4A16"}


@pytest.fixture
def folder(tmp_path):
    """What a server may write."""
    (tmp_path / "write").mkdir()
    return tmp_path / "write"


@pytest.fixture
def server(fresh_server, folder):
    return fresh_server("--allow-write", folder)


def batches(layers: dict[str, np.ndarray], **options) -> list[pa.RecordBatch]:
    return [wire.layer_batch(name, array, **options) for name, array in layers.items()]


def command(sink, how) -> flight.FlightDescriptor:
    uri = str(sink) if "://" in str(sink) else f"file://{sink}"
    return flight.FlightDescriptor.for_command(json.dumps({"quantize": how, "sink": uri}))


def end(layers: int, **more) -> bytes:
    return json.dumps({"end": {"layers": layers} | more}).encode()


def push(server, sink, how, sent: list[pa.RecordBatch], last: bytes | None, *, on_the_last_batch=False) -> list[dict]:
    """Sends layers and the end; what the server has said of them, the summary last."""
    with wire.connect(server.location) as client:
        writer, reader = client.do_put(command(sink, how), sent[0].schema)
        told = []

        def read():
            while (metadata := reader.read()) is not None:
                told.append(json.loads(metadata.to_pybytes()))

        for batch in sent[:-1]:
            writer.write_batch(batch)
        if on_the_last_batch:
            writer.write_with_metadata(sent[-1], last)
        else:
            writer.write_batch(sent[-1])
            if last is not None:
                writer.write_metadata(last)
        writer.done_writing()
        try:
            read()
        finally:
            writer.close()
    return told


def refused(*args, **options) -> str:
    with pytest.raises(REFUSED) as caught:
        push(*args, **options)
    return str(caught.value)


def written(folder) -> dict[str, bytes]:
    """Tensors of all files of a model, which are those of its index."""
    homes = json.loads((folder / INDEX).read_bytes())["weight_map"]
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, array in cli.read(path).tensors.items():
            assert homes[name] == path.name and name not in found
            found[name] = (str(array.dtype), array.shape, array.tobytes())
    assert found.keys() == homes.keys()
    return found


def nothing_of_it(folder) -> bool:
    return not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "int8/tensor", "MXFP4A16"])
def test_a_put_model_is_what_the_command_line_makes_of_its_folder(scheme, server, folder, model, tmp_path):
    told = push(server, folder / "out", {"scheme": scheme}, batches(tensors(), channels_per_row=100), end(20, config=CONFIG))
    cli.quantize(model, tmp_path / "expected", "-s", scheme)
    assert len(tensors()) == 20
    found, expected = files(folder / "out"), files(tmp_path / "expected")
    shards = sorted(name for name in found if name.endswith(".safetensors"))
    assert found.keys() == {"config.json", INDEX, "report", *shards}
    assert written(folder / "out") == written(tmp_path / "expected")
    assert json.loads(found["config.json"]) == json.loads(expected["config.json"])
    by_name = [{layer["name"]: layer for layer in json.loads(one["report"])["layers"]} for one in (found, expected)]
    assert by_name[0] == by_name[1]
    summary = told[-1]
    assert (summary["layers_quantized"], summary["layers_kept"]) == (14, 6)
    assert all(set(progress) == {"rows", "layers", "bytes_in", "bytes_out"} for progress in told[:-1])


def test_files_are_closed_before_they_are_too_large(fresh_server, folder, model, tmp_path):
    server = fresh_server("--allow-write", folder, "--shard-bytes-max", 200_000)
    push(server, folder / "out", W4A16, batches(tensors(), channels_per_row=64), end(20), on_the_last_batch=True)
    cli.quantize(model, tmp_path / "expected", "-s", "W4A16")
    assert written(folder / "out") == written(tmp_path / "expected")
    sizes = {path.name: sum(array.nbytes for array in cli.read(path).tensors.values())
             for path in (folder / "out").glob("*.safetensors")}
    assert sizes.keys() == {f"model-{at:05}.safetensors" for at in range(1, len(sizes) + 1)} and len(sizes) > 3
    alone = [name for name, size in sizes.items() if size > 200_000]
    assert all(len(cli.read(folder / "out" / name).tensors) == 1 for name in alone)
    assert alone == ["model-00001.safetensors"], "the embeddings, which are larger"
    assert json.loads((folder / "out/config.json").read_bytes()).keys() == {"quantization_config"}


def test_to_a_bucket(fresh_server, s3, model, tmp_path):
    server = fresh_server("--allow-write", "s3://models/put", "--shard-bytes-max", 300_000, env=s3.environment())
    push(server, "s3://models/put/out", {"scheme": "W8A16"}, batches(tensors()), end(20, config=CONFIG))
    cli.quantize(model, tmp_path / "expected", "-s", "W8A16")
    assert written(s3.fetch("put/out", tmp_path / "out")) == written(tmp_path / "expected")
    assert not [key for key in s3.keys("put/out") if ".quarrel" in key]
    message = refused(server, "s3://models/put/cut", W4A16, batches(tensors()), None)
    assert "[end_missing]" in message
    assert not s3.keys("put/cut") and not s3.unfinished()


def test_fused_layers_share_what_their_rule_says(server, folder, model, tmp_path):
    """NVFP4: whoever sends them knows their greatest magnitude; without it they would not be loaded as they are."""
    layers = tensors()
    message = refused(server, folder / "out", {"scheme": "NVFP4A16"}, batches(layers), end(20))
    assert "[fused_scales_differ]" in message and "k_proj.weight" in message
    assert nothing_of_it(folder / "out")
    rules = []
    for fused in [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]:
        for at in range(2):
            names = [name for name in layers if name.startswith(f"model.layers.{at}.") and name.split(".")[-2] in fused]
            amax = max(float(np.abs(layers[name].astype(np.float32)).max()) for name in names)
            rules.append({"targets": names, "scheme": "NVFP4A16", "amax": amax})
    recipe = {"rules": [*rules, {"targets": ["Linear"], "scheme": "NVFP4A16"}], "ignore": ["@standard"]}
    push(server, folder / "out", {"recipe": recipe}, batches(layers), end(20, config=CONFIG))
    cli.quantize(model, tmp_path / "expected", "-s", "NVFP4A16")
    assert written(folder / "out") == written(tmp_path / "expected")


def test_every_element_type_is_stored_as_it_came(server, folder):
    values = cases.normal(cases.generator("put types"), (4, 64))
    kept = {word: values.astype(dtype) for word, dtype in wire.BINARY_DTYPES.items()}
    layers = {f"{word}.weight": array for word, array in kept.items()}
    recipe = {"rules": [{"targets": ["nothing"], "scheme": "int8"}]}
    push(server, folder / "out", {"recipe": recipe}, batches_of_bytes(layers), end(len(layers)))
    found = cli.read(folder / "out/model-00001.safetensors").tensors
    for name, array in layers.items():
        assert found[name].tobytes() == array.tobytes() and found[name].dtype == array.dtype, name


def batches_of_bytes(layers) -> list[pa.RecordBatch]:
    """All as large_binary: a stream has one schema."""
    words = {np.dtype(dtype): word for word, dtype in wire.BINARY_DTYPES.items()}
    return [wire.layer_batch(name, array, dtype=words[array.dtype]) for name, array in layers.items()]


WEIGHT = cases.normal(cases.generator("put"), (8, 128))
ONE = {"a.weight": WEIGHT}
NOTHING, ONLY_A = ({"rules": [{"targets": [target], "scheme": "int4"}]} for target in ("nothing", "a.weight"))
# what is sent, how, the end, the reason, what the message says
WRONG = {
    "no end": (ONE, W4A16, None, "end_missing", "end"),
    "the end of a stream": (ONE, W4A16, b'{"end": {}}', "end_invalid", "layers"),
    "a wrong count": (ONE, W4A16, end(2), "end_invalid", "2 layers, and 1 came"),
    "a word": (ONE, W4A16, end(1, color=1), "end_invalid", "color"),
    "a configuration that is none": (ONE, W4A16, end(1, config=[]), "end_invalid", "config"),
    "no weight": ({"a": WEIGHT}, W4A16, end(1), "not_a_weight", "`a`"),
    "no shape": ({"a.weight": WEIGHT[0]}, {"recipe": {"rules": [{"targets": ["a.weight"], "scheme": "int8"}]}}, end(1),
                 "rank_unsupported", "`a.weight`"),
    "transposed": (ONE, W4A16, end(1, config={"model_type": "gpt2"}), "source_malformed", "gpt2"),
    "a name of safetensors": ({"__metadata__": WEIGHT}, {"recipe": NOTHING}, end(1), "not_a_weight", "__metadata__"),
    "a name that codes get": ({"a.weight": WEIGHT, "a.weight_scale": WEIGHT}, {"recipe": ONLY_A}, end(2), "layer_repeated", "a.weight_scale"),
    "a long configuration": (ONE, W4A16, end(1, config={"a": "x" * (300 << 10)}), "end_invalid", "262144 bytes"),
    "numbers": ({"a.weight": np.full((8, 128), np.nan, np.float32)}, W4A16, end(1), "non_finite", "`a.weight`"),
    "calibration": (ONE, {"scheme": "FP8"}, end(1), "needs_calibration", "FP8"),
    "errors passed over": (ONE, W4A16 | {"on_error": "continue"}, end(1), "option_conflict", "on_error"),
    "what is kept": (ONE, W4A16 | {"return_kept": True}, end(1), "option_conflict", "return_kept"),
    "a scheme": (ONE, {"scheme": "int9"}, end(1), "scheme_unknown", "int9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(case, server, folder):
    layers, how, last, reason, said = WRONG[case]
    message = refused(server, folder / "out", how, batches(layers), last)
    assert f"[{reason}]" in message and said in message, message
    assert nothing_of_it(folder / "out")
    push(server, folder / "out", W4A16, batches(ONE), end(1))
    assert written(folder / "out")


def test_names_are_stored_once_over_all_files(fresh_server, folder):
    server = fresh_server("--allow-write", folder, "--shard-bytes-max", 100)
    layers = {"a.weight": WEIGHT, "b.weight": WEIGHT, "a.weight_scale": WEIGHT}
    message = refused(server, folder / "out", {"recipe": ONLY_A}, batches(layers), end(3))
    assert "[layer_repeated]" in message and nothing_of_it(folder / "out")


def test_a_shape_that_safetensors_cannot_have_is_told_and_nothing_is_left(server, folder):
    """No elements, however many the other dimensions stand for."""
    empty = {"layer_name": ["b.weight"], "weights": [[]], "shape": [[1 << 33, 1 << 33, 0]]}
    empty = pa.RecordBatch.from_pydict(empty, schema=batches(ONE)[0].schema)
    message = refused(server, folder / "out", W4A16, [*batches(ONE), empty], end(2))
    assert "overflow" in message and "[internal]" not in message and nothing_of_it(folder / "out")


def test_a_folder_that_was_there_stays(server, folder):
    (folder / "out").mkdir()
    assert "[end_missing]" in refused(server, folder / "out", W4A16, batches(ONE), None)
    assert (folder / "out").is_dir() and nothing_of_it(folder / "out")


def test_two_servers_do_not_mix_their_streams_in_a_bucket(fresh_server, s3):
    """Nobody is held off in a store; whoever is last to seal notices."""
    flags = "--allow-write", "s3://models/two", "--shard-bytes-max", 100
    sink = "s3://models/two/out"
    names = ["a", "b", "c", "d"]
    with (wire.connect(fresh_server(*flags, env=s3.environment()).location) as one,
          wire.connect(fresh_server(*flags, env=s3.environment()).location) as other):
        first, _ = one.do_put(command(sink, W4A16), batches(ONE)[0].schema)
        first.write_batch(wire.layer_batch("a.weight", WEIGHT))
        eventually(lambda: any("job.json" in key for key in s3.keys("two/out")), what="the first has begun")
        second, _ = other.do_put(command(sink, W4A16), batches(ONE)[0].schema)
        for name in names:
            second.write_batch(wire.layer_batch(f"{name}.weight", WEIGHT + 1))
        eventually(lambda: any("model-00002" in key for key in s3.keys("two/out")), what="two files of the second")
        before = s3.get("two/out/model-00001.safetensors")
        for name in names[1:]:
            first.write_batch(wire.layer_batch(f"{name}.weight", WEIGHT))
        eventually(lambda: s3.get("two/out/model-00001.safetensors") != before, what="the first has written too")
        for writer in (second, first):
            writer.write_metadata(end(4))
            writer.done_writing()
            with pytest.raises(REFUSED, match="sink_taken"):
                writer.close()
    assert not [key for key in s3.keys("two/out") if key.endswith("config.json")]


def test_a_sink_must_be_allowed_and_empty(server, folder, tmp_path):
    assert "[uri_not_allowed]" in refused(server, tmp_path / "other", W4A16, batches(ONE), end(1))
    assert "[uri_not_allowed]" in refused(server, folder / "../other", W4A16, batches(ONE), end(1))
    assert "[uri_invalid]" in refused(server, folder / "a.safetensors", W4A16, batches(ONE), end(1))
    (folder / "full").mkdir()
    (folder / "full/config.json").write_text("{}")
    assert "[sink_exists]" in refused(server, folder / "full", W4A16, batches(ONE), end(1))
    assert [path.name for path in (folder / "full").iterdir()] == ["config.json"]


def begun(client, server, sink) -> tuple:
    """A stream of which a layer has been answered."""
    sent = batches(ONE)
    writer, reader = client.do_put(command(sink, W4A16), sent[0].schema)
    writer.write_batch(sent[0])
    assert json.loads(reader.read().to_pybytes())["rows"] == 1
    return writer, reader


def test_one_stream_at_a_time_writes_to_a_place(server, folder):
    with wire.connect(server.location) as client:
        writer, _ = begun(client, server, folder / "out")
        for place in ["out", "out/within", ""]:
            assert "[sink_taken]" in refused(server, folder / place, W4A16, batches(ONE), end(1)), place
        job = json.dumps({"command": {"quantize": W4A16, "source": f"file://{folder}/x", "sink": f"file://{folder}/out"}})
        with pytest.raises(REFUSED, match="uri_not_allowed|sink_taken"):
            list(client.do_action(flight.Action("job.submit", job.encode())))
        writer.write_metadata(end(1))
        writer.done_writing()
        writer.close()
    assert written(folder / "out")


def test_a_client_that_goes_leaves_nothing(server, folder):
    with wire.connect(server.location) as client:
        held = begun(client, server, folder / "out")
        assert (folder / "out").exists()
        del held
    eventually(lambda: nothing_of_it(folder / "out"), seconds=20, what="the folder is gone")
    push(server, folder / "out", W4A16, batches(ONE), end(1))
    assert written(folder / "out")


def test_what_a_killed_server_has_left_is_begun_anew(fresh_server, folder, tmp_path):
    server = fresh_server("--allow-write", folder)
    with wire.connect(server.location) as client:
        _held = begun(client, server, folder / "out")
        server.kill()
    assert list((folder / "out").iterdir()) and not (folder / "out/config.json").exists()
    push(fresh_server("--allow-write", folder), folder / "out", W4A16, batches(ONE), end(1))
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "config.json", "model-00001.safetensors", INDEX, "quarrel.report.json"]


def test_the_checkpoint_is_there_when_the_summary_is(server, folder):
    summary = push(server, folder / "out", W4A16, batches(ONE), end(1))[-1]
    path = folder / "out/model-00001.safetensors"
    assert summary["bytes_out"] == path.stat().st_size and summary["layers_quantized"] == 1
    assert not (folder / "out/.quarrel").exists()
