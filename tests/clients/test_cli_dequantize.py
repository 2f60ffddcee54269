"""`quarrel dequantize`: what codes stand for, bit for bit what the wire answers, and files that cannot be read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from golden import cases
from harness import cli, wire
from harness.command import dequantize

CHECKPOINTS = Path(__file__).resolve().parents[1] / "golden" / "files" / "checkpoints"
TYPES = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
SCHEMES = (
    "W4A16", "W4A16_ASYM", "W8A8", "W8A16", "FP8_BLOCK", "FP8_DYNAMIC", "int4-asym/tensor", "int8/g64", "int8-asym",
    "int3", "fp8/tensor",
)


def model(dtype: np.dtype) -> dict[str, np.ndarray]:
    """Layers of a run and of several (6 MiB in f32): channels that are no multiple of 128, nor of 32."""
    shapes = {"a.weight": (130, 256), "b.weight": (1536, 1024), "c.weight": (20, 128)}
    return {
        name: (cases.normal(cases.generator(f"dequantize {name}"), shape) * 0.05).astype(dtype)
        for name, shape in shapes.items()
    }


def dequantized_on_the_wire(location: str, scheme: str, dtype: str, layers) -> dict[str, bytes]:
    batches = [wire.layer_batch(name, layer, channels_per_row=256) for name, layer in layers.items()]
    reply = wire.exchange(location, {"quantize": {"scheme": scheme}}, batches)
    dense = wire.exchange(location, dequantize(dtype=dtype), reply.batches, schema=reply.schema)
    return {name: elements(dense.table.filter(pc.equal(dense.table["layer_name"], name))["weights"]) for name in layers}


def elements(weights: pa.ChunkedArray) -> bytes:
    if pa.types.is_large_binary(weights.type):
        return b"".join(weights.to_pylist())
    return pc.list_flatten(weights).to_numpy().tobytes()


@pytest.mark.parametrize("scheme, dtype", [
    *((scheme, dtype) for scheme in SCHEMES for dtype in ("f32", "bf16")), ("W4A16", "f16"), ("W4A16_ASYM", "f16"),
])
def test_a_dense_file_equals_what_the_wire_dequantizes(scheme, dtype, server, tmp_path):
    layers = model(TYPES[dtype])
    kept = {"model.norm.weight": np.ones(9, np.float16), "position_ids": np.arange(4)}
    source, packed, dense = (tmp_path / f"{name}.safetensors" for name in ("source", "packed", "dense"))
    cli.quantize(cli.write(source, layers | kept), packed, "-s", scheme)
    cli.done("dequantize", packed, dense)

    file = cli.read(dense)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in file.tensors.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in (layers | kept).items()
    }
    assert all(np.array_equal(file.tensors[name], tensor) for name, tensor in kept.items())
    expected = dequantized_on_the_wire(server.location, scheme, dtype, layers)
    assert {name: file.tensors[name].tobytes() == expected[name] for name in layers} == dict.fromkeys(layers, True)
    assert file.metadata == {"format": "pt"}, "the schemes of a file that has none any more"


@pytest.mark.parametrize("asked", TYPES)
def test_a_dense_file_has_the_type_that_is_asked_for(asked, server, tmp_path):
    layers = model(TYPES["bf16"])
    cli.quantize(cli.write(tmp_path / "in", layers), tmp_path / "packed", "-s", "W4A16")
    cli.done("dequantize", tmp_path / "packed", tmp_path / "dense", "--dtype", asked)

    found = cli.read(tmp_path / "dense").tensors
    expected = dequantized_on_the_wire(server.location, "W4A16", asked, layers)
    assert {name: (tensor.dtype, tensor.tobytes()) for name, tensor in found.items()} == {
        name: (TYPES[asked], data) for name, data in expected.items()
    }


def test_layers_of_different_types_each_get_their_own_back(tmp_path):
    layers = {f"{name}.weight": model(dtype)["c.weight"] for name, dtype in TYPES.items()}
    layers["f64.weight"] = layers["f32.weight"].astype(np.float64)
    cli.quantize(cli.write(tmp_path / "in", layers), tmp_path / "packed", "-s", "int8")
    cli.done("dequantize", tmp_path / "packed", tmp_path / "dense")

    found = {name: tensor.dtype for name, tensor in cli.read(tmp_path / "dense").tensors.items()}
    # Scales of f64 weights are f32, and the file holds no more than they.
    assert found == {f"{name}.weight": dtype for name, dtype in TYPES.items()} | {"f64.weight": TYPES["f32"]}


def test_a_dense_file_is_the_same_wherever_it_is_made(server, tmp_path):
    layers = {name: layer for dtype in TYPES for name, layer in
              ((f"{dtype}.{name}", layer) for name, layer in model(TYPES[dtype]).items())}
    cli.quantize(cli.write(tmp_path / "in", layers), tmp_path / "packed", "-s", "W4A16_ASYM")
    places = {
        "here": (), "again": (), "scalar": ("--cpu-level", "scalar", "--threads", 1),
        "tcp": ("--server", server.location), "four": ("--server", server.location, "--streams", 4),
    }
    made = {}
    for place, flags in places.items():
        cli.done("dequantize", tmp_path / "packed", tmp_path / place, *flags)
        made[place] = (tmp_path / place).read_bytes()

    assert [place for place in places if made[place] != made["here"]] == []


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK"])
def test_files_of_compressed_tensors_are_read_without_our_metadata(scheme, tmp_path):
    theirs, ours = CHECKPOINTS / f"bf16-f32-{scheme}.safetensors", tmp_path / "ours.safetensors"
    assert "quarrel.schemes" not in cli.read(theirs).metadata
    cli.quantize(CHECKPOINTS / "source-bf16.safetensors", ours, "-s", scheme)
    cli.done("dequantize", theirs, tmp_path / "theirs.dense")
    cli.done("dequantize", ours, tmp_path / "ours.dense")

    dense, expected = cli.read(tmp_path / "theirs.dense").tensors, cli.read(tmp_path / "ours.dense").tensors
    source = cli.read(CHECKPOINTS / "source-bf16.safetensors").tensors
    assert dense.keys() == expected.keys() == source.keys()
    for name, tensor in dense.items():
        assert (tensor.dtype, tensor.shape) == (source[name].dtype, source[name].shape), name
        assert tensor.tobytes() == expected[name].tobytes(), name


# -- files that cannot be read ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Damaged:
    """A quantized file with one thing wrong, and what must be said of it. The layer is `mlp.up` unless it is told."""

    name: str
    scheme: str
    damage: Callable[[dict, dict], None]
    says: tuple[str, ...]


def without(part: str):
    return lambda tensors, _: tensors.pop(f"mlp.up.{part}")


def with_part(part: str, value: np.ndarray):
    return lambda tensors, _: tensors.update({f"mlp.up.{part}": value})


def said_to_be(text: str):
    return lambda _, metadata: metadata.update({"quarrel.schemes": text})


def unsaid(change: Callable[[dict, dict], None]):
    """The same in a file without our metadata."""
    def both(tensors, metadata):
        metadata.clear()
        change(tensors, metadata)
    return both


F32, U8, I64 = np.float32, np.uint8, np.int64
# Two layers of 16 x 256: `mlp.up` and `mlp.down`.
DAMAGED = [
    Damaged("no scales", "W4A16", without("weight_scale"), ("`mlp.up`", "weight_scale")),
    Damaged("no shape", "W4A16", without("weight_shape"), ("`mlp.up`", "weight_shape")),
    Damaged("no zero points", "W4A16_ASYM", without("weight_zero_point"), ("`mlp.up`", "W4A16_ASYM", "zero point")),
    Damaged("zero points that are none's", "W4A16", with_part("weight_zero_point", np.zeros((2, 2), np.int32)),
            ("`mlp.up`", "W4A16", "zero point")),
    Damaged("scales of a wrong shape", "W4A16", with_part("weight_scale", np.ones((16, 3), F32)),
            ("`mlp.up`", "[16, 3]", "[16, 2]")),
    Damaged("scales of a wrong shape, unsaid", "W4A16", unsaid(with_part("weight_scale", np.ones((16, 3), F32))),
            ("`mlp.up`", "[16, 3]")),
    Damaged("integer scales", "W8A8", with_part("weight_scale", np.ones((16, 1), np.int32)), ("`mlp.up`", "I32")),
    Damaged("packed as bytes", "W4A16", with_part("weight_packed", np.zeros((16, 128), U8)), ("`mlp.up`", "U8")),
    Damaged("too few words", "W4A16", with_part("weight_packed", np.zeros((16, 31), np.int32)),
            ("`mlp.up`", "[16, 31]", "[16, 32]")),
    Damaged("a negative shape", "W4A16", with_part("weight_shape", np.array([-16, 256])), ("`mlp.up`", "weight_shape")),
    Damaged("a shape beyond all", "W4A16", with_part("weight_shape", np.array([2**40, 2**40])),
            ("`mlp.up`", "2^48")),
    Damaged("a shape beyond all but for a zero", "W4A16", with_part("weight_shape", np.array([0, 2**40, 2**40])),
            ("`mlp.up`", "2^48")),
    Damaged("activation ordering", "W4A16", with_part("weight_g_idx", np.arange(256)[::-1].astype(np.int32)),
            ("`mlp.up`", "weight_g_idx")),
    Damaged("a shape of floats", "W4A16", with_part("weight_shape", np.array([16, 256], F32)),
            ("`mlp.up`", "weight_shape", "F32", "I64")),
    Damaged("an empty shape", "W4A16", with_part("weight_shape", np.zeros(0, I64)), ("`mlp.up`", "weight_shape")),
    Damaged("a shape of many dimensions", "W4A16", with_part("weight_shape", np.ones(1000, I64)),
            ("`mlp.up`", "weight_shape", "32")),
    Damaged("another shape", "W4A16", with_part("weight_shape", np.array([16, 512])), ("`mlp.up`", "[16, 512]")),
    Damaged("zero points of another type", "W8A8", with_part("weight_zero_point", np.zeros((16, 1), F32)),
            ("`mlp.up`",)),
    Damaged("zero points of another type, unsaid", "int8-asym",
            unsaid(with_part("weight_zero_point", np.zeros((16, 1), F32))), ("`mlp.up`", "F32")),
    Damaged("packed zero points of another type", "W4A16_ASYM",
            with_part("weight_zero_point", np.zeros((2, 2), F32)), ("`mlp.up`", "F32", "I32")),
    Damaged("said to be FP8, and int8", "W8A8", said_to_be('{"FP8_DYNAMIC": ["mlp.up"]}'), ("`mlp.up`", "FP8_DYNAMIC")),
    Damaged("said to have another scheme", "W4A16", said_to_be('{"W8A8": ["mlp.up"]}'), ("`mlp.up`", "W8A8")),
    Damaged("said to have no scheme", "W4A16", said_to_be('{"W4A17": ["mlp.up"]}'), ("quarrel.schemes", "W4A17")),
    Damaged("garbled metadata", "W4A16", said_to_be("{"), ("quarrel.schemes",)),
    Damaged("GPTQ", "W4A16", with_part("qweight", np.zeros((2, 2), np.int32)), ("`mlp.up`", "qweight")),
    Damaged("NVFP4", "W4A16", with_part("weight_global_scale", np.ones(1, F32)), ("`mlp.up`", "weight_global_scale")),
    Damaged("DeepSeek", "W8A8", with_part("weight_scale_inv", np.ones((1, 1), F32)), ("`mlp.up`", "weight_scale_inv")),
    Damaged("a dense tensor of the same name", "W4A16", with_part("weight", np.zeros((16, 256), F32)),
            ("`mlp.up.weight`",)),
]


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.name)
def test_a_damaged_layer_is_named_with_what_is_wrong_and_what_to_do(case, tmp_path):
    layer = cases.normal(cases.generator("damaged"), (16, 256)).astype(F32)
    layers = {"mlp.down.weight": layer, "mlp.up.weight": -layer}
    cli.quantize(cli.write(tmp_path / "in", layers), tmp_path / "packed", "-s", case.scheme, "--report", tmp_path / "r")
    file = cli.read(tmp_path / "packed")
    case.damage(file.tensors, file.metadata)
    cli.write(tmp_path / "packed", file.tensors, file.metadata)
    before = sorted(tmp_path.iterdir())
    ended = cli.run("dequantize", tmp_path / "packed", tmp_path / "dense")

    cli.check_refusal(ended, 3, *case.says)
    assert sorted(tmp_path.iterdir()) == before


def test_a_scheme_that_types_and_shapes_do_not_tell_is_no_guess(tmp_path):
    """8 columns fill one word at 2, 3 and 4 bits."""
    cli.write(tmp_path / "in", {"a.weight": np.ones((4, 8), F32)})
    cli.quantize(tmp_path / "in", tmp_path / "packed", "-s", "int3")
    cli.done("dequantize", tmp_path / "packed", tmp_path / "dense")
    cli.write(tmp_path / "unsaid", cli.read(tmp_path / "packed").tensors)

    ended = cli.run("dequantize", tmp_path / "unsaid", tmp_path / "guess")
    cli.check_refusal(ended, 3, "`a`", "2, 3, 4")
    assert not (tmp_path / "guess").exists()


def test_a_dense_file_has_nothing_to_dequantize(tmp_path):
    source = cli.write(tmp_path / "in", {"a.weight": np.ones((4, 128), F32)})

    cli.check_refusal(cli.run("dequantize", source, tmp_path / "dense"), 3, str(source), "no quantized layers")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("shape", [(4, 130, 256), (3, 128, 200), (2, 2, 300, 64)])
def test_blocks_begin_anew_in_each_matrix(shape, tmp_path):
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    cli.write(tmp_path / "all.safetensors", {"x.weight": weights})
    matrices = weights.reshape(-1, *shape[-2:])
    cli.write(tmp_path / "each.safetensors", {f"{at}.weight": matrix for at, matrix in enumerate(matrices)})
    dense = {}
    for name, flags in [("all", ["--channel-dims", len(shape) - 1]), ("each", [])]:
        cli.quantize(tmp_path / f"{name}.safetensors", tmp_path / f"{name}-fp8.safetensors", "-s", "FP8_BLOCK", *flags)
        cli.done("dequantize", tmp_path / f"{name}-fp8.safetensors", tmp_path / f"{name}-dense.safetensors")
        dense[name] = cli.read(tmp_path / f"{name}-dense.safetensors").tensors
    for at, matrix in enumerate(dense["all"]["x.weight"].reshape(matrices.shape)):
        assert matrix.tobytes() == dense["each"][f"{at}.weight"].tobytes()
