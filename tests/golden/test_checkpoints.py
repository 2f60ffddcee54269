"""`quarrel quantize SRC DST` writes the tensors that compressed-tensors writes: names, dtypes, shapes and bytes.

README.md says what the files hold and how they were made. What is written is read with plain json, not with our code.
"""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from safetensors import safe_open

from golden import minilm
from harness.server import binary

CHECKPOINTS = Path(__file__).resolve().parent / "files" / "checkpoints"


@cache
def document() -> dict:
    return json.loads((CHECKPOINTS / "expected.json").read_text())


def small():
    """(dtype, arith, scheme) of what is made of the small model."""
    for dtype, ariths in document()["small"].items():
        for arith, schemes in ariths.items():
            for scheme in schemes:
                yield pytest.param(dtype, arith, scheme, id=f"{dtype}-{arith}-{scheme}")


@pytest.mark.parametrize("dtype, arith, scheme", list(small()))
def test_a_written_checkpoint_equals_compressed_tensors(dtype, arith, scheme, tmp_path):
    written = quantized(CHECKPOINTS / f"source-{dtype}.safetensors", tmp_path, scheme, arith)

    check(written, document()["small"][dtype][arith][scheme], CHECKPOINTS / f"{dtype}-{arith}-{scheme}.safetensors")


@pytest.mark.parametrize("scheme", document()["minilm"]["made"])
def test_a_real_checkpoint_equals_compressed_tensors(scheme, tmp_path):
    source = minilm.fetched()
    assert minilm.sha256(source.read_bytes()) == document()["minilm"]["source"], "not the model of expected.json"

    written = quantized(source, tmp_path, scheme, "f32")

    check(written, document()["minilm"]["made"][scheme])


@pytest.mark.parametrize("scheme", document()["small"]["bf16"]["f32"])
def test_safetensors_opens_what_is_written(scheme, tmp_path):
    """It refuses a header whose offsets leave gaps, overlap, or do not fit dtype and shape."""
    written = quantized(CHECKPOINTS / "source-bf16.safetensors", tmp_path, scheme, "f32")

    with safe_open(written, "numpy") as opened:
        views = {name: opened.get_slice(name) for name in opened.keys()}
        found = {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
    expected = document()["small"]["bf16"]["f32"][scheme]
    assert found == {name: (tensor["dtype"], tensor["shape"]) for name, tensor in expected.items()}


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*-*-*.safetensors")), ids=lambda path: path.stem)
def test_the_whole_files_are_those_of_the_hashes(path):
    dtype, arith, scheme = path.stem.split("-", 2)
    check(path, document()["small"][dtype][arith][scheme])


def quantized(source: Path, folder: Path, scheme: str, arith: str) -> Path:
    """Runs the command. f32 is the default of `--arith`, and is left to it."""
    destination = folder / "quantized.safetensors"
    flags = ["--scheme", scheme] + (["--arith", arith] if arith != "f32" else [])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("QUARREL_")}
    command = [binary(), "quantize", source, destination, *flags]
    ended = subprocess.run(command, env=inherited, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == 0, f"exit code {ended.returncode}:\n{ended.stderr[-4000:]}"
    return destination


# -- reading and comparing --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Tensor:
    """A tensor as it lies in the file."""

    dtype: str
    shape: list[int]
    data: bytes


def read(path: Path) -> dict[str, Tensor]:
    """Eight bytes of length, a JSON header, and what its offsets point to."""
    file = path.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = Tensor(entry["dtype"], entry["shape"], file[start + begin : start + end])
    return found


def check(path: Path, expected: dict[str, dict], whole: Path | None = None):
    """The tensors of `expected`, or a failure that names each that differs, and the byte if `whole` can tell."""
    found = read(path)
    known = read(whole) if whole and whole.exists() else {}
    wrong = [f"{name} is not there" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} should not be there" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        tensor, wanted = found[name], expected[name]
        if (tensor.dtype, tensor.shape) != (wanted["dtype"], wanted["shape"]):
            wrong.append(f"{name} is {tensor.dtype} {tensor.shape}, expected {wanted['dtype']} {wanted['shape']}")
        elif hashlib.sha256(tensor.data).hexdigest() != wanted["sha256"]:
            wrong.append(f"{name}: bytes differ{first_difference(tensor, known.get(name))}")
    if wrong:
        pytest.fail("\n".join([f"{len(wrong)} of {len(expected)} tensors:", *wrong]), pytrace=False)


def first_difference(got: Tensor, expected: Tensor | None) -> str:
    if expected is None:
        return ""
    if len(got.data) != len(expected.data):
        return f": {len(got.data)} of them, expected {len(expected.data)}"
    different = [at for at, (one, other) in enumerate(zip(got.data, expected.data)) if one != other]
    at = different[0]
    one, other = got.data[at], expected.data[at]
    return f" at {len(different)} of {len(expected.data)}, first at {at}: {one:#04x}, expected {other:#04x}"
