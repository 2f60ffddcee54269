"""Writes files/llama_files.json: what llama.cpp's own converter makes of small models of the Llama family, as transformers saves them.

`make golden` runs it, in the environment of generate.py. The converter tells the way text is cut before byte-level BPE by a digest of tokens, and knows
that of no small tokenizer: it is told.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from golden import ggml, ggufs, llamas  # noqa: E402
from golden.minilm import sha256  # noqa: E402

FILE = Path(__file__).resolve().parent / "files" / "llama_files.json"
# Of the converter alone: it looks at the folder's name and counts parameters.
ITS_OWN = ("general.name", "general.size_label", "general.basename", "general.finetune", "general.version")

CONVERT = """
import runpy, sys
source = sys.argv[1]
sys.path[:0] = [source + "/gguf-py", source]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(source + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def main():
    document = {"package": ggml.PACKAGE, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = ggml.sources(folder)
        for name, model in llamas.MODELS.items():
            if model.tokenizer == "fallback":
                continue
            made = folder / f"{name}.gguf"
            ggml.run(sys.executable, "-c", CONVERT, source, model.write(folder / name), "--outtype", model.dtype, "--outfile", made)
            document["models"][name] = told(ggufs.read(made))
    FILE.write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def told(file: ggufs.File) -> dict:
    """Long lists as digests; of tensors type, shape and the digest of their bytes."""
    keys = {key: digest(json.dumps(value).encode()) if isinstance(value, list) else value for key, value in file.keys.items() if key not in ITS_OWN}
    tensors = {name: f"{kind} {list(shape)} {digest(data)}" for name, (kind, shape, data) in file.tensors.items()}
    return {"keys": keys, "tensors": tensors}


def digest(data: bytes) -> str:
    return sha256(data)[:16]


if __name__ == "__main__":
    main()
