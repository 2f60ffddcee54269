"""What llm-compressor's `model_free_ptq` makes of a small Llama: a digest of every tensor, for `test_model_free.py`.

The peer runs in an environment of its own (`make golden` makes it; its pins stand in tests/load/checkpoint_peer/requirements.txt). Its bytes
would be 40 MB; kept are type, shape and SHA-256 of each tensor, so the test says which tensor differs, not where in it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "tests"))

from golden import cases  # noqa: E402
from harness import cli  # noqa: E402
from harness.model import BF16, CONFIG, tensors, write_model  # noqa: E402

FILE = REPOSITORY / "tests/golden/files/model_free_ptq.json"
PEER = REPOSITORY / "tests/load/checkpoint_peer/ptq.py"
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "INT8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "MXFP8A16")
VERSIONS = "import importlib.metadata as m, json; print(json.dumps({name: m.version(name) for name in " \
           "('llmcompressor', 'compressed-tensors', 'torch', 'safetensors')}))"


# A model with experts in one tensor. Not NVFP4A16: it gives gate and up of an expert two global scales, where llm-compressor's own `oneshot`
# (FUSED_LAYER_NAMES) and inference engines have one, as we do.
EXPERTS = 3
EXPERT_SCHEMES = ("W4A16", "FP8_DYNAMIC")


def experts() -> dict[str, np.ndarray]:
    """Of a layer: gate and up of each expert one under the other, and down."""
    def normal(name, shape):
        return (cases.normal(cases.generator(f"experts {name}"), shape) * 0.05).astype(BF16)

    name = "model.layers.0.mlp.experts"
    return {f"{name}.gate_up_proj": normal("gate_up", (EXPERTS, 768, 256)), f"{name}.down_proj": normal("down", (EXPERTS, 256, 384))}


def write_mixture(folder: Path) -> Path:
    """The small Llama with experts beside its own layers."""
    folder.mkdir(parents=True)
    cli.write(folder / "model.safetensors", tensors() | experts())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def digests(folder: Path) -> dict[str, list]:
    """Of every tensor in a folder: type, shape, SHA-256 of its bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            digest = hashlib.sha256(data[start + begin : start + end]).hexdigest()
            found[name] = [entry["dtype"], entry["shape"], digest]
    return dict(sorted(found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="the python that has llm-compressor")
    peer = parser.parse_args().peer
    versions = json.loads(subprocess.run([peer, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = write_model(Path(folder) / "model", shards=1)
        mixture = write_mixture(Path(folder) / "mixture")
        for key, source, schemes in [("schemes", source, SCHEMES), ("experts", mixture, EXPERT_SCHEMES)]:
            found[key] = {}
            for scheme in schemes:
                made = Path(folder) / f"{key}-{scheme}"
                ended = subprocess.run([peer, PEER, source, made, scheme], capture_output=True, text=True)
                if ended.returncode:
                    sys.exit(f"{scheme}: the peer failed:\n{ended.stderr[-3000:]}")
                found[key][scheme] = digests(made)
                print(f"{key}, {scheme}: {len(found[key][scheme])} tensors")
    FILE.write_text(json.dumps({"versions": versions} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
