"""A GGUF file becomes the file that `llama-quantize` makes of it, byte for byte. `gguf_files.py` says how the digests were made."""

import json
from pathlib import Path

import pytest

from golden import ggufs
from golden.gguf_files import digest
from harness import cli

DOCUMENT = json.loads((Path(__file__).resolve().parent / "files" / "gguf_files.json").read_text())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ggufs")
    return {name: model.write(folder / f"{name}.gguf") for name, model in ggufs.MODELS.items()}


def test_the_models_are_those_that_llama_cpp_was_given(sources):
    assert {name: digest(path) for name, path in sources.items()} == DOCUMENT["sources"]
    assert all(set(made) == set(ggufs.MIXES) for made in DOCUMENT["files"].values())


@pytest.mark.parametrize("mix", [*ggufs.MIXES, *ggufs.ALIASES])
@pytest.mark.parametrize("name", ggufs.MODELS)
def test_a_file_becomes_the_one_that_llama_quantize_makes(name, mix, sources, tmp_path):
    cli.quantize(sources[name], tmp_path / "made.gguf", "-s", mix)
    assert digest(tmp_path / "made.gguf") == DOCUMENT["files"][name][ggufs.ALIASES.get(mix, mix)]


@pytest.mark.parametrize("name, mix, to", ggufs.AGAIN)
def test_blocks_become_others_by_way_of_what_they_decode_to(name, mix, to, sources, tmp_path):
    cli.quantize(sources[name], tmp_path / "made.gguf", "-s", mix)
    cli.quantize(tmp_path / "made.gguf", tmp_path / "again.gguf", "-s", to)
    assert digest(tmp_path / "again.gguf") == DOCUMENT["again"][f"{name}, {mix}, {to}"]
