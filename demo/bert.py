"""MiniLM's sentence embeddings in plain numpy: the oracle that says whether quantized weights still work.

Written from the BERT paper (Devlin et al. 2018, arXiv:1810.04805) and the model card: mean over the tokens, then unit
length. No batching: sentences are short, and without padding there is no attention mask to get wrong.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


class Encoder:
    """Turns sentences into embeddings with whatever weights it is handed."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "config.json").read_text())
        self.blocks = config["num_hidden_layers"]
        self.heads = config["num_attention_heads"]
        self.epsilon = config["layer_norm_eps"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()

    def embed(self, weights: dict[str, np.ndarray], sentences: list[str]) -> np.ndarray:
        """One row of unit length per sentence, f32."""
        return np.stack([self._embed_one(weights, sentence) for sentence in sentences])

    def _embed_one(self, weights, sentence):
        ids = self.tokenizer.encode(sentence).ids
        x = (
            weights["embeddings.word_embeddings.weight"][ids]
            + weights["embeddings.position_embeddings.weight"][: len(ids)]
            + weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(weights, "embeddings.LayerNorm", x)
        for block in range(self.blocks):
            x = self._block(weights, f"encoder.layer.{block}", x)
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def _block(self, weights, name, x):
        attended = self._attention(weights, f"{name}.attention.self", x)
        dense = linear(weights, f"{name}.attention.output.dense", attended)
        x = self._norm(weights, f"{name}.attention.output.LayerNorm", x + dense)
        wide = gelu(linear(weights, f"{name}.intermediate.dense", x))
        dense = linear(weights, f"{name}.output.dense", wide)
        return self._norm(weights, f"{name}.output.LayerNorm", x + dense)

    def _attention(self, weights, name, x):
        tokens, width = x.shape
        query, key, value = (
            linear(weights, f"{name}.{part}", x).reshape(tokens, self.heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / np.float32(math.sqrt(width // self.heads))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = scores / scores.sum(axis=-1, keepdims=True) @ value
        return mixed.transpose(1, 0, 2).reshape(tokens, width)

    def _norm(self, weights, name, x):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt(variance + np.float32(self.epsilon))
        return unit * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


_erf = np.frompyfunc(math.erf, 1, 1)


def gelu(x):
    """The exact form, with erf: the tanh approximation is another model."""
    return x * (np.float32(0.5) * (1 + _erf(x / math.sqrt(2)).astype(np.float32)))
