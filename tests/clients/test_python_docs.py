"""Whatever the client's documentation shows runs as it stands: docstrings here, the README as a reader would run it."""

import asyncio
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import quarrel
from harness import cli
from harness.server import binary

PACKAGE = Path(__file__).resolve().parents[2] / "client/python"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^<!-- test: (\S+) -->\n```python\n(.*?)^```$", README, re.M | re.S))
MODULES = sorted(f"quarrel.{module.name}" for module in pkgutil.iter_modules([str(PACKAGE / "src/quarrel")]))


def weights(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def docstrings():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in ("quarrel", *MODULES):
        yield from (found for found in finder.find(importlib.import_module(module)) if found.examples)


DOCSTRINGS = {found.name: found for found in docstrings()}


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_an_example_of_a_docstring_gives_what_it_says(fresh_server, tmp_path, name):
    model = {"q_proj": weights((128, 256), 0), "up_proj": weights((256, 128), 1)}
    checkpoint = cli.write(tmp_path / "model.safetensors", {f"{layer}.weight": array for layer, array in model.items()})
    server = fresh_server("--allow-read", tmp_path, "--allow-write", tmp_path)
    with quarrel.connect(server.location) as client:
        names = {"quarrel": quarrel, "np": np, "asyncio": asyncio, "client": client, "model": model,
                 "address": server.location, "checkpoint": checkpoint, "folder": tmp_path}
        example = DOCSTRINGS[name]
        example.globs = names
        printed = []
        found = doctest.DocTestRunner().run(example, out=printed.append, clear_globs=False)
    assert found.attempted and not found.failed, "".join(printed)


def test_what_callers_use_most_has_an_example():
    assert {"quarrel", "quarrel.client.connect", "quarrel.client.Client.quantize", "quarrel.client.Client.dequantize",
            "quarrel.aio", "quarrel.errors.Error", "quarrel.results.Results"} <= set(DOCSTRINGS)


def test_every_public_name_is_documented():
    for name in quarrel.__all__:
        item = getattr(quarrel, name)
        assert item.__doc__, name
        for attribute, value in vars(item).items() if isinstance(item, type) else ():
            if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                assert value.__doc__, f"{name}.{attribute}"


def test_every_block_of_the_readme_is_an_example():
    assert README.count("```python") == README.count("<!-- test:") == len(EXAMPLES) > 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_readme_runs_as_printed(tmp_path, name):
    layers = {"model.q_proj.weight": weights((256, 512), 0), "model.norm.weight": weights((512,), 1)}
    save_file(layers, tmp_path / "model.safetensors")
    (tmp_path / "quarrel").symlink_to(binary())
    (tmp_path / "example.py").write_text(EXAMPLES[name], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "src"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-W", "error", "example.py"], cwd=tmp_path, env=environment, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "a reader would not see that it worked"
