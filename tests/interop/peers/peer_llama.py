"""llama.cpp loads the GGUF files that `quarrel quantize` makes of a small Llama, and computes with them what transformers computes with the weights that they
decode to. `make test-interop`; llama.cpp is built once, five minutes (a C++ compiler must be there).

llama.cpp quantizes activations too, so logits are near and not equal: FORMATS' bound is 3e-2 of their size, and the same best token in 95 of 100 places.
"""

import ctypes
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[2]))

from golden import ggml, ggufs, llama, llamas  # noqa: E402
from golden.llama_files import CONVERT  # noqa: E402
from harness.server import binary  # noqa: E402

HEADS, KEYS, LAYERS, VOCABULARY = 4, 2, 2, 512
# Sixteen texts: of a model of random weights the best token is hardly better than the next, so that a few places say little.
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY - 8, (16, 96))
SCHEMES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_NL"]
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                         num_key_value_heads=KEYS, tie_word_embeddings=False, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("dense") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    llamas.pieces(folder, VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def cpp():
    """llama.cpp's own functions: the package's bindings without all that it imports beside."""
    folder = llama.built()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    for name in llama.LIBRARIES:
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(folder / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    found = importlib.import_module("llama_cpp.llama_cpp")
    found.silence = found.llama_log_callback(lambda *_: None)
    found.llama_log_set(found.silence, None)
    found.llama_backend_init()
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_near_those_of_what_the_file_decodes_to(scheme, dense, cpp, tmp_path):
    made = tmp_path / "made.gguf"
    run("quantize", dense, made, "--scheme", scheme)
    expected = expected_logits(dense, made, tmp_path)
    found = logits(cpp, made)
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
    print(f"{scheme}: relative error {error:.2e}, the same best token in {agreement:.3f}")
    assert error < 3e-2 and agreement >= 0.95, (error, agreement)


def test_a_model_quantized_before_is_read_too(dense, cpp, tmp_path):
    run("quantize", dense, tmp_path / "w8", "--scheme", "W8A16")
    run("quantize", tmp_path / "w8", tmp_path / "made.gguf", "--scheme", "Q8_0")
    expected = expected_logits(dense, tmp_path / "made.gguf", tmp_path)
    found = logits(cpp, tmp_path / "made.gguf")
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 3e-2


@pytest.mark.parametrize("scheme", ["MXFP4A16", "NVFP4A16", "W8A16"])
def test_a_copy_holds_the_numbers_of_the_quantized_model(scheme, dense, cpp, tmp_path):
    group = ["--group-size", "32"] if scheme == "W8A16" else []
    if scheme == "W8A16":
        # Scales are stored in the weights' own type, and blocks have f16.
        LlamaForCausalLM.from_pretrained(dense, dtype=torch.float16).save_pretrained(tmp_path / "f16")
        llamas.pieces(tmp_path / "f16", VOCABULARY)
        dense = tmp_path / "f16"
    run("quantize", dense, tmp_path / "quantized", "--scheme", scheme, *group)
    run("quantize", tmp_path / "quantized", tmp_path / "made.gguf", "--scheme", "COPY")
    expected = expected_logits(dense, tmp_path / "made.gguf", tmp_path)
    found = logits(cpp, tmp_path / "made.gguf")
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
    print(f"COPY of {scheme}: relative error {error:.2e}, the same best token in {agreement:.3f}")
    assert error < 3e-2 and agreement >= 0.95, (error, agreement)


def test_a_copy_of_nvfp4_is_what_llama_cpps_converter_makes(dense, tmp_path):
    run("quantize", dense, tmp_path / "quantized", "--scheme", "NVFP4A16")
    run("quantize", tmp_path / "quantized", tmp_path / "made.gguf", "--scheme", "COPY")
    source = ggml.sources(tmp_path)
    ggml.run(sys.executable, "-c", CONVERT, source, tmp_path / "quantized", "--outtype", "f32", "--outfile", tmp_path / "theirs.gguf")
    assert ggufs.read(tmp_path / "made.gguf").tensors == ggufs.read(tmp_path / "theirs.gguf").tensors


def expected_logits(dense: Path, made: Path, folder: Path) -> np.ndarray:
    """What transformers computes with the weights of a GGUF file, under its own names and in its own order of rows."""
    run("quantize", made, folder / "wide.gguf", "--scheme", "F32")
    model = LlamaForCausalLM.from_pretrained(dense, dtype=torch.float32)
    state = {}
    tensors = ggufs.read(folder / "wide.gguf").tensors
    for name, (_, shape, data) in tensors.items():
        if name.endswith(".scale"):
            continue
        values = torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy())
        if scale := tensors.get(name.replace(".weight", ".scale")):
            values = values * float(np.frombuffer(scale[2], np.float32)[0])
        parts = name.split(".")
        of = OUTSIDE[parts[0]] if parts[0] in OUTSIDE else f"model.layers.{parts[1]}.{NAMES[parts[2]]}"
        if parts[0] == "blk" and parts[2] in ("attn_q", "attn_k"):
            heads = HEADS if parts[2] == "attn_q" else KEYS
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        state[of + ".weight"] = values
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def logits(cpp, path: Path) -> np.ndarray:
    model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    parameters = cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 128
    found = []
    for text in TOKENS:
        context = cpp.llama_init_from_model(model, parameters)
        batch = cpp.llama_batch_init(len(text), 0, 1)
        batch.n_tokens = len(text)
        for at, token in enumerate(text):
            batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = int(token), at, 1, 0, 1
        assert cpp.llama_decode(context, batch) == 0
        found.append(np.ctypeslib.as_array(cpp.llama_get_logits(context), (len(text), VOCABULARY)).copy())
        cpp.llama_batch_free(batch)
        cpp.llama_free(context)
    cpp.llama_model_free(model)
    return np.stack(found)


def run(*args):
    subprocess.run([binary(), *args, "--quiet"], check=True)
