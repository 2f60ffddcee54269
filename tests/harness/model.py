"""A small Llama, as a folder: fused layers in different files, and beside it what is not of it."""

import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from golden import cases
from harness import cli

BF16 = ml_dtypes.bfloat16
INDEX = "model.safetensors.index.json"
LAYERS = 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": True, "vocab_size": 512,
}
OTHERS = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}", "assets/notes.md": b"# Notes"}
# What is beside the model and is not of it.
STRANGERS = {"pytorch_model.bin": b"dense", "onnx/model.onnx": b"dense", ".git/HEAD": b"ref"}


def tensors() -> dict[str, np.ndarray]:
    """A small Llama, in the order of its layers. The arrays are everybody's."""
    return dict(_tensors())


@functools.cache
def _tensors() -> dict[str, np.ndarray]:
    def normal(name, shape):
        return (cases.normal(cases.generator(f"folder {name}"), shape) * 0.05).astype(BF16)

    found = {"model.embed_tokens.weight": normal("embed", (512, 256))}
    for at in range(LAYERS):
        layer = f"model.layers.{at}"
        for name, shape in [("self_attn.q_proj", (256, 256)), ("self_attn.k_proj", (128, 256)),
                            ("self_attn.v_proj", (128, 256)), ("self_attn.o_proj", (256, 256)),
                            ("mlp.gate_proj", (512, 256)), ("mlp.up_proj", (512, 256)), ("mlp.down_proj", (256, 512))]:
            found[f"{layer}.{name}.weight"] = normal(f"{at} {name}", shape)
        found[f"{layer}.input_layernorm.weight"] = np.ones(256, BF16)
        found[f"{layer}.post_attention_layernorm.weight"] = np.ones(256, BF16)
    return found | {"model.norm.weight": np.ones(256, BF16)}


def write_model(folder: Path, *, shards=3, **config) -> Path:
    """Fused layers lie in different files."""
    names = list(tensors())
    homes = {name: f"model-{at % shards + 1:05}-of-{shards:05}.safetensors" for at, name in enumerate(names)}
    if shards == 1:
        homes = dict.fromkeys(names, "model.safetensors")
    folder.mkdir(parents=True)
    for file in sorted(set(homes.values())):
        cli.write(folder / file, {name: tensors()[name] for name in names if homes[name] == file})
    if shards > 1:
        total = sum(array.nbytes for array in tensors().values())
        metadata = {"total_size": total, "total_parameters": 1}
        (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": homes}))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    for name, data in (OTHERS | STRANGERS).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder; the report without what differs from run to run."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = {name: data for name, data in found.items() if not name.startswith(".quarrel.done/")}
    if report := found.pop("quarrel.report.json", None):
        told = json.loads(report)
        told.pop("seconds"), told.pop("destination"), told.pop("server"), told.pop("source")
        found["report"] = json.dumps(told).encode()
    return found
