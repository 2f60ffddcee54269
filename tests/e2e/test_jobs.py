"""Jobs on a server: checkpoints from URI to URI, under the prefixes that its operator allows."""

import json
import os
import shutil
import signal
import socket

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import flight

from golden import ggufs, llamas
from golden.model_free import digests
from harness import cli, stores, wire
from harness.model import files, tensors
from harness.server import eventually

REFUSED = (flight.FlightError, pa.ArrowException)
SECONDS_MAX = 60  # ends a test that hangs; nothing is measured by it


@pytest.fixture
def folders(model, tmp_path):
    """What a server may read and write: folders that are there."""
    shutil.copytree(model, tmp_path / "read/model")
    (tmp_path / "write").mkdir()
    return tmp_path


@pytest.fixture
def client(fresh_server, folders):
    server = fresh_server("--allow-read", folders / "read", "--allow-write", folders / "write")
    with wire.connect(server.location) as client:
        yield client


def act(client, action, body=None) -> list[dict]:
    data = b"" if body is None else json.dumps(body).encode()
    return [json.loads(result.body.to_pybytes()) for result in client.do_action(flight.Action(action, data))]


def submit(client, source, sink, how=None, **options) -> dict:
    verb = how or {"quantize": {"scheme": "W4A16"}}
    job, = act(client, "job.submit", {"command": verb | {"source": str(source), "sink": str(sink)}} | options)
    return job


def ended(client, job) -> dict:
    return reaches(client, job, lambda found: found["state"] != "running")


def reaches(client, job, is_there) -> dict:
    """The job when it is so."""
    found = job

    def look():
        nonlocal found
        found, = act(client, "job.status", {"job": job["job"]})
        return is_there(found)

    eventually(look, seconds=SECONDS_MAX, what=str(job))
    return found


def done(client, *args, **options) -> dict:
    job = ended(client, submit(client, *args, **options))
    assert job["state"] == "done", job
    return job


def refused(client, *args, **options) -> str:
    with pytest.raises(REFUSED) as caught:
        submit(client, *args, **options)
    return str(caught.value)


def test_a_job_makes_what_the_command_line_makes(client, folders, model, tmp_path):
    job = done(client, f"file://{folders}/read/model", f"file://{folders}/write/out")
    cli.quantize(model, tmp_path / "expected", "-s", "W4A16")
    expected = files(tmp_path / "expected")
    assert files(folders / "write/out") == expected
    told = json.loads(expected["report"])
    assert job["summary"]["layers_quantized"] == told["totals"]["quantized"] == 14
    assert job["summary"]["layers_kept"] == told["totals"]["kept"]
    assert job["summary"]["worst_layer"] == told["totals"]["worst_layer"]
    assert job["bytes_done"] == job["bytes_total"] > 0
    recipe = job["command"]["quantize"]["recipe"]
    assert recipe["ignore"] == ["@standard"] and recipe["rules"][0]["targets"] == ["Linear"]
    assert act(client, "job.list") == [job]
    dense = done(client, f"file://{folders}/read/../read/model/", f"file://{folders}/write/x", {"quantize": {"scheme": "W8A8"}})
    assert [found["job"] for found in act(client, "job.list")] == [dense["job"], job["job"]]


def test_a_job_dequantizes(fresh_server, folders, tmp_path):
    cli.quantize(folders / "read/model", folders / "read/coded", "-s", "NVFP4A16")
    cli.done("dequantize", folders / "read/coded", tmp_path / "expected")
    server = fresh_server("--allow-read", f"file://{folders}/read", "--allow-write", folders / "write")
    with wire.connect(server.location) as client:
        done(client, f"file://{folders}/read/coded", f"file://{folders}/write/dense", {"dequantize": {}})
    assert files(folders / "write/dense").keys() - {"report"} == files(tmp_path / "expected").keys()
    for name, data in files(tmp_path / "expected").items():
        assert (folders / "write/dense" / name).read_bytes() == data


def columns(path):
    """The model's layers as a file of columns."""
    batches = [wire.layer_batch(name, array, channels_per_row=64) for name, array in tensors().items()]
    with pa.ipc.new_file(path, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return path


def test_from_columns_and_to_columns(client, folders, model, tmp_path):
    columns(folders / "read/layers.arrow")
    made = done(client, f"file://{folders}/read/layers.arrow", f"file://{folders}/write/out")
    answered = done(client, f"file://{folders}/read/model", f"file://{folders}/write/out.arrow")
    assert made["summary"]["layers_quantized"] == answered["summary"]["layers_quantized"] == 14
    assert made["bytes_done"] == made["bytes_total"] > 0
    cli.quantize(model, tmp_path / "expected", "-s", "W4A16")
    assert digests(folders / "write/out") == digests(tmp_path / "expected")
    table = pa.ipc.open_file(folders / "write/out.arrow").read_all()
    assert set(table["layer_name"].to_pylist()) == tensors().keys()
    job = ended(client, submit(client, f"file://{folders}/read/layers.arrow", f"file://{folders}/write/worse", sqnr_db_min=90))
    assert (job["state"], job["reason"]) == ("failed", "quality_missed") and not (folders / "write/worse").exists()
    (folders / "read/bad.arrow").write_bytes(b"no Arrow at all")
    job = ended(client, submit(client, f"file://{folders}/read/bad.arrow", f"file://{folders}/write/bad"))
    assert (job["state"], job["reason"]) == ("failed", "source_malformed") and not (folders / "write/bad").exists()


CLAIMS = {
    # Runs of one index of a dictionary: a page of a few bytes.
    "a page": ({"compression": "none"}, "a page has 20000000 values"),
    "a page that is compressed": ({"compression": "zstd", "use_dictionary": False}, "a page has 80000020 bytes"),
    "a page of version 2": ({"compression": "snappy", "data_page_version": "2.0"}, "a page has"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_a_small_file_of_a_large_row_is_told_before_it_is_in_memory(case, client, folders):
    options, said = CLAIMS[case]
    layer = wire.layer_batch("a.weight", np.ones((1, 20_000_000), np.float32))
    pq.write_table(pa.Table.from_batches([layer]), folders / "read/in.parquet", **options)
    assert (folders / "read/in.parquet").stat().st_size < 1 << 20
    for sink in ["out", "out.parquet"]:
        job = ended(client, submit(client, f"file://{folders}/read/in.parquet", f"file://{folders}/write/{sink}"))
        assert (job["state"], job["reason"]) == ("failed", "source_malformed") and said in job["message"], job
    assert not list((folders / "write").iterdir())


def test_a_folder_of_columns_and_what_it_has_beside_them(client, folders):
    source = folders / "read/layers"
    source.mkdir()
    pq.write_table(pa.Table.from_batches([wire.layer_batch(*layer) for layer in tensors().items()]), source / "a.parquet")
    shutil.copy(folders / "read/model/config.json", source)
    (source / "tokenizer.json").write_text("{}")
    done(client, f"file://{source}", f"file://{folders}/write/out")
    done(client, f"file://{folders}/read/model", f"file://{folders}/write/expected")
    made, expected = folders / "write/out", folders / "write/expected"
    assert digests(made) == digests(expected)
    assert json.loads((made / "config.json").read_bytes()) == json.loads((expected / "config.json").read_bytes())
    assert (made / "tokenizer.json").read_text() == "{}"
    (folders / "secret.json").write_text("secret")
    (source / "merges.json").symlink_to(folders / "secret.json")
    job = ended(client, submit(client, f"file://{source}", f"file://{folders}/write/link"))
    assert (job["state"], job["reason"]) == ("failed", "uri_not_allowed"), job
    assert not (folders / "write/link").exists()


def test_a_cancelled_job_of_columns_leaves_nothing(fresh_server, folders):
    layer = wire.layer_batch("a.weight", np.ones((4096, 4096), np.float32), channels_per_row=128)
    with pa.ipc.new_file(folders / "read/large.arrow", layer.schema) as writer:
        for at in range(8):
            writer.write_batch(layer.set_column(0, "layer_name", pa.array([f"{at}.weight"] * layer.num_rows)))
    flags = "--allow-read", folders / "read", "--allow-write", folders / "write", "--cpu-level", "scalar", "--shard-bytes-max", 1 << 20
    server = fresh_server(*flags, "--message-bytes-max", 1 << 27, "--threads", 1)
    with wire.connect(server.location) as client:
        how = {"quantize": {"scheme": "int4/g32;solver=mse"}}
        job = submit(client, f"file://{folders}/read/large.arrow", f"file://{folders}/write/out", how)
        eventually(lambda: list((folders / "write/out").glob("*.safetensors")), what="a file of it")
        act(client, "job.cancel", {"job": job["job"]})
        assert ended(client, job)["state"] == "cancelled"
    assert not (folders / "write/out").exists()


def test_columns_in_a_bucket(fresh_server, s3, tmp_path):
    (tmp_path / "layers").mkdir()
    columns(tmp_path / "layers/model.arrow")
    pq.write_table(pa.ipc.open_file(tmp_path / "layers/model.arrow").read_all(), tmp_path / "layers/model.parquet")
    source = s3.put(tmp_path / "layers", "columns")
    server = fresh_server("--allow-read", source, "--allow-write", "s3://models/made", env=s3.environment())
    with wire.connect(server.location) as client:
        done(client, f"{source}/model.arrow", "s3://models/made/columns", {"quantize": {"scheme": "W8A16"}})
        done(client, f"{source}/model.parquet", "s3://models/made/again", {"quantize": {"scheme": "W8A16"}})
        done(client, f"{source}/model.parquet", "s3://models/made/columns.parquet", {"quantize": {"scheme": "W8A16"}})
        done(client, f"{source}/model.arrow", "s3://models/made/columns.arrow", {"quantize": {"scheme": "W8A16"}})
    cli.quantize(tmp_path / "layers/model.arrow", tmp_path / "expected", "-s", "W8A16")
    assert digests(s3.fetch("made/columns", tmp_path / "out")) == digests(tmp_path / "expected")
    assert digests(s3.fetch("made/again", tmp_path / "again")) == digests(tmp_path / "expected")
    table = pa.ipc.open_file(pa.BufferReader(s3.get("made/columns.arrow"))).read_all()
    assert pq.read_table(pa.BufferReader(s3.get("made/columns.parquet"))).equals(table)
    assert set(table["layer_name"].to_pylist()) == tensors().keys()


def test_from_a_bucket_to_a_bucket(fresh_server, s3, model, tmp_path):
    source = s3.put(model, "jobs/model")
    flags = "--allow-read", "s3://models/jobs", "--allow-write", "s3://models/made"
    server = fresh_server(*flags, env=s3.environment())
    cli.quantize(model, tmp_path / "expected", "-s", "NVFP4A16")
    with wire.connect(server.location) as client:
        nvfp4 = {"quantize": {"scheme": "NVFP4A16"}}
        done(client, source, "s3://models/made/out", nvfp4)
        assert files(s3.fetch("made/out", tmp_path / "out")) == files(tmp_path / "expected")
        for uri in ["s3://models/jobs2/x", "s3://models", "s3://other/jobs/x", "s3://models/made/out"]:
            assert "[uri_not_allowed]" in refused(client, uri, "s3://models/made/y", nvfp4), uri
        assert "[uri_not_allowed]" in refused(client, source, "s3://models/jobs/out", nvfp4)
        info, = act(client, "server.info")
        assert (info["allow_read"], info["allow_write"]) == (["s3://models/jobs"], ["s3://models/made"])


def test_a_server_touches_nothing_unless_told_to(server, folders):
    with wire.connect(server.location) as client:
        assert "[uri_not_allowed]" in refused(client, f"file://{folders}/read/model", f"file://{folders}/write/out")
    assert not list((folders / "write").iterdir())


def test_nothing_leads_out_of_what_is_allowed(client, folders, model):
    (folders / "secret").mkdir()
    shutil.copy(next(model.glob("*.safetensors")), folders / "secret/model.safetensors")
    (folders / "read/link").symlink_to(folders / "secret")
    (folders / "read/one.safetensors").symlink_to(folders / "secret/model.safetensors")
    (folders / "write/link").symlink_to(folders / "secret")
    (folders / "write/dangling").symlink_to(folders / "elsewhere")
    sink = f"file://{folders}/write/out"
    outside = [f"{folders}/secret", f"{folders}/read/link", f"{folders}/read/one.safetensors", f"{folders}/read/../secret",
               f"{folders}/read/%2e%2e/secret", f"{folders}/read/..%2fsecret", f"{folders}/readable", "/etc/passwd"]
    for path in outside:
        assert "[uri_not_allowed]" in refused(client, f"file://{path}", sink), path
    for path in [f"{folders}/secret/out", f"{folders}/write/link/out", f"{folders}/write/dangling", f"{folders}/read/out",
                 f"{folders}/write/dangling/out"]:
        assert "[uri_not_allowed]" in refused(client, f"file://{folders}/read/model", f"file://{path}"), path
    # A file of a model that is a link out of it; a folder of the sink, likewise.
    shard = next((folders / "read/model").glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(folders / "secret/model.safetensors")
    job = ended(client, submit(client, f"file://{folders}/read/model", sink))
    assert (job["state"], job["reason"]) == ("failed", "uri_not_allowed") and shard.name in job["message"]
    (folders / "write/planted").mkdir()
    (folders / "write/planted/.quarrel").symlink_to(folders / "secret")
    shard.unlink()
    shutil.copy(folders / "secret/model.safetensors", shard)
    job = ended(client, submit(client, f"file://{folders}/read/model", f"file://{folders}/write/planted", replace=True))
    assert (job["state"], job["reason"]) == ("failed", "uri_not_allowed")
    assert [path.name for path in (folders / "secret").iterdir()] == ["model.safetensors"]


def test_an_answer_that_leads_elsewhere_is_not_followed(fresh_server, folders, model):
    moved = {"/moved/" + path.name: "/" + path.name for path in model.iterdir()}
    with stores.web(model, moved) as (_, url):
        server = fresh_server("--allow-read", url, "--allow-write", folders / "write")
        with wire.connect(server.location) as client:
            done(client, url, f"file://{folders}/write/straight")
            job = ended(client, submit(client, f"{url}/moved", f"file://{folders}/write/moved"))
    assert (job["state"], job["reason"]) == ("failed", "storage_failed"), job
    assert not (folders / "write/moved").exists()


BAD = {
    "no source": ({"sink": "file:///x"}, {}, "[command_malformed]", "`source`"),
    "no sink": ({"source": "file:///x"}, {}, "[command_malformed]", "`sink`"),
    "a path": ({"source": "/tmp", "sink": "file:///x"}, {}, "[uri_invalid]", "`/tmp`"),
    "an unknown scheme": ({"quantize": {"scheme": "int99"}}, {}, "[scheme_unknown]", "int99"),
    "an unknown field": ({}, {"force": True}, "[field_unknown]", "force"),
    "an option without effect": ({"quantize": {"scheme": "int8", "return_kept": True}}, {}, "[option_conflict]", "return_kept"),
    "measure": ({"quantize": None, "measure": {}}, {}, "[verb_unsupported]", "measure"),
    "no number": ({}, {"sqnr_db_min": "NaN"}, "[option_invalid]", "sqnr_db_min"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_request_that_cannot_be_is_told(what, client, folders):
    command, options, *says = BAD[what]
    uris = {"source": f"file://{folders}/read/model", "sink": f"file://{folders}/write/out"}
    command = {"quantize": {"scheme": "W4A16"}} | (command if "source" in command or "sink" in command else uris | command)
    command = {key: value for key, value in command.items() if value is not None}
    with pytest.raises(REFUSED) as caught:
        act(client, "job.submit", {"command": command} | options)
    assert all(word in str(caught.value) for word in says), caught.value
    assert not list((folders / "write").iterdir())
    assert act(client, "job.list") == []


def test_what_is_wrong_with_source_or_sink_is_told_by_the_status(client, folders):
    read, write = f"file://{folders}/read", f"file://{folders}/write"
    (folders / "read/empty").mkdir()
    (folders / "read/broken.safetensors").write_bytes(b"\xff" * 100)
    (folders / "write/there").mkdir()
    (folders / "write/there/mine.txt").write_text("mine")
    for source, sink, options, reason in [
        ("nothing", "out", {}, "source_missing"),
        ("empty", "out", {}, "source_malformed"),
        ("broken.safetensors", "out", {}, "source_malformed"),
        ("model", "there", {}, "sink_exists"),
        ("model", "out", {"sqnr_db_min": 99}, "quality_missed"),
        ("model", "out", {"how": {"quantize": {"scheme": "W8A16"}}}, "sink_taken"),
        ("model", "dense", {"how": {"dequantize": {}}}, "source_malformed"),
        ("model", "calibrated", {"how": {"quantize": {"scheme": "FP8"}}}, "needs_calibration"),
    ]:
        job = ended(client, submit(client, f"{read}/{source}", f"{write}/{sink}", **options))
        assert (job["state"], job.get("reason")) == ("failed", reason), job
        assert job["message"] and "summary" not in job
    assert not (folders / "write/out/config.json").exists()
    done(client, f"{read}/model", f"{write}/out")
    assert [path.name for path in (folders / "write/there").iterdir()] == ["mine.txt"]


@pytest.fixture
def large(folders):
    """A model that takes a second."""
    folder = folders / "read/large"
    folder.mkdir()
    weights = np.resize(np.arange(1 << 16, dtype=np.float32) / 997 - 33, (2048, 4096)).astype(ml_dtypes.bfloat16)
    cli.write(folder / "model.safetensors", {f"layers.{at}.weight": weights for at in range(10)})
    return f"file://{folder}"


def test_a_job_that_is_cancelled_stops_and_can_go_on(client, folders, large):
    solver = {"quantize": {"scheme": "int4/g128;solver=mse"}}
    job = submit(client, large, f"file://{folders}/write/out", solver)
    job, = act(client, "job.cancel", {"job": job["job"]})
    job = ended(client, job)
    assert job["state"] == "cancelled" and "summary" not in job, job
    assert not (folders / "write/out/model.safetensors").exists()
    assert not [path for path in (folders / "write").rglob("*.partial")]
    done(client, large, f"file://{folders}/write/out", solver)
    again, = act(client, "job.cancel", {"job": job["job"]})
    assert again == job


def test_names_that_are_no_jobs_are_told(client):
    for action in ["job.status", "job.cancel"]:
        for name in ["", "1", "x" * 3000, "00000000-1"]:
            with pytest.raises(REFUSED, match=r"\[job_unknown\]"):
                act(client, action, {"job": name})
        with pytest.raises(REFUSED, match=r"\[command_missing\]"):
            act(client, action)
    with pytest.raises(REFUSED, match=r"\[option_conflict\]"):
        act(client, "job.list", {})


def test_one_job_too_many_is_refused(fresh_server, folders, large):
    server = fresh_server("--allow-read", folders, "--allow-write", folders / "write", "--jobs-max", 1)
    with wire.connect(server.location) as client:
        solver = {"quantize": {"scheme": "int4/g128;solver=mse"}}
        first = submit(client, large, f"file://{folders}/write/one", solver)
        assert "[jobs_exceeded]" in refused(client, large, f"file://{folders}/write/two")
        act(client, "job.cancel", {"job": first["job"]})
        ended(client, first)
        done(client, large, f"file://{folders}/write/two")


def test_a_server_that_stops_lets_jobs_end_or_leaves_what_can_go_on(fresh_server, folders, large):
    solver = {"quantize": {"scheme": "int4/g128;solver=mse"}}
    flags = "--allow-read", folders, "--allow-write", folders / "write"
    patient, hasty = fresh_server(*flags), fresh_server(*flags, "--drain-seconds", 0)
    for server, name in [(patient, "patient"), (hasty, "hasty")]:
        with wire.connect(server.location) as client:
            submit(client, large, f"file://{folders}/write/{name}", solver)
        os.kill(server.pid, signal.SIGTERM)
        server.wait(SECONDS_MAX)
    assert (folders / "write/patient/model.safetensors").exists()
    assert not (folders / "write/hasty/model.safetensors").exists()
    with wire.connect(fresh_server(*flags).location) as client:
        done(client, large, f"file://{folders}/write/hasty", solver)
    expected, found = files(folders / "write/patient"), files(folders / "write/hasty")
    assert found == expected


def test_streams_go_on_beside_a_job(fresh_server, folders, large):
    server = fresh_server("--allow-read", folders, "--allow-write", folders)
    with wire.connect(server.location) as client:
        job = submit(client, large, f"file://{folders}/write/out", {"quantize": {"scheme": "int4/g128;solver=mse"}})
        batch = wire.layer_batch("layer", np.ones((4, 8), np.float32))
        reply = wire.exchange(server.location, {"quantize": {"scheme": "int8"}}, [batch])
        assert [row["status"] for row in reply.rows] == ["quantized"]
        assert ended(client, job)["state"] == "done"


ALIASES = ["", "/", "/../model", "/%2e", "/out", "/..", "/assets/x"]


@pytest.mark.parametrize("alias", ALIASES)
def test_a_sink_that_is_the_source_or_within_it_is_refused(alias, fresh_server, folders, s3, model):
    before = files(folders / "read/model")
    disk = fresh_server("--allow-read", folders, "--allow-write", folders)
    prefix = f"overlap{ALIASES.index(alias)}/model"
    source = s3.put(model, prefix)
    bucket = fresh_server("--allow-read", "s3://models", "--allow-write", "s3://models", env=s3.environment())
    for server, uri in [(disk, f"file://{folders}/read/model"), (bucket, source)]:
        with wire.connect(server.location) as client:
            job = ended(client, submit(client, uri, uri + alias, replace=True))
            assert (job["state"], job["reason"]) == ("failed", "sink_taken"), job
            (folders / "link").unlink(missing_ok=True)
            (folders / "link").symlink_to(folders / "read/model")
            if server is disk and ".." not in alias:
                job = ended(client, submit(client, uri, f"file://{folders}/link{alias}", replace=True))
                assert (job["state"], job["reason"]) == ("failed", "sink_taken"), job
    assert files(folders / "read/model") == before
    assert {key: s3.get(f"{prefix}/{key}") for key in s3.keys(prefix)} == {name: data for name, data in files(model).items()}


def test_two_jobs_with_one_sink_do_not_run_at_once(fresh_server, folders, large, s3, model):
    server = fresh_server("--allow-read", folders, "--allow-read", "s3://models", "--allow-write", folders, "--allow-write",
                          "s3://models", env=s3.environment())
    with wire.connect(server.location) as client:
        for sink in [f"file://{folders}/write/out", "s3://models/once/out"]:
            first = submit(client, large, sink, {"quantize": {"scheme": "int4/g128;solver=mse"}})
            for other in [sink, sink + "/", sink + "/deeper", sink.removesuffix("/out")]:
                assert "[sink_taken]" in refused(client, large, other, replace=True), other
            act(client, "job.cancel", {"job": first["job"]})
            assert ended(client, first)["state"] == "cancelled"
            done(client, f"file://{folders}/read/model", sink, replace=True)


def test_a_store_that_is_silent_holds_nobody_up(fresh_server, folders):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://{}:{}".format(*silent.getsockname())
        server = fresh_server("--allow-read", url, "--allow-write", folders / "write", "--jobs-max", 1, "--drain-seconds", 0)
        with wire.connect(server.location) as client:
            for at in range(3):
                job = submit(client, f"{url}/model", f"file://{folders}/write/{at}")
                act(client, "job.cancel", {"job": job["job"]})
                assert ended(client, job)["state"] == "cancelled"
        assert server.stop(SECONDS_MAX) == 0
    assert not list((folders / "write").iterdir())


def test_a_pipe_where_a_file_should_be_is_told(client, folders):
    (folders / "read/model/config.json").unlink()
    os.mkfifo(folders / "read/model/config.json")
    job = ended(client, submit(client, f"file://{folders}/read/model", f"file://{folders}/write/out"))
    assert job["state"] == "failed" and "no regular file" in job["message"], job


def test_what_is_not_allowed_is_not_remembered(fresh_server, folders):
    server = fresh_server("--allow-write", folders / "write")
    with wire.connect(server.location) as client:
        def ask(at):
            for uri in [f"s3://bucket{at}/x", f"gs://bucket{at}/x", f"https://host{at}.example/x", f"az://box{at}/x"]:
                assert "[uri_not_allowed]" in refused(client, uri, f"file://{folders}/write/out")
        ask(0)
        before = server.rss_bytes()
        for at in range(100):
            ask(at)
        assert server.rss_bytes() < before + (16 << 20)
        assert "[uri_invalid]" in refused(client, "s3://x/" + "y" * 5000, f"file://{folders}/write/out")


BAD_PREFIXES = {"a relative path": "models", "a path that is not there": "/no/such/folder", "an unknown scheme": "ftp://x"}


@pytest.mark.parametrize("what", BAD_PREFIXES)
def test_a_prefix_that_is_none_is_told_before_anybody_is_let_in(what):
    ended = cli.run("serve", "--listen", "127.0.0.1:0", "--allow-read", BAD_PREFIXES[what])
    cli.check_refusal(ended, 2, BAD_PREFIXES[what])
    assert not ended.out


def test_a_variable_that_is_set_to_nothing_allows_nothing(fresh_server, folders):
    server = fresh_server(env={"QUARREL_ALLOW_READ": "", "QUARREL_ALLOW_WRITE": ""})
    with wire.connect(server.location) as client:
        assert "[uri_not_allowed]" in refused(client, f"file://{folders}/read/model", f"file://{folders}/write/out")


def test_a_bucket_without_credentials_is_told_as_denied(fresh_server, folders, model):
    """The web server answers as stores do that do not know who asks."""
    with stores.serving(stores.Closed) as (_, url):
        server = fresh_server("--allow-read", url, "--allow-write", folders / "write")
        with wire.connect(server.location) as client:
            job = ended(client, submit(client, f"{url}/model.safetensors", f"file://{folders}/write/out.safetensors"))
    assert (job["state"], job["reason"]) == ("failed", "storage_denied"), job


def test_a_server_that_ends_while_a_store_is_read_says_nothing_of_panics(fresh_server, s3, folders, large):
    prefix = "ending"
    source = s3.put(folders / "read/large", prefix)
    server = fresh_server("--allow-read", source, "--allow-write", "s3://models/ended", "--drain-seconds", 0, env=s3.environment())
    with wire.connect(server.location) as client:
        job = submit(client, source, "s3://models/ended/out")
        reaches(client, job, lambda found: found["state"] != "running" or found["bytes_done"] > 0)
    assert server.stop(SECONDS_MAX) == 0
    assert not server.faults() and "panicked" not in server.logs()


def test_a_gguf_file_becomes_the_one_that_the_command_line_makes(client, folders):
    source = ggufs.Llama(layers=1).write(folders / "read/model.gguf")
    job = done(client, source.as_uri(), (folders / "write/made.gguf").as_uri(), {"quantize": {"scheme": "Q4_K_M"}})
    assert job["summary"]["layers_quantized"] == 9
    cli.quantize(source, folders / "made.gguf", "-s", "Q4_K_M")
    assert (folders / "write/made.gguf").read_bytes() == (folders / "made.gguf").read_bytes()
    assert [path.name for path in (folders / "write").iterdir()] == ["made.gguf"]


@pytest.mark.parametrize("command, reason", [
    ({"scheme": "W4A16"}, "scheme_unknown"), ({"scheme": "Q4_K", "group_size": 32}, "option_conflict"), ({"profile": "cloud"}, "option_invalid"),
    ({"scheme": "IQ2_XXS"}, "scheme_unknown"),
])
def test_a_gguf_sink_has_types_of_gguf(command, reason, client, folders):
    with pytest.raises(REFUSED, match=rf"\[{reason}\]"):
        submit(client, (folders / "read/model").as_uri(), (folders / "write/made.gguf").as_uri(), {"quantize": command})


def test_a_model_becomes_gguf_with_the_metadata_of_another_file(client, folders):
    bare = llamas.Family(layers=1).write(folders / "read/llama")
    given = folders / "read/given.gguf"
    cli.quantize(bare, given, "-s", "F16")
    shutil.rmtree(folders / "write")
    (folders / "write").mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (bare / name).unlink()
    asked = {"quantize": {"scheme": "Q8_0"}}
    sink = (folders / "write/made.gguf").as_uri()
    failed = ended(client, submit(client, bare.as_uri(), sink, asked))
    assert failed["state"] == "failed" and "it has no tokenizer" in failed["message"]
    done(client, bare.as_uri(), sink, asked, metadata=given.as_uri())
    cli.quantize(given, folders / "expected.gguf", "-s", "Q8_0")
    assert (folders / "write/made.gguf").read_bytes() == (folders / "expected.gguf").read_bytes()
    with pytest.raises(REFUSED, match=r"\[uri_not_allowed\]"):
        submit(client, bare.as_uri(), sink, asked, metadata=(folders / "expected.gguf").as_uri())
    with pytest.raises(REFUSED, match=r"\[option_conflict\]"):
        submit(client, bare.as_uri(), (folders / "write/model").as_uri(), metadata=given.as_uri())
