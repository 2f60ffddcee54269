"""URIs as sources and destinations: the same bytes as from and to a disk, whatever the store does meanwhile."""

import random
import re
import signal
import time

import ml_dtypes
import numpy as np
import pytest

from harness import cli, stores
from harness.model import INDEX, files, tensors


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """What a disk has of it at NVFP4A16, whose layers share scales over files."""
    out = tmp_path_factory.mktemp("expected") / "out"
    cli.quantize(model, out, "-s", "NVFP4A16")
    return files(out)


@pytest.fixture
def env(s3):
    return cli.environment(**s3.environment())


def check(s3, prefix, folder, expected):
    assert files(s3.fetch(prefix, folder)) == expected
    assert not s3.unfinished()


def test_from_a_store_to_a_store_and_to_and_from_a_disk(s3, env, model, expected, tmp_path):
    source = s3.put(model, "plain")
    cli.quantize(source, f"s3://{stores.BUCKET}/out/plain", "-s", "NVFP4A16", env=env)
    check(s3, "out/plain", tmp_path / "fetched", expected)
    cli.quantize(source + "/", tmp_path / "disk", "-s", "NVFP4A16", env=env)
    assert files(tmp_path / "disk") == expected
    cli.quantize(f"file://{model}", f"s3://{stores.BUCKET}/out/uploaded", "-s", "NVFP4A16", env=env)
    check(s3, "out/uploaded", tmp_path / "uploaded", expected)


def test_back_to_dense_and_looked_at(s3, env, model, tmp_path):
    source, coded = s3.put(model, "around"), f"s3://{stores.BUCKET}/around-coded"
    estimated = cli.done("estimate", source, "-s", "W4A16", "--json", env=env).json
    made = cli.quantize(source, coded, "-s", "W4A16", "--json", env=env).json
    assert estimated["destination_bytes"][0] == made["totals"]["destination_bytes"] - header_bytes(s3, "around-coded")
    cli.done("dequantize", coded, tmp_path / "dense", env=env)
    cli.quantize(model, tmp_path / "coded", "-s", "W4A16")
    cli.done("dequantize", tmp_path / "coded", tmp_path / "expected")
    assert files(tmp_path / "dense") == files(tmp_path / "expected")
    shard = next(key for key in s3.keys("around-coded") if key.endswith(".safetensors"))
    there = cli.done("inspect", f"{coded}/{shard}", "--json", env=env).json
    here = cli.done("inspect", tmp_path / "coded" / shard, "--json").json
    assert there.pop("file") == f"{coded}/{shard}" and here.pop("file")
    assert there == here


def header_bytes(s3, prefix):
    shards = [key for key in s3.keys(prefix) if key.endswith(".safetensors")]
    return sum(8 + int.from_bytes(s3.get(f"{prefix}/{key}")[:8], "little") for key in shards)


def test_one_file_and_its_report(s3, env, tmp_path):
    cli.write(tmp_path / "one.safetensors", tensors())
    source = s3.put(tmp_path, "one") + "/one.safetensors"
    destination = f"s3://{stores.BUCKET}/one-out/a.safetensors"
    cli.quantize(source, destination, "-s", "W8A8", env=env)
    cli.quantize(tmp_path / "one.safetensors", tmp_path / "a.safetensors", "-s", "W8A8")
    assert sorted(s3.keys("one-out")) == ["a.report.json", "a.safetensors"]
    assert s3.get("one-out/a.safetensors") == (tmp_path / "a.safetensors").read_bytes()
    cli.check_refusal(cli.run("quantize", source, destination, "-s", "W4A16", env=env), 2, "exists", destination)
    assert s3.get("one-out/a.safetensors") == (tmp_path / "a.safetensors").read_bytes()
    cli.quantize(source, destination, "-s", "W4A16", "--force", env=env)
    assert s3.get("one-out/a.safetensors") != (tmp_path / "a.safetensors").read_bytes()


def test_large_files_are_sent_in_parts(s3, env, tmp_path):
    """40 MiB of codes: parts of 8."""
    weights = np.resize(np.arange(1 << 20, dtype=np.float32) / 997 - 500, (5, 1 << 23)).astype(ml_dtypes.bfloat16)
    cli.write(tmp_path / "large.safetensors", {"large.weight": weights})
    destination = f"s3://{stores.BUCKET}/large/out.safetensors"
    cli.quantize(tmp_path / "large.safetensors", destination, "-s", "int8", env=env)
    cli.quantize(tmp_path / "large.safetensors", tmp_path / "out.safetensors", "-s", "int8")
    assert s3.get("large/out.safetensors") == (tmp_path / "out.safetensors").read_bytes()
    with cli.Running("quantize", tmp_path / "large.safetensors", destination, "-s", "int8/tensor", "--force", env=env) as running:
        running.when(s3.unfinished, "parts are sent")
        running.send(signal.SIGTERM)
        ended = running.end()
    if ended.code != 0:  # it may have been sent by then
        assert ended.code == 143
        assert s3.get("large/out.safetensors") == (tmp_path / "out.safetensors").read_bytes()
    assert not s3.unfinished()


def test_a_store_that_fails_one_request_in_ten(s3, model, expected, tmp_path):
    source = s3.put(model, "failing")
    with stores.faulty(s3) as (proxy, endpoint):
        env = cli.environment(**s3.environment(endpoint))
        for at in range(3):
            cli.quantize(source, f"s3://{stores.BUCKET}/out/failing{at}", "-s", "NVFP4A16", env=env)
            check(s3, f"out/failing{at}", tmp_path / str(at), expected)
    print(f"failed: {proxy.failed}")
    assert all(proxy.failed.values()), proxy.failed


def test_killed_at_any_moment_the_same_command_makes_the_same_objects(s3, env, model, expected, tmp_path):
    source = s3.put(model, "killed")
    began = time.monotonic()
    cli.quantize(source, f"s3://{stores.BUCKET}/out/undisturbed", "-s", "NVFP4A16", env=env)
    seconds = time.monotonic() - began
    moments, resumed = random.Random(6), 0
    for at in range(20):
        prefix = f"out/killed{at}"
        with cli.Running("quantize", source, f"s3://{stores.BUCKET}/{prefix}", "-s", "NVFP4A16", env=env) as running:
            time.sleep(moments.random() * seconds)  # the moment itself
            running.send(signal.SIGKILL)
        left = s3.keys(prefix)
        resumed += any(key.startswith(".quarrel/unit-") for key in left)
        # What makes it a model comes last.
        assert "config.json" not in left or INDEX in left
        if "config.json" not in left or ".quarrel/job.json" in left:
            cli.quantize(source, f"s3://{stores.BUCKET}/{prefix}", "-s", "NVFP4A16", env=env)
        found = files(s3.fetch(prefix, tmp_path / str(at)))
        assert {name: data for name, data in found.items() if not name.startswith(".quarrel/")} == expected
    print(f"{resumed} of 20 runs had objects that were not made again")
    assert resumed, "no run was killed between two files"


def test_what_is_there_is_not_made_again(s3, env, model, expected, tmp_path):
    source, prefix = s3.put(model, "again"), "out/again"
    destination = f"s3://{stores.BUCKET}/{prefix}"
    ended = cli.run("quantize", source, destination, "-s", "NVFP4A16", "--sqnr-db-min", "99", env=env)
    assert ended.code == 7 and "config.json" not in s3.keys(prefix)
    shards = [key for key in s3.keys(prefix) if key.endswith(".safetensors")]
    assert len(shards) == 3
    cli.check_refusal(cli.run("quantize", source, destination, "-s", "W8A16", env=env), 2, "its command differs")
    s3.delete(f"{prefix}/{shards[0]}")
    with stores.faulty(s3, fails_every=0) as (proxy, endpoint):
        cli.quantize(source, destination, "-s", "NVFP4A16", env=cli.environment(**s3.environment(endpoint)))
    put = {path.rpartition("/")[2] for method, path in proxy.seen if method == "PUT"}
    assert put.isdisjoint(shards[1:]) and shards[0] in put
    check(s3, prefix, tmp_path / "out", expected)
    cli.check_refusal(cli.run("quantize", source, destination, "-s", "NVFP4A16", env=env), 2, "exists")
    s3.put(model, "again")  # the same bytes: the same source
    cli.quantize(source, destination, "-s", "NVFP4A16", "--force", env=env)
    check(s3, prefix, tmp_path / "forced", expected)


def test_a_model_on_the_web(model, expected, tmp_path):
    """It lists nothing: files of the usual names are found."""
    moved = {f"/moved/{path.name}": f"/{path.name}" for path in model.iterdir()}
    with stores.web(model, moved) as (_, url):
        for at, folder in enumerate([url, f"{url}/moved"]):
            cli.quantize(folder, tmp_path / str(at), "-s", "NVFP4A16")
            found = files(tmp_path / str(at))
            assert found.keys() == expected.keys() - {"assets/notes.md"}
            assert all(found[name] == data for name, data in expected.items() if name in found and name != "report")
        shard = next(model.glob("*.safetensors")).name
        assert cli.done("inspect", f"{url}/{shard}", "--json").json["tensors"]
        cli.check_refusal(cli.run("quantize", model, f"{url}/out", "-s", "int8"), 2, "it can be read only", url)


BAD = {
    "an unknown scheme": ("ftp://host/x", 2, "expected a URI of file, s3"),
    "memory": ("memory:///x", 2, "expected a URI of file, s3"),
    "a password": ("s3://someone:secret@models/x", 2, "expected those in the environment"),
    "a query": ("s3://models/x?versionId=3", 2, "it has a query"),
    "a file elsewhere": ("file://host/x", 2, "expected file:///PATH"),
    "nothing there": ("s3://models/nothing", 5, "s3://models/nothing"),
    "no bucket": ("s3://none-of-that/x", 5, "NoSuchBucket"),
    "parts of a path": ("s3://models/a%2F..%2Fb", 2, "a%2F..%2Fb"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("verb", ["quantize", "estimate", "inspect"])
def test_a_uri_that_leads_nowhere_is_told(what, verb, env, tmp_path):
    uri, code, says = BAD[what]
    args = {"quantize": (uri, tmp_path / "out", "-s", "int8"), "estimate": (uri, "-s", "int8"), "inspect": (uri,)}[verb]
    ended = cli.run(verb, *args, env=env)
    cli.check_refusal(ended, code, says)
    assert "secret" not in ended.err and not list(tmp_path.iterdir())


def test_a_store_that_is_not_there_is_told(s3, tmp_path):
    env = cli.environment(**s3.environment("http://bob:hunter2@127.0.0.1:9"))
    ended = cli.run("inspect", "s3://models/x", env=env)
    assert ended.code == 5 and not re.search("secret|hunter2|panicked", ended.err), ended.err
    for nonsense in ["nonsense", "ftp://x", "http://"]:
        cli.check_refusal(cli.run("inspect", "s3://models/x", env=cli.environment(**s3.environment(nonsense))), 2, "AWS_ENDPOINT")


@pytest.mark.parametrize("alias", ["S3://models/{0}", "s3://models/%6{1}", "s3://models/z/../{0}", "s3a://models/{0}", "s3://models/{0}/out"])
def test_no_other_name_of_the_source_is_a_destination(alias, s3, env, model):
    """0x6e is `n`."""
    prefix = f"n{abs(hash(alias))}"
    source = s3.put(model, prefix)
    ended = cli.run("quantize", source, alias.format(prefix, "e" + prefix[1:]), "-s", "W4A16", "--force", env=env)
    assert ended.code == 2 and ("one place" in ended.err or "within" in ended.err or "named twice" in ended.err), ended.err
    assert {key: s3.get(f"{prefix}/{key}") for key in s3.keys(prefix)} == files(model)


@pytest.mark.parametrize("alias", ["file://localhost{0}", "FILE://{0}", "file:{0}", "file://{0}/../model"])
def test_no_other_name_of_a_folder_is_a_destination(alias, model):
    before = files(model)
    ended = cli.run("quantize", model, alias.format(model), "-s", "W4A16", "--force")
    assert ended.code == 2, ended.err
    assert files(model) == before


def test_names_that_end_in_a_slash_are_folders(s3, env, tmp_path):
    cli.write(tmp_path / "one.safetensors", tensors())
    ended = cli.run("quantize", tmp_path / "one.safetensors", "s3://models/slash/", "-s", "int8", env=env)
    cli.check_refusal(ended, 2, "no name of a file")
    assert not s3.keys("slash")


def test_folders_that_a_console_has_made_are_folders(s3, env, model, expected, tmp_path):
    source = s3.put(model, "console/source")
    for marker in ["console/source/", "console/out/"]:
        s3.mark(marker)
    cli.quantize(source, "s3://models/console/out", "-s", "NVFP4A16", env=env)
    s3.delete("console/out/")
    check(s3, "console/out", tmp_path / "fetched", expected)


def test_no_room_for_temporary_files_is_told(env, model, tmp_path):
    ended = cli.run("quantize", model, "s3://models/no-room", "-s", "int8", env=env | {"TMPDIR": str(tmp_path / "gone")})
    cli.check_refusal(ended, 5, str(tmp_path / "gone"))


def test_a_source_that_goes_meanwhile_is_told_in_a_sentence(s3, env, tmp_path):
    weights = np.resize(np.arange(1 << 20, dtype=np.float32), (64, 1 << 20)).astype(ml_dtypes.bfloat16)
    cli.write(tmp_path / "one.safetensors", {"x.weight": weights})
    source = s3.put(tmp_path, "going") + "/one.safetensors"
    with cli.Running("quantize", source, tmp_path / "out.safetensors", "-s", "int8", env=env) as running:
        running.reaches(lambda: running.spooled_bytes() > 0)
        s3.delete("going/one.safetensors")
        ended = running.end()
    if ended.code != 0:  # it may have read all of it
        cli.check_refusal(ended, 5, "layer `x.weight` cannot be read from")
