"""Azure's blob storage, as Microsoft's own emulator has it: Azurite, from npm, on loopback. `make test-interop`.

For Google's there is no emulator in the registries that speaks the XML interface, which object_store uses: `gs://` is not tried.
"""

import base64
import datetime
import hashlib
import hmac
import http.client
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from harness import cli
from harness.model import write_model
from harness.server import eventually

AZURITE = Path(sys.prefix) / "azurite/node_modules/.bin/azurite-blob"
# The emulator's own, as its documentation has them.
ACCOUNT = "devstoreaccount1"
KEY = base64.b64decode("Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==")

pytestmark = pytest.mark.skipif(not AZURITE.exists(), reason="Azurite is not installed: it needs npm")


class Azure:
    def __init__(self, port: int):
        self.port = port

    def request(self, verb: str, path: str, query: str = "") -> tuple[int, bytes]:
        """Signed by hand: what it says of our blobs is not what our client says."""
        date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        resource = f"/{ACCOUNT}/{ACCOUNT}/{path}" + "".join(f"\n{pair.replace('=', ':')}" for pair in sorted(query.split("&")) if pair)
        signed = f"{verb}{chr(10) * 12}x-ms-date:{date}\nx-ms-version:2021-08-06\n{resource}"
        signature = base64.b64encode(hmac.new(KEY, signed.encode(), hashlib.sha256).digest()).decode()
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request(verb, f"/{ACCOUNT}/{path}" + (f"?{query}" if query else ""), headers=headers | ({"Content-Length": "0"} if verb == "PUT" else {}))
        answer = connection.getresponse()
        return answer.status, answer.read()

    def is_up(self) -> bool:
        with socket.socket() as it:
            return it.connect_ex(("127.0.0.1", self.port)) == 0

    def get(self, key: str) -> bytes:
        status, body = self.request("GET", f"models/{key}")
        assert status == 200, (key, status, body[:200])
        return body

    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.port}"
        return cli.environment(AZURE_STORAGE_USE_EMULATOR="true", AZURE_ALLOW_HTTP="true", AZURITE_BLOB_STORAGE_URL=url)


@pytest.fixture(scope="module")
def azure(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [AZURITE, "--silent", "--disableTelemetry", "--location", tmp_path_factory.mktemp("azurite"), "--blobPort", str(port)]
    process = subprocess.Popen([*map(str, command), "--skipApiVersionCheck"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        azure = Azure(port)
        eventually(azure.is_up, seconds=60, what="Azurite")
        assert azure.request("PUT", "models", "restype=container")[0] == 201
        yield azure
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    cli.quantize(model, out, "-s", "NVFP4A16")
    made = (path for path in out.rglob("*") if path.is_file() and path.name != "quarrel.report.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in made}


def test_a_model_to_a_container_within_it_and_back(azure, model, expected, tmp_path):
    env = azure.environment()
    cli.quantize(model, "az://models/out", "-s", "NVFP4A16", env=env)
    assert {name: azure.get(f"out/{name}") for name in expected} == expected
    cli.done("dequantize", "az://models/out", "az://models/dense", env=env)
    cli.done("dequantize", "az://models/out", tmp_path / "dense", env=env)
    for path in (tmp_path / "dense").glob("*.safetensors"):
        assert azure.get(f"dense/{path.name}") == path.read_bytes()
    assert "NVFP4A16" in cli.done("inspect", "az://models/out", env=env).out


def test_a_large_file_in_parts(azure, tmp_path):
    weights = np.random.default_rng(0).normal(size=(4096, 3000)).astype(np.float32)
    cli.write(tmp_path / "large.safetensors", {"a.weight": weights})
    cli.quantize(tmp_path / "large.safetensors", "az://models/large.safetensors", "-s", "W8A8", env=azure.environment())
    cli.quantize(tmp_path / "large.safetensors", tmp_path / "expected.safetensors", "-s", "W8A8")
    assert azure.get("large.safetensors") == (tmp_path / "expected.safetensors").read_bytes()


def test_killed_at_any_moment_the_same_command_makes_the_same_blobs(azure, model, expected):
    env, moments = azure.environment(), random.Random(5)
    began = time.monotonic()
    cli.quantize(model, "az://models/undisturbed", "-s", "NVFP4A16", env=env)
    seconds = time.monotonic() - began
    for at in range(10):
        with cli.Running("quantize", model, f"az://models/killed{at}", "-s", "NVFP4A16", env=env) as running:
            time.sleep(moments.random() * seconds)  # the moment itself
            running.send(signal.SIGKILL)
        ended = cli.run("quantize", model, f"az://models/killed{at}", "-s", "NVFP4A16", env=env)
        assert ended.code in (0, 2), ended.err  # 2: it was complete
        assert {name: azure.get(f"killed{at}/{name}") for name in expected} == expected


def test_what_is_not_there_and_who_may_not_are_told(azure, model):
    ended = cli.run("quantize", "az://models/nothing", "az://models/x", "-s", "int8", env=azure.environment())
    assert ended.code != 0 and "az://models/nothing" in ended.err
    wrong = azure.environment() | {"AZURITE_BLOB_STORAGE_URL": "http://127.0.0.1:9"}
    ended = cli.run("quantize", model, "az://models/x", "-s", "int8", env=wrong)
    assert ended.code != 0 and "az://models/x" in ended.err and "AZURE_" in ended.err
