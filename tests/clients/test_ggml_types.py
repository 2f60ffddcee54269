"""ggml's types as users meet them: the command line and the Python package. Their bytes: tests/golden/test_ggml.py."""

import json

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quarrel

from golden.blocks import TYPES
from harness import cli, wire


@pytest.fixture(scope="module")
def layer():
    return np.random.default_rng(5).normal(0, 0.02, (6, 512)).astype(np.float32)


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as client:
        yield client


@pytest.mark.parametrize("kind", TYPES)
def test_a_layer_has_blocks_for_codes_and_its_values_come_back(kind, client, layer):
    answered = client.quantize({"ffn": layer}, scheme=kind).collect()["ffn"]
    _, elements, size = TYPES[kind]
    assert answered.codes.shape == (6, 512 // elements * size) and answered.codes.dtype == np.uint8
    assert answered.codes.tobytes() == answered.packed.tobytes()
    assert answered.scales.shape == (6, 0) and answered.zero_points is None
    assert answered.to_numpy().keys() == {"codes"}
    metrics = answered.metrics
    assert metrics.bits_per_weight == size * 8 / elements
    values = answered.dequantize()
    assert metrics.max_abs_error == pytest.approx(np.abs(values - layer).max())
    assert 10 * np.log10((layer**2).sum() / ((values - layer) ** 2).sum()) == pytest.approx(metrics.sqnr_db, abs=1e-3)


def test_importance_of_columns_goes_beside_the_layers(client, layer, tmp_path):
    """Small layers travel together, large ones in runs; what some say is nothing to the others."""
    rng = np.random.default_rng(6)
    layers = {"small.0": layer, "large": rng.normal(0, 0.02, (3000, 512)).astype(np.float32), "small.1": layer * 2, "plain": layer}
    said = {name: np.square(rng.standard_normal(512)) for name in ("small.0", "large", "small.1")}  # f64
    found = client.quantize(layers, scheme="Q4_K", importance=said).collect()
    without = client.quantize(layers, scheme="Q4_K").collect()
    for name, array in layers.items():
        batch = wire.layer_batch(name, array, importance=said[name].astype(np.float32) if name in said else None)
        alone = wire.exchange(client.location, {"quantize": {"scheme": "Q4_K"}}, [batch]).layer(name)
        assert found[name].codes.tobytes() == bytes(alone.codes), name
        assert (found[name].codes.tobytes() == without[name].codes.tobytes()) == (name not in said)

    def weighted(quantized):
        """What it is for: the error where columns count."""
        off = quantized["large"].dequantize() - layers["large"]
        return (off**2 * said["large"]).sum()

    assert weighted(found) < 0.9 * weighted(without)


@pytest.mark.parametrize("kind", [np.float64, np.float16, ml_dtypes.bfloat16, np.int32, list])
def test_importance_is_numbers_of_any_kind(kind, client, layer):
    numbers = np.arange(512) % 7
    said = numbers.tolist() if kind is list else numbers.astype(kind)
    found, expected = (client.quantize({"x": layer}, scheme="Q4_K", importance={"x": one}).collect()["x"]
                       for one in (said, numbers.astype(np.float32)))
    assert found.codes.tobytes() == expected.codes.tobytes()


def test_a_file_of_layers_has_the_column_too(layer, tmp_path, client):
    importance = np.arange(512, dtype=np.float32)
    batch = wire.layer_batch("ffn", layer, importance=importance)
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "in.parquet")
    done = cli.run("quantize", tmp_path / "in.parquet", tmp_path / "out.arrow", "--scheme", "Q3_K")
    assert done.code == 0, done.err
    made = pa.ipc.open_file(tmp_path / "out.arrow").read_all()["quantized_data"][0].as_py()
    assert made == client.quantize({"ffn": layer}, scheme="Q3_K", importance={"ffn": importance}).collect()["ffn"].codes.tobytes()


def test_a_block_that_does_not_divide_the_columns_is_named(client):
    odd = {"odd": np.ones((2, 288), np.float32)}
    with pytest.raises(quarrel.InvalidInputError) as raised:
        client.quantize(odd, scheme="Q4_K").collect()
    assert (raised.value.reason, raised.value.layer) == ("group_size_indivisible", "odd")
    assert "256" in str(raised.value) and "288" in str(raised.value) and "Q8_0" in str(raised.value)
    assert client.quantize(odd, scheme="Q8_0").collect()["odd"].status == "quantized"


@pytest.mark.parametrize("kind, times", [("Q8_0", 1e12), ("Q4_K", 1e12), ("Q3_K", 1e12), ("Q3_K", 1e30), ("Q6_K", 1e30)])
def test_a_scale_beyond_f16_fails_its_layer_alone(kind, times, client, layer):
    """Of the last two ggml makes zeros: its squares are beyond f32."""
    layers = {"far": (layer * times).astype(np.float32), "near": layer}
    found = client.quantize(layers, scheme=kind, on_error="continue").collect()
    assert (found["far"].status, found["far"].reason) == ("failed", "scale_overflow") and "f16" in found["far"].message
    assert found["near"].status == "quantized"


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K"])
def test_a_number_that_is_none_is_found(kind, client, layer):
    bad = layer.copy()
    bad[3, 77] = np.nan
    with pytest.raises(quarrel.InvalidInputError) as raised:
        client.quantize({"bad": bad}, scheme=kind).collect()
    assert raised.value.reason == "non_finite" and str(3 * 512 + 77) in str(raised.value)


def test_a_channel_longer_than_a_stretch_is_the_same_blocks(server):
    """A channel of more than 262,144 columns is cut; another layer in its unit goes the other way."""
    long = np.random.default_rng(6).normal(0, 1, (1, 300 * 1024)).astype(np.float32)
    command = {"quantize": {"recipe": {"rules": [{"targets": ["*.k"], "scheme": "Q4_K"}, {"targets": ["*"], "scheme": "int8"}]}}}
    batches = [wire.layer_batch("a.k", long), wire.layer_batch("a.i", long[:, :512])]
    reply = wire.exchange(server.location, command, batches)
    rows = wire.exchange(server.location, {"quantize": {"scheme": "Q4_K"}}, [wire.layer_batch("b", long.reshape(300, 1024))])
    assert bytes(reply.layer("a.k").codes) == bytes(rows.layer("b").codes)


def test_a_block_has_no_other_size(client, layer):
    with pytest.raises(quarrel.InvalidInputError) as raised:
        client.quantize({"ffn": layer}, scheme="Q8_0", group_size=64).collect()
    assert raised.value.reason == "option_conflict"


def test_a_model_in_safetensors_has_no_place_for_blocks(layer, tmp_path):
    source = cli.write(tmp_path / "in", {"mlp.up_proj.weight": layer})
    ended = cli.run("quantize", source, tmp_path / "out.safetensors", "--scheme", "Q4_K")
    assert ended.code != 0 and "`Q4_K`" in ended.err and ".parquet" in ended.err
    assert not (tmp_path / "out.safetensors").exists()
    cli.quantize(source, tmp_path / "out.parquet", "-s", "Q4_K")


def test_what_it_would_take_is_estimated(layer, tmp_path):
    source = cli.write(tmp_path / "in", {"mlp.up_proj.weight": layer})
    told = cli.done("estimate", source, "-s", "Q6_K", "--json").json
    assert told["layers"][0]["bits_per_weight"] == 210 * 8 / 256
    assert told["layers"][0]["destination_bytes"] == [6 * 2 * 210] * 2
    assert json.dumps(told)
