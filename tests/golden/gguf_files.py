"""Writes files/gguf_files.json: digests of the files that `llama-quantize` makes of small Llama models, one for each mix.

`make golden` runs it; `llama.py` is the oracle.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from golden import ggml, ggufs, llama  # noqa: E402
from golden.minilm import sha256  # noqa: E402

FILE = Path(__file__).resolve().parent / "files" / "gguf_files.json"


def main():
    oracle = llama.LlamaCpp(llama.built())
    document = {"package": ggml.PACKAGE, "sources": {}, "files": {}, "again": {}}
    with tempfile.TemporaryDirectory() as folder:
        source, made, again = (Path(folder) / name for name in ("source.gguf", "made.gguf", "again.gguf"))
        for name, model in ggufs.MODELS.items():
            model.write(source)
            document["sources"][name] = digest(source)
            for mix, number in ggufs.MIXES.items():
                oracle.quantize(source, made, number)
                document["files"].setdefault(name, {})[mix] = digest(made)
                for _, _, to in (entry for entry in ggufs.AGAIN if entry[:2] == (name, mix)):
                    oracle.quantize(made, again, ggufs.MIXES[to])
                    document["again"][f"{name}, {mix}, {to}"] = digest(again)
    FILE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def digest(path: Path) -> str:
    return sha256(path.read_bytes())[:16]


if __name__ == "__main__":
    main()
