"""Writes files/ggml.json: digests of the blocks that ggml makes of hard layers and of MiniLM, and of the values that it reads in them.

`make golden` runs it. The oracle is ggml's C: `libggml-base`, built as its own build does from the sdist of PyPI's llama-cpp-python, without the
instructions of this machine, and so without contraction (a quarter of Q2_K's blocks are others with it). Needs a C++ compiler; CMake and
Ninja come from PyPI, into the cache. A minute.
"""

import ctypes
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

import ml_dtypes
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "tests"))

from golden import blocks, minilm  # noqa: E402

PACKAGE = "llama-cpp-python==0.3.36"
TOOLS = ("cmake==4.4.5", "ninja==1.13.2")
CACHE = REPOSITORY / ".cache" / "ggml"
LIBRARY = CACHE / "libggml-base.so"
FILE = Path(__file__).resolve().parent / "files" / "ggml.json"
OFF = ("GGML_CCACHE", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_TOOLS",
       "LLAMA_BUILD_SERVER", "LLAMA_BUILD_COMMON")


def main():
    ggml = Ggml(built())
    layers = {name: {"f32": weights} for name, weights in blocks.layers().items()}
    for dtype in blocks.NARROW:
        layers["cubed"][dtype] = layers["cubed"]["f32"].astype(minilm.STORED[dtype])
    for name, weights in minilm.tensors("f32").items():
        layers[name] = {"f32": weights}
    read = {kind: ggml.dequantize(kind, blocks.any_blocks(kind), 2560) for kind in blocks.TYPES}
    any_values = {kind: blocks.digest(blocks.numbers(values)) for kind, values in read.items()}
    document = {"package": PACKAGE, "any_values": any_values, "layers": {}}
    for name, by_dtype in layers.items():
        for dtype, weights in by_dtype.items():
            x = weights.astype(np.float32)
            document["layers"][f"{name}@{dtype}"] = {
                kind: ggml.digests(kind, x)
                for kind, (_, elements, _) in blocks.TYPES.items() if x.shape[1] % elements == 0
            }
    hard, real = blocks.layers(), minilm.tensors("f32")
    document["by_importance"] = {
        name: {kind: ggml.weighed(kind, hard, name) for kind in blocks.BY_IMPORTANCE} for name in blocks.importances(1)
    }
    document["by_importance"]["real"] = {kind: ggml.weighed(kind, real, "squares") for kind in blocks.BY_IMPORTANCE}
    FILE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def built() -> Path:
    """The library, built if it is not in the cache."""
    if not LIBRARY.exists():
        build("ggml-base", CACHE, [LIBRARY.name], ["-DGGML_NATIVE=OFF", "-DGGML_OPENMP=OFF"])
    return LIBRARY


def build(target: str, cache: Path, libraries: list[str], options: list[str]):
    """Builds libraries of llama.cpp into a folder, as its own build does."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        folder = Path(folder)
        source = sources(folder)
        venv.create(folder / "tools", with_pip=True)
        tools = folder / "tools" / "bin"
        run(tools / "pip", "install", "--quiet", *TOOLS)
        off = [f"-D{option}=OFF" for option in OFF]
        run(tools / "cmake", "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DCMAKE_BUILD_TYPE=Release",
            "-DBUILD_SHARED_LIBS=ON", *off, *options, "-S", source, "-B", folder / "build")
        run(tools / "cmake", "--build", folder / "build", "--target", target)
        for name in libraries:
            (folder / "build" / "bin" / name).resolve().rename(cache / name)
        # What Python calls them with.
        shutil.copytree(source.parents[1] / "llama_cpp", cache / "llama_cpp", dirs_exist_ok=True)


def sources(folder: Path) -> Path:
    """llama.cpp's tree, extracted into a folder."""
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, PACKAGE)
    archive, = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    source, = folder.glob("llama_cpp_python-*/vendor/llama.cpp")
    return source


def run(*command):
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}")


class Traits(ctypes.Structure):
    """ggml.h's ggml_type_traits, as far as it is read."""

    _fields_ = [
        ("name", ctypes.c_char_p), ("elements", ctypes.c_int64), ("interleaved", ctypes.c_int64), ("bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


class Ggml:
    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.ggml_quantize_chunk.restype = ctypes.c_size_t
        self.library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
        ]
        self.library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)

    def weighed(self, kind: str, layers: dict[str, np.ndarray], name: str) -> str:
        """Of all layers' blocks, where columns have that importance."""
        fitting = blocks.fitting(kind, layers)
        made = [self.quantize(kind, layer, blocks.importances(layer.shape[1])[name]).reshape(-1) for layer in fitting.values()]
        return blocks.digest(np.concatenate(made))

    def quantize(self, kind: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Rows of blocks, as bytes."""
        number, elements, size = blocks.TYPES[kind]
        traits = self.traits(kind)
        assert (traits.name.decode().upper(), traits.elements, traits.bytes) == (kind.upper(), elements, size)
        rows, columns = weights.shape
        made = np.zeros((rows, columns // elements * size), np.uint8)
        weights = np.ascontiguousarray(weights)
        written = self.library.ggml_quantize_chunk(number, weights.ctypes.data, made.ctypes.data, 0, rows, columns,
                                                   None if importance is None else importance.ctypes.data)
        assert written == made.nbytes
        return made

    def dequantize(self, kind: str, made: np.ndarray, columns: int) -> np.ndarray:
        values = np.zeros((made.shape[0], columns), np.float32)
        self.traits(kind).to_float(made.ctypes.data, values.ctypes.data, values.size)
        return values

    def traits(self, kind: str) -> Traits:
        return self.library.ggml_get_type_traits(blocks.TYPES[kind][0]).contents

    def digests(self, kind: str, weights: np.ndarray) -> dict[str, str]:
        made = self.quantize(kind, weights)
        return {"blocks": blocks.digest(made), "values": blocks.digest(self.dequantize(kind, made, weights.shape[1]))}


if __name__ == "__main__":
    main()
