"""llama.cpp itself, as its own build makes it of the sdist of PyPI's llama-cpp-python: `llama-quantize` without its command line. Five minutes, once."""

import ctypes
from pathlib import Path

from golden import ggml

CACHE = ggml.REPOSITORY / ".cache" / "llama"
LIBRARIES = ("libggml-base.so", "libggml-cpu.so", "libggml.so", "libllama.so")


class Parameters(ctypes.Structure):
    """llama.h's llama_model_quantize_params."""

    _fields_ = [
        ("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("output_tensor_type", ctypes.c_int), ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool), ("quantize_output_tensor", ctypes.c_bool), ("only_copy", ctypes.c_bool), ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool), ("dry_run", ctypes.c_bool), ("imatrix", ctypes.c_void_p), ("kv_overrides", ctypes.c_void_p),
        ("tensor_types", ctypes.c_void_p), ("prune_layers", ctypes.c_void_p), ("max_buf_size", ctypes.c_size_t),
    ]


def built() -> Path:
    """The folder of the libraries, built if they are not in the cache. With the instructions of this machine, as its users have it."""
    if not all((CACHE / name).exists() for name in LIBRARIES):
        ggml.build("llama", CACHE, LIBRARIES, ["-DGGML_OPENMP=OFF"])
    return CACHE


class LlamaCpp:
    def __init__(self, folder: Path):
        # Each needs those before it, and no path says where they are.
        loaded = [ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
        self.library = loaded[-1]
        self.library.llama_model_quantize_default_params.restype = Parameters
        self.library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
        self.library.llama_backend_init()
        self.silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.library.llama_log_set(self.silence, None)

    def quantize(self, source: Path, destination: Path, file_type: int, threads: int = 2):
        """What `llama-quantize --allow-requantize SOURCE DESTINATION TYPE` does."""
        wanted = self.library.llama_model_quantize_default_params()
        wanted.ftype, wanted.nthread, wanted.allow_requantize = file_type, threads, True
        failed = self.library.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(wanted))
        if failed:
            raise RuntimeError(f"llama.cpp did not quantize {source} to {file_type}")
