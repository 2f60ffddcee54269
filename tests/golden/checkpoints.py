"""Checkpoints for `quarrel quantize`: a small model in three dtypes, MiniLM, and which modules of each are quantized.

The recipe that the command line follows: every `*.weight` of rank 2 or more but for what `@standard` names
(proto/SPEC.md) and what a group does not divide. It is told here as names, so that no matcher has a hand in it.
"""

import re

import numpy as np

import cases

PRESETS = ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "INT8", "FP8_DYNAMIC", "FP8_BLOCK", *cases.MICROSCALED)
PLAIN = (
    "int2/g32", "int3/channel", "int4-asym/g32", "int4-asym/tensor", "int6/tensor", "int8/g64", "int8-asym/channel",
    "fp8/tensor",
)
SCHEMES = (*PRESETS, *PLAIN)
# What is made of the small model: arithmetic and schemes by dtype.
MADE = {
    "f32": {"f32": SCHEMES},
    "f16": {"f32": SCHEMES},
    "bf16": {"f32": SCHEMES, "weight-dtype": ("W4A16", "W4A16_ASYM", "W8A8")},
}
# Of these the whole file is kept, from bf16 in f32, so that a difference can be looked at.
KEPT_WHOLE = ("W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "NVFP4A16")
MINILM_SCHEMES = ("W4A16", "W8A8", "NVFP4A16", "MXFP4A16")

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
# Outputs and inputs of the modules that are quantized. Zero points are packed along the outputs: 60, 20 and 12 fill no
# whole words of int4. 130 x 256 is two blocks of 128 in both directions, 12 x 100 less than one.
QUANTIZED = {
    f"{ATTENTION}.q_proj": (130, 256),
    f"{ATTENTION}.k_proj": (60, 256),
    f"{ATTENTION}.v_proj": (20, 256),
    f"{ATTENTION}.o_proj": (12, 256),
    f"{MLP}.gate_proj": (8, 256),
    f"{MLP}.up_proj": (8, 256),
    f"{MLP}.down_proj": (24, 128),
    # Columns that neither 128 nor 64 nor 32 divides: kept by schemes with groups.
    "model.projector.linear": (12, 100),
}
# Modules that share an NVFP4 global scale, as llm-compressor has it (its FUSED_LAYER_NAMES). MiniLM has none by these names.
FUSED = (
    [f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{ATTENTION}.v_proj"],
    [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
)
KEPT = {
    # `@standard`, by one of its globs each.
    "model.embed_tokens.weight": (8, 256),
    "lm_head.weight": (8, 256),
    "model.norm.weight": (256,),
    "model.layers.0.input_layernorm.weight": (256,),
    f"{ATTENTION}.q_norm.weight": (32,),
    # Not named `*.weight`, whatever the rank.
    f"{ATTENTION}.q_proj.bias": (130,),
    f"{MLP}.experts.gate_up_proj": (2, 4, 128),
    # Rank 1, though no glob names it.
    f"{ATTENTION}.scale.weight": (4,),
}
# `@standard` has `*mlp.gate`, which must not take mlp.gate_proj along. A router often stays f32 in a bf16 checkpoint.
ROUTER = f"{MLP}.gate.weight"
POSITIONS = f"{ATTENTION}.rotary_emb.position_ids"

# The rest of MiniLM is embeddings and LayerNorm, which `@standard` names, biases, and one i64 buffer.
MINILM_QUANTIZED = re.compile(r"(encoder\.layer\.\d\..*\.(query|key|value|dense)|pooler\.dense)\.weight")


def tensors(dtype: str) -> dict[str, np.ndarray]:
    """The small model, every float but the router's in `dtype`."""
    floats = {f"{module}.weight": shape for module, shape in QUANTIZED.items()} | KEPT
    model = {name: cases.stored(values(name, shape), dtype) for name, shape in floats.items()}
    model[ROUTER] = cases.stored(values(ROUTER, (4, 128)), "f32")
    model[POSITIONS] = np.arange(16).reshape(1, 16)
    return model


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal, one row in four stronger; the hard ones are in cases.py. What must end up in a file is here."""
    drawn = cases.normal(cases.generator(f"checkpoint {name}"), shape) * 0.05
    drawn[::4] *= 8
    match name.removesuffix(".weight").rpartition(".")[2]:
        case "k_proj":  # scales of zero, which become an epsilon, and -0.0, which FP8 keeps
            drawn[1] = 0
            drawn[2, :128] = -0.0
        case "v_proj":  # zero points at one end
            drawn = np.abs(drawn)
        case "up_proj":  # and at the other
            drawn = -np.abs(drawn)
    return drawn
