"""What a new user does, in a fresh virtual environment: install, three lines, a real model, a progress bar and a table."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from harness.server import binary

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from demo import models  # noqa: E402

THREE_LINES = """\
import quarrel
with quarrel.connect({address}) as client:
    layers = client.quantize("model.safetensors", scheme="W4A16", progress=True).collect()
    print(layers.table())
import hashlib, json, sys
digests = {{layer.name: hashlib.sha256(layer.packed).hexdigest() for layer in layers.values() if layer.scheme}}
print(json.dumps(digests), file=sys.stderr)
assert not {{"torch", "ml_dtypes", "safetensors"}} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The Python of a new virtual environment that has the package and what it needs, from the checkout's sources alone."""
    folder = tmp_path_factory.mktemp("fresh")
    # A copy: pip builds in place, and leaves what it made.
    shutil.copytree(REPOSITORY / "client/python", folder / "python", ignore=shutil.ignore_patterns("*.egg-info", "build"))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, folder / "python"], check=True)
    return folder / "venv/bin/python"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(models.minilm() / "model.safetensors")
    return tmp_path


def run(python, place, code):
    path = os.pathsep.join([str(binary().parent.resolve()), "/usr/bin", "/bin"])
    (place / "three_lines.py").write_text(code)
    done = subprocess.run(
        [python, "-W", "error", "three_lines.py"], cwd=place, capture_output=True, text=True, timeout=300,
        env={"PATH": path, "HOME": str(place)},
    )
    assert done.returncode == 0, done.stderr
    *shown, digests = done.stderr.splitlines()
    return done.stdout, shown, json.loads(digests)


def test_three_lines_quantize_a_model_with_a_bar_and_a_table(fresh, place):
    table, progress, digests = run(fresh, place, THREE_LINES.format(address=""))
    assert "encoder.layer.0.intermediate.dense.weight" in table and "37 quantized" in table
    assert "91 of 91 MB" in progress[-1], progress
    assert len(digests) == 37


def test_the_command_line_and_a_server_elsewhere_give_the_same_codes(fresh, place, server):
    *_, elsewhere = run(fresh, place, THREE_LINES.format(address=repr(server.location)))
    done = subprocess.run(
        [binary(), "quantize", "model.safetensors", "w4a16.safetensors", "--scheme", "W4A16"], cwd=place,
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "W4A16" in done.stdout and "37 quantized" in done.stdout

    file = load_file(place / "w4a16.safetensors")
    name = "{}.weight_packed".format
    digests = {layer: hashlib.sha256(file[name(layer.removesuffix(".weight"))]).hexdigest() for layer in elsewhere}
    assert digests == elsewhere
