"""Whatever a caller has in hand becomes layers: arrays of any memory, tensors, files; what cannot is told at once."""

import collections.abc
import json
import os
import sys
import types

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

import quarrel
from harness import oracle, wire
from quarrel import runs

LIMITS = {"message_bytes_max": 64 << 20, "batch_rows_max": 1_000_000}


def weights(shape=(20, 64), dtype=np.float32, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as connected:
        yield connected


def check(layer, array, dtype="f32", channels=None):
    expected = oracle.integers(array.reshape(channels or len(array), -1), 8)
    assert (layer.status, layer.dtype, layer.shape) == ("quantized", dtype, array.shape)
    assert layer.packed.tobytes() == expected.data
    assert np.array_equal(layer.scales.ravel(), expected.scales)


# -- arrays -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", wire.BINARY_DTYPES)
def test_every_element_type_travels_as_it_is(client, dtype):
    array = weights(dtype=wire.BINARY_DTYPES[dtype])
    [layer] = client.quantize({"a": array}, scheme="int8")
    check(layer, array, dtype)


MEMORY = {
    "contiguous": lambda x: x,
    "transposed": lambda x: np.asfortranarray(x),
    "every second": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "unaligned": lambda x: np.frombuffer(b"?" + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_an_array_may_lie_in_memory_however_it_likes(client, monkeypatch, memory, dtype):
    monkeypatch.setattr(runs, "RUN_BYTES_MAX", 1000)
    array = MEMORY[memory](weights(dtype=dtype))
    [layer] = client.quantize({"a": array}, scheme="int8")
    check(layer, array.astype(dtype), {2: "f16", 4: "f32", 8: "f64"}[array.itemsize])


def test_a_contiguous_array_is_sent_from_where_it_lies():
    from quarrel.layers import source_of

    array = weights((2048, 1024))
    batches = list(source_of({"a": array}, runs.Cuts.of({}, LIMITS)).batches)
    assert [batch.num_rows for batch in batches] == [1, 1]
    addresses = [batch["weights"].buffers()[2].address for batch in batches]
    assert addresses == [array.ctypes.data, array[1024:].ctypes.data]


def test_small_layers_share_messages_of_about_a_mebibyte():
    from quarrel.layers import source_of

    layers = {f"layer{number}": weights((16, 64)) for number in range(1000)}
    batches = list(source_of(layers, runs.Cuts.of({}, LIMITS)).batches)
    assert [batch.num_rows for batch in batches] == [256, 256, 256, 232]
    assert batches[3]["weights"][0].as_py() == layers["layer768"].tobytes()


def test_a_server_of_small_messages_gets_small_messages(fresh_server):
    server = fresh_server("--message-bytes-max", 1 << 18)
    array = weights((2600, 512))
    experts = weights((2, 300, 512))
    with quarrel.connect(server.location) as client:
        quantized = client.quantize({"a": array, **{f"b{number}": array[:40] for number in range(20)}}, scheme="int8")
        check(quantized.collect()["a"], array)
        check(client.quantize({"a": experts}, scheme="int8;channel_dims=2").collect()["a"], experts, channels=600)


def test_a_mapping_that_makes_its_values_is_asked_for_one_at_a_time(client):
    made = []

    class Lazy(collections.abc.Mapping):
        def __getitem__(self, name):
            made.append(name)
            return weights()

        def __iter__(self):
            return iter(["a", "b"])

        def __len__(self):
            return 2

    results = client.quantize(Lazy(), scheme="int8")
    assert made == []
    assert [layer.name for layer in results] == made == ["a", "b"]


def test_an_array_of_no_elements_is_kept(client):
    for shape in ((0, 8), (8, 0), (0,)):
        [layer] = client.quantize({"a": np.empty(shape, np.float32)}, scheme="int8")
        assert (layer.status, layer.shape) == ("kept", shape)


REFUSED = {
    "int64": np.ones((2, 2), np.int64), "bool": np.ones((2, 2), bool), "complex64": np.ones((2, 2), np.complex64),
    "longdouble": np.ones((2, 2), np.longdouble), "rank 0": np.array(1, np.float32), "list": [[1.0, 2.0]],
    "str": "weights", "float8_e4m3b11fnuz": np.ones((2, 2), ml_dtypes.float8_e4m3b11fnuz),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_travel_is_refused_by_name(client, kind):
    layers = {"good": weights(), "bad.weight": REFUSED[kind]}
    with pytest.raises(quarrel.InvalidInputError, match="layer `bad.weight`.*expected") as caught:
        client.quantize(layers, scheme="int8")
    assert caught.value.layer == "bad.weight"
    results = client.quantize(iter(layers.items()), scheme="int8")
    with pytest.raises(quarrel.InvalidInputError, match="layer `bad.weight`.*expected"):
        list(results)


@pytest.mark.parametrize("layers", [17, None, weights(), [weights()], {1: weights()}, [("a", weights(), 1)]], ids=str)
def test_what_are_no_layers_is_a_type_error(client, layers):
    with pytest.raises(TypeError, match="expected"):
        list(client.quantize(layers, scheme="int8"))


# -- torch, by its manners --------------------------------------------------------------------------------------------

class Dtype:
    """What torch.dtype shows of itself."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return f"torch.{self.name}"


class Tensor:
    """What torch.Tensor does as far as it is used: torch itself is not installed for these tests."""

    def __init__(self, array, device="cuda", grad=True):
        self._array, self.device, self._grad = array, device, grad
        self.dtype = Dtype(array.dtype.name)
        self.shape, self.ndim = array.shape, array.ndim

    def element_size(self):
        return self._array.itemsize

    def __getitem__(self, piece):
        return Tensor(self._array[piece], self.device, self._grad)

    def detach(self):
        return Tensor(self._array, self.device, grad=False)

    def cpu(self):
        return Tensor(self._array, "cpu", self._grad)

    def contiguous(self):
        return Tensor(np.ascontiguousarray(self._array), self.device, self._grad)

    def reshape(self, shape):
        return Tensor(self._array.reshape(shape), self.device, self._grad)

    def view(self, dtype):
        assert dtype.name == "uint8" and self._array.flags["C_CONTIGUOUS"]
        return Tensor(self._array.view(np.uint8), self.device, self._grad)

    def numpy(self):
        if self.device != "cpu" or self._grad or self.dtype.name == "bfloat16":
            raise TypeError("torch refuses tensors on devices, with a gradient, and of types that numpy lacks")
        return self._array


Tensor.__module__ = Dtype.__module__ = "torch"


class Parameter(Tensor):
    """A class derived from torch's, in somebody's module."""


@pytest.fixture
def torch(monkeypatch):
    module = types.ModuleType("torch")
    module.uint8 = Dtype("uint8")
    monkeypatch.setitem(sys.modules, "torch", module)


@pytest.mark.parametrize("kind", [Tensor, Parameter])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16", "f8_e4m3"])
def test_torch_tensors_travel_from_any_device_run_by_run(client, torch, monkeypatch, kind, dtype):
    monkeypatch.setattr(runs, "RUN_BYTES_MAX", 1000)
    array = weights(dtype=wire.BINARY_DTYPES[dtype])
    layers = {"a": kind(array), "b": kind(array.T), "strided": kind(array[0, ::2])}
    [plain, transposed, strided] = client.quantize(layers, scheme="int8", return_kept=True)
    assert strided.weights.tobytes() == array[0, ::2].tobytes()
    check(plain, array, dtype)
    check(transposed, np.ascontiguousarray(array.T), dtype)


def test_a_torch_tensor_of_integers_is_refused_by_name(client, torch):
    with pytest.raises(quarrel.InvalidInputError, match="layer `steps` has dtype `int64`: expected one of float16"):
        client.quantize({"steps": Tensor(np.ones((2, 2), np.int64))}, scheme="int8")


def test_nothing_that_is_optional_is_imported():
    import subprocess

    code = "import sys, quarrel; print([m for m in ('torch', 'tqdm', 'yaml', 'ml_dtypes', 'safetensors', 'asyncio') " \
           "if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- files ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def model(tmp_path):
    """A checkpoint of many types, and its arrays by name."""
    arrays = {
        "q_proj.weight": weights((2600, 512)), "o_proj.weight": weights((20, 64), ml_dtypes.bfloat16),
        "up.weight": weights((20, 96), np.float16), "down.weight": weights((4, 2, 64), np.float64),
        "norm.weight": weights((64,)), "lm_head.weight": weights((20, 64)),
        "position_ids": np.arange(10).reshape(1, 10), "scale": np.array(2, np.float32),
        "mask": np.ones((2, 3), bool), "none": np.empty((0, 4), np.float32),
        "eight.weight": weights((20, 64), ml_dtypes.float8_e4m3fn),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", arrays


def in_file_order(path, arrays):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sorted(arrays, key=lambda name: header[name]["data_offsets"][0])


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_safetensors_file_comes_back_whole_and_in_its_order(client, model, as_path):
    path, arrays = model
    quantized = client.quantize(as_path(path), scheme="int8", ignore=[]).collect()
    assert sorted(quantized) == sorted(arrays)
    starts = in_file_order(path, arrays)
    assert [name for name in quantized if arrays[name].size] == [name for name in starts if arrays[name].size]
    for name, array in arrays.items():
        layer = quantized[name]
        assert layer.shape == array.shape
        if array.dtype in (np.int64, bool):
            assert (layer.status, layer.reason) == ("kept", "not_float") and name in layer.message
        elif array.ndim < 2 or not array.size:
            assert layer.status == "kept"
        else:
            check(layer, array, next(word for word, dtype in wire.BINARY_DTYPES.items() if dtype == array.dtype))


def test_a_file_keeps_the_standard_layers_and_what_groups_do_not_divide(client, model):
    path, _ = model
    quantized = client.quantize(path, scheme="W4A16").collect()
    assert {name: layer.reason for name, layer in quantized.items() if layer.reason != "rank_1"} == {
        "q_proj.weight": None, "down.weight": None, "lm_head.weight": "ignored", "norm.weight": "ignored",
        "o_proj.weight": "group_size_indivisible", "up.weight": "group_size_indivisible",
        "eight.weight": "group_size_indivisible", "position_ids": "not_float", "mask": "not_float", "none": "empty",
    }
    assert client.quantize(path, scheme="int8").collect()["lm_head.weight"].reason == "ignored"
    assert client.quantize(path, profile="cloud").collect()["lm_head.weight"].reason == "ignored"


def test_with_return_kept_nothing_of_a_file_is_lost(client, model):
    path, arrays = model
    quantized = client.quantize(path, scheme="W4A16", return_kept=True).collect()
    for name, layer in quantized.items():
        if layer.status == "kept" and arrays[name].dtype.itemsize != 1 or name == "mask":
            assert layer.weights.dtype == arrays[name].dtype and np.array_equal(layer.weights, arrays[name]), name
    assert np.array_equal(quantized["eight.weight"].weights, arrays["eight.weight"].view(np.uint8))


def test_rows_that_did_not_travel_lie_in_the_table_like_the_others(client, model):
    table = client.quantize(model[0], scheme="int8").collect().to_arrow()
    reasons = dict(zip(table["layer_name"].to_pylist(), table["reason"].to_pylist()))
    assert (reasons["position_ids"], reasons["q_proj.weight"]) == ("not_float", None)


def test_the_bytes_of_a_file_are_known_beforehand(client, model):
    path, arrays = model
    seen = []
    list(client.quantize(path, scheme="int8", progress=seen.append))
    floats = sum(array.nbytes for array in arrays.values() if array.dtype not in (np.int64, bool))
    assert (seen[-1].bytes_total, seen[-1].bytes_in) == (floats, floats)


def test_a_file_without_floats_is_all_kept(client, tmp_path):
    save_file({"a": np.arange(4), "b": np.arange(3)}, tmp_path / "ids.safetensors")
    results = client.quantize(tmp_path / "ids.safetensors", scheme="int8")
    assert {(layer.name, layer.reason) for layer in results} == {("a", "not_float"), ("b", "not_float")}


def broken(path, data: bytes):
    path.write_bytes(data)
    return path


def test_what_is_no_safetensors_file_is_refused_with_its_path(client, tmp_path, model):
    good = model[0].read_bytes()
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}
    headers = [b"{}x", b"[]", json.dumps({"a": entry}).encode(), json.dumps({"a": {}}).encode()]
    for number, data in enumerate([b"", b"abc", b"\xff" * 16, good[:-1], good[:100],
                                   *(len(header).to_bytes(8, "little") + header + bytes(12) for header in headers)]):
        path = broken(tmp_path / f"broken{number}.safetensors", data)
        with pytest.raises(quarrel.InvalidInputError, match=f"`{path}`"):
            client.quantize(path, scheme="int8")
    with pytest.raises(FileNotFoundError):
        client.quantize(tmp_path / "missing.safetensors", scheme="int8")


def test_a_file_that_changes_under_us_is_an_error(client, model):
    path, _ = model
    results = client.quantize(path, scheme="int8")
    with open(path, "ab") as file:
        file.write(b"more")
    with pytest.raises(quarrel.InvalidInputError, match="has changed"):
        list(results)


def test_a_file_is_closed_when_its_stream_ends(client, model):
    def opened():
        links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
        return [link for link in links if os.path.lexists(link) and os.readlink(link) == str(model[0])]

    with client.quantize(model[0], scheme="int8") as results:
        next(results)
    assert opened() == []
    list(client.quantize(model[0], scheme="int8"))
    assert opened() == []


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = {"rules": [{"targets": ["a"], "scheme": "int4"}], "ignore": ["b"]}
YAML = "rules:\n- targets: [a]\n  scheme: int4\nignore: [b]\n"


@pytest.mark.parametrize("name, text", [("r.json", json.dumps(RECIPE)), ("r.yaml", YAML), ("r.yml", YAML)])
def test_a_recipe_may_be_a_file(client, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for recipe in (RECIPE, tmp_path / name, str(tmp_path / name)):
        quantized = client.quantize({"a": weights(), "b": weights()}, recipe=recipe).collect()
        assert (quantized["a"].scheme, quantized["b"].reason) == ("int4", "ignored")


def test_a_recipe_that_cannot_be_read_says_why(client, tmp_path, monkeypatch):
    for name, text in [("r.json", "{"), ("r.yaml", "{"), ("r.toml", ""), ("list.json", "[]")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(quarrel.InvalidInputError, match=f"recipe `{tmp_path / name}`"):
            client.quantize({}, recipe=tmp_path / name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(quarrel.InvalidInputError, match="PyYAML is not installed.*quarrel-flight.yaml"):
        client.quantize({}, recipe=tmp_path / "r.yaml")


def test_ignore_stands_beside_a_scheme_only(client):
    for how in ({"recipe": RECIPE}, {"profile": "edge"}, {}):
        with pytest.raises(quarrel.InvalidInputError, match="beside `scheme`"):
            client.quantize({"a": weights()}, ignore=["b"], **how)
    with pytest.raises(TypeError, match="list"):
        client.quantize({"a": weights()}, scheme="int8", ignore="lm_head")


def test_an_option_that_json_cannot_hold_is_a_type_error(client):
    with pytest.raises(TypeError, match="JSON"):
        client.quantize({"a": weights()}, scheme=np.array(1))


def test_a_table_of_wrong_columns_meets_the_servers_error(client):
    with pytest.raises(quarrel.InvalidInputError) as caught:
        list(client.quantize(pa.table({"name": ["a"], "weights": [[1.0]]}), scheme="int8"))
    assert caught.value.reason in ("column_missing", "column_unexpected")
