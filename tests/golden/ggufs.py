"""Small Llama models as GGUF files, and how files are read without our code. Shared by gguf_files.py and test_gguf_files.py.

The writer is the format's page as plain Python: that llama.cpp reads what it writes is shown by every digest of gguf_files.json.
"""

import struct
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from golden import blocks, cases

# What `llama-quantize` can be asked for and needs no importance matrix, with its number.
MIXES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ4_NL": 25, "MXFP4_MOE": 38,
}
# What `llama-quantize` takes for others.
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
TYPES = {"f32": (0, np.dtype(np.float32)), "f16": (1, np.dtype(np.float16)), "bf16": (30, np.dtype(ml_dtypes.bfloat16))}
ALIGNMENT = 32


@dataclass(frozen=True)
class Llama:
    dtype: str = "f16"
    layers: int = 2
    hidden: int = 256
    inter: int = 512
    heads: int = 4
    kv: int = 2
    vocab: int = 512
    experts: int = 0
    tied: bool = False

    def keys(self) -> dict:
        head = self.hidden // self.heads
        found = {
            "general.architecture": "llama", "llama.context_length": 128, "llama.embedding_length": self.hidden, "llama.block_count": self.layers,
            "llama.feed_forward_length": self.inter, "llama.attention.head_count": self.heads, "llama.attention.head_count_kv": self.kv,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": head, "llama.rope.freq_base": 10000.0,
            "llama.vocab_size": self.vocab, "general.file_type": 1,
        }
        if self.experts:
            found |= {"llama.expert_count": self.experts, "llama.expert_used_count": 2}
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁t{at}" for at in range(self.vocab - 259))]
        kinds = [2, 3, 3, *[6] * 256, *[1] * (self.vocab - 259)]
        return found | {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * self.vocab,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inter, kv = self.hidden, self.inter, self.hidden // self.heads * self.kv
        found = {"token_embd.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            of = {
                "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
                "attn_output": (hidden, hidden),
            }
            if self.experts:
                of |= {"ffn_gate_inp": (self.experts, hidden), "ffn_gate_exps": (self.experts, inter, hidden),
                       "ffn_up_exps": (self.experts, inter, hidden), "ffn_down_exps": (self.experts, hidden, inter)}
            else:
                of |= {"ffn_gate": (inter, hidden), "ffn_up": (inter, hidden), "ffn_down": (hidden, inter)}
            found |= {f"blk.{layer}.{name}.weight": shape for name, shape in of.items()}
        found["output_norm.weight"] = (hidden,)
        return found if self.tied else found | {"output.weight": (self.vocab, hidden)}

    def tensors(self) -> dict[str, np.ndarray]:
        """As a file has them: norms in f32."""
        draw = cases.generator(f"ggufs {self}")
        found = {}
        for name, shape in self.shapes().items():
            drawn = cases.normal(draw, shape)
            is_norm = len(shape) == 1
            dtype = np.dtype(np.float32) if is_norm else TYPES[self.dtype][1]
            found[name] = (1 + drawn * 0.01 if is_norm else drawn**3 * 0.02).astype(np.float32).astype(dtype)
        return found

    def write(self, path):
        write(path, self.keys(), self.tensors())
        return path


# What of the rules they reach: both kinds of heads, ties, counts of layers, eight experts, columns that no block divides, 70B by its layers.
MODELS = {
    "plain": Llama(),
    "tied": Llama(dtype="f32", tied=True),
    "nine layers": Llama(dtype="bf16", layers=9, kv=1, inter=256, vocab=320),
    "experts": Llama(experts=8, inter=288),
    "odd columns": Llama(hidden=160, heads=5, kv=5, inter=352),
    "no block": Llama(hidden=80, heads=5, kv=5, inter=100, vocab=300, layers=16),
    "as 70B": Llama(layers=80, hidden=32, heads=4, kv=1, inter=64, vocab=260),
}
# Of blocks again, by way of what they decode to: file and what it becomes.
AGAIN = [("plain", "Q8_0", "Q4_K_M"), ("experts", "Q4_0", "Q8_0")]


def write(path, keys: dict, tensors: dict[str, np.ndarray]):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        head += text(key) + packed(value)
    offset = 0
    for name, array in tensors.items():
        kind = next(number for number, dtype in TYPES.values() if dtype == array.dtype)
        head += text(name) + struct.pack(f"<I{array.ndim}Q", array.ndim, *array.shape[::-1]) + struct.pack("<IQ", kind, offset)
        offset += padded(array.nbytes)
    with open(path, "wb") as out:
        out.write(head + bytes(-len(head) % ALIGNMENT))
        for array in tensors.values():
            out.write(array.tobytes() + bytes(-array.nbytes % ALIGNMENT))


def packed(value) -> bytes:
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        case [float(), *_]:
            return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    raise TypeError(value)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# -- read -------------------------------------------------------------------------------------------------------------

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NAMES = {0: "F32", 1: "F16", 30: "BF16", **{number: name for name, (number, _, _) in blocks.TYPES.items()}}
SIZES = {0: (1, 4), 1: (1, 2), 30: (1, 2), **{number: (elements, size) for number, elements, size in blocks.TYPES.values()}}


@dataclass(frozen=True)
class File:
    """What is in a GGUF file: keys in their order, tensors as (type, shape, bytes)."""

    keys: dict
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]


def read(path) -> File:
    """All of a file, from its head's own words; every byte of it is accounted for."""
    data, at = path.read_bytes(), 4
    assert data[:4] == b"GGUF"

    def take(kind: str):
        nonlocal at
        value, = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return value

    def take_text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def take_value(kind: int):
        return take_text() if kind == 8 else take(NUMBERS[kind])

    version, tensors, keys = take("I"), take("Q"), take("Q")
    assert version == 3
    found = {}
    for _ in range(keys):
        key, kind = take_text(), take("I")
        if kind == 9:
            inner, count = take("I"), take("Q")
            found[key] = [take_value(inner) for _ in range(count)]
        else:
            found[key] = take_value(kind)
    infos = []
    for _ in range(tensors):
        name, rank = take_text(), take("I")
        shape = tuple(take("Q") for _ in range(rank))[::-1]
        infos.append((name, shape, take("I"), take("Q")))
    start = padded(at)
    made, end = {}, 0
    for name, shape, kind, offset in infos:
        elements, size = SIZES[kind]
        length = int(np.prod(shape)) // elements * size
        assert offset == end and shape[-1] % elements == 0
        made[name] = (NAMES[kind], shape, data[start + offset : start + offset + length])
        end = padded(offset + length)
    assert len(data) == start + end and len(made) == tensors and len(found) == keys
    return File(found, made)
