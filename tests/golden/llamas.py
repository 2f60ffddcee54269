"""Small models of the Llama family as transformers saves them, with tokenizers, by hand. Shared by llama_files.py and test_llama_files.py."""

import json
import struct
from dataclasses import dataclass, field

import numpy as np

from golden import cases, ggufs
from harness import cli

LLAMA_3_CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    dtype: str = "f16"
    layers: int = 2
    hidden: int = 256
    inter: int = 512
    heads: int = 4
    kv: int = 2
    vocab: int = 320
    experts: int = 0
    head_dim: int | None = None
    tied: bool = False
    bias: bool = False
    tokenizer: str = "pieces"
    shards: int = 1
    more: dict = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return "MixtralForCausalLM" if self.experts else "LlamaForCausalLM"

    def config(self) -> dict:
        found = {
            "architectures": [self.name], "model_type": "mixtral" if self.experts else "llama", "hidden_size": self.hidden, "intermediate_size": self.inter,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads, "num_key_value_heads": self.kv, "vocab_size": self.vocab,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": self.tied, "bos_token_id": 1, "eos_token_id": 2,
            "torch_dtype": {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[self.dtype], "hidden_act": "silu",
        }
        if self.experts:
            found |= {"num_local_experts": self.experts, "num_experts_per_tok": 2}
        if self.head_dim:
            found["head_dim"] = self.head_dim
        return found | self.more

    def shapes(self) -> dict[str, tuple[int, ...]]:
        head = self.head_dim or self.hidden // self.heads
        hidden, inter, query, kv = self.hidden, self.inter, head * self.heads, head * self.kv
        found = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            of = {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, query),
            }
            if self.experts:
                of["block_sparse_moe.gate"] = (self.experts, hidden)
                for expert in range(self.experts):
                    of |= {f"block_sparse_moe.experts.{expert}.{name}": shape
                           for name, shape in (("w1", (inter, hidden)), ("w2", (hidden, inter)), ("w3", (inter, hidden)))}
            else:
                of |= {"mlp.gate_proj": (inter, hidden), "mlp.up_proj": (inter, hidden), "mlp.down_proj": (hidden, inter)}
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of.items()}
            if self.bias:
                found |= {f"model.layers.{layer}.self_attn.{name}_proj.bias": of[f"self_attn.{name}_proj"][:1] for name in "qkvo"}
        found["model.norm.weight"] = (hidden,)
        return found if self.tied else found | {"lm_head.weight": (self.vocab, hidden)}

    def tensors(self) -> dict[str, np.ndarray]:
        draw = cases.generator(f"llamas {self.dtype} {self.layers} {self.hidden} {self.experts} {self.bias}")
        dtype = ggufs.TYPES[self.dtype][1]
        found = {}
        for name, shape in self.shapes().items():
            drawn = cases.normal(draw, shape)
            found[name] = (1 + drawn * 0.01 if "norm" in name else drawn**3 * 0.02).astype(np.float32).astype(dtype)
        return found

    def write(self, folder):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        {"pieces": pieces, "bytes": bytes_, "fallback": fallback}[self.tokenizer](folder, self.vocab)
        tensors = self.tensors()
        if self.shards == 1:
            cli.write(folder / "model.safetensors", tensors, {"format": "pt"})
            return folder
        names, homes = list(tensors), {}
        for shard in range(self.shards):
            file = f"model-{shard + 1:05}-of-{self.shards:05}.safetensors"
            part = {name: tensors[name] for name in names[shard :: self.shards]}
            cli.write(folder / file, part, {"format": "pt"})
            homes |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": homes}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


MODELS = {
    "llama": Family(),
    "llama 3": Family(dtype="bf16", tokenizer="bytes", tied=True, shards=3, more={"rope_scaling": LLAMA_3_ROPE, "rope_theta": 500000.0}),
    "mixtral": Family(experts=4, inter=96, kv=4, shards=2),
    "wide heads, biases": Family(dtype="f32", head_dim=128, bias=True, more={"rope_scaling": {"type": "linear", "factor": 2.0}}),
}


# -- tokenizers -------------------------------------------------------------------------------------------------------

def pieces(folder, vocab: int):
    """SentencePiece's file, and two tokens that were added."""
    def piece(text, score, kind):
        body = b"\x0a" + varint(len(text.encode())) + text.encode() + b"\x15" + struct.pack("<f", score) + (b"\x18" + varint(kind) if kind != 1 else b"")
        return b"\x0a" + varint(len(body)) + body

    listed = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    listed += [("▁" + "t" * (at + 1), -float(at), 1) for at in range(vocab - 8 - len(listed))]
    # How it was trained: BPE, and bytes where no piece fits.
    trainer = b"\x12\x05\x18\x02\x98\x02\x01"
    (folder / "tokenizer.model").write_bytes(b"".join(piece(*one) for one in listed) + trainer)
    added = {str(vocab - 8): {"content": "<|im_start|>", "special": True}, str(vocab - 7): {"content": "▁own", "special": False}}
    said = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "add_eos_token": False, "add_prefix_space": True,
            "added_tokens_decoder": added, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def bytes_(folder, vocab: int):
    """Byte-level BPE as Llama 3 has it."""
    letters = byte_letters()
    words = ["Ġt", "Ġth", "he", "in", "er", "Ġthe", "Ġa"]
    merges = [["Ġ", "t"], ["Ġt", "h"], ["h", "e"], ["i", "n"], ["e", "r"], ["Ġth", "e"], ["Ġ", "a"]]
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    texts = {text: at for at, text in enumerate([*letters, *words])}
    added = [{"id": len(texts) + at, "content": text, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
             for at, text in enumerate(specials)]
    cut = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA_3_CUT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
    first = {"SpecialToken": {"id": specials[0], "type_id": 0}}
    after = {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {specials[0]: {"id": specials[0], "ids": [len(texts)], "tokens": [specials[0]]}}}]}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
             "byte_fallback": False, "ignore_merges": True, "vocab": texts, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": cut, "post_processor": after,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": specials[0], "eos_token": specials[1], "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}")


def fallback(folder, vocab: int):
    """SentencePiece's BPE as transformers writes it without SentencePiece's file."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁t", "he", "▁the", "▁", "t", "h", "e"]
    merges = ["▁ t", "h e", "▁t he"]
    added = [{"id": at, "content": text, "special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
             for at, text in enumerate(texts[:3])]
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "vocab": {text: at for at, text in enumerate(texts)}, "merges": merges}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": None,
                                                       "post_processor": None, "decoder": {"type": "Sequence", "decoders": []}, "model": model}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])
