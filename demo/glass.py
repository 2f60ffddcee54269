"""glassllm's perplexity on a page of English: what a quantizer does to a language model, in one number.

The model's own numpy forward computes it; here are only the weights, turned to the usual side up, and the sum.
"""

from __future__ import annotations

import importlib
import sys

import numpy as np

from . import models


class Glass:
    """The language model, with weights that can be replaced."""

    def __init__(self):
        models.fetch(models.GLASSLLM)
        sys.path.insert(0, str(models.CACHE))  # the package is unpacked there, not installed
        try:
            self.package = importlib.import_module(models.GLASSLLM)
        finally:
            sys.path.remove(str(models.CACHE))
        self.model, self.tokenizer = self.package.load_pretrained("en")

    def layers(self) -> dict[str, np.ndarray]:
        """Every 2-D weight as f16, [out, in]: the package stores [in, out]. The embeddings are turned too."""
        parameters = self.model.named_parameters().items()
        return {
            name: np.ascontiguousarray(value.data.T.astype(np.float16))  # exact: the package ships f16
            for name, value in parameters
            if value.data.ndim == 2
        }

    def perplexity(self, layers: dict[str, np.ndarray], text: str) -> float:
        """Over whole windows of the model's context, one after the other, with `layers` in place of its 2-D weights."""
        parameters = self.model.named_parameters()
        shipped = {name: value.data for name, value in parameters.items()}
        for name, array in layers.items():
            parameters[name].data = np.ascontiguousarray(array.T.astype(np.float32))
        try:
            return float(np.exp(self._loss(self.tokenizer.encode(text))))
        finally:
            for name, array in shipped.items():
                parameters[name].data = array

    def _loss(self, ids):
        """Mean cross-entropy of the next token, in nats."""
        context = self.model.cfg.max_len
        windows = (len(ids) - 1) // context
        tokens = np.array(ids[: windows * context]).reshape(windows, context)
        following = np.array(ids[1 : windows * context + 1]).reshape(windows, context)
        with self.package.no_grad():
            losses = [float(self.model.loss(one, two).data) for one, two in zip(tokens, following)]
        return np.mean(losses)
