"""The Python client gives the formulas' arrays in the ecosystem's shapes, for every kind of scheme and of input."""

import queue

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

import quarrel
from harness import oracle, wire
from quarrel import report, runs

# scheme: the oracle's words, and the shape of scales for [channels, columns].
SCHEMES = {
    "int8": (lambda x: oracle.integers(x, 8), lambda r, c: (r, 1)),
    "int8/tensor": (lambda x: oracle.integers(x, 8, per_tensor=True), lambda r, c: (1,)),
    "int8-asym": (lambda x: oracle.integers(x, 8, asymmetric=True), lambda r, c: (r, 1)),
    "int7": (lambda x: oracle.integers(x, 7), lambda r, c: (r, 1)),
    "int6": (lambda x: oracle.integers(x, 6), lambda r, c: (r, 1)),
    "int5-asym": (lambda x: oracle.integers(x, 5, asymmetric=True), lambda r, c: (r, 1)),
    "int4/g4": (lambda x: oracle.integers(x, 4, group=4), lambda r, c: (r, c // 4)),
    "int3-asym/g4": (lambda x: oracle.integers(x, 3, group=4, asymmetric=True), lambda r, c: (r, c // 4)),
    "int2-asym/tensor": (lambda x: oracle.integers(x, 2, per_tensor=True, asymmetric=True), lambda r, c: (1,)),
    "int2": (lambda x: oracle.integers(x, 2), lambda r, c: (r, 1)),
    "W4A16": (lambda x: oracle.integers(x, 4, group=128), lambda r, c: (r, c // 128)),
    "W4A16_ASYM": (lambda x: oracle.integers(x, 4, group=128, asymmetric=True), lambda r, c: (r, c // 128)),
    "W8A16": (lambda x: oracle.integers(x, 8, group=128, packing="dense"), lambda r, c: (r, c // 128)),
    "W4A16/g64": (lambda x: oracle.integers(x, 4, group=64), lambda r, c: (r, c // 64)),
    "W8A8": (lambda x: oracle.integers(x, 8), lambda r, c: (r, 1)),
    "INT8": (lambda x: oracle.integers(x, 8), lambda r, c: (r, 1)),
    "FP8": (lambda x: oracle.fp8(x, per_tensor=True), lambda r, c: (1,)),
    "FP8_DYNAMIC": (oracle.fp8, lambda r, c: (r, 1)),
    "FP8_BLOCK": (lambda x: oracle.fp8(x, block=(128, 128)), lambda r, c: (-(-r // 128), -(-c // 128))),
    "fp8/b64x32": (lambda x: oracle.fp8(x, block=(64, 32)), lambda r, c: (-(-r // 64), -(-c // 32))),
    "NVFP4A16": (oracle.nvfp4, lambda r, c: (r, c // 16)),
    "MXFP4A16": (lambda x: oracle.mx(x, 4), lambda r, c: (r, c // 32)),
    "MXFP6A16": (lambda x: oracle.mx(x, 6), lambda r, c: (r, c // 32)),
    "MXFP8A16": (lambda x: oracle.mx(x, 8), lambda r, c: (r, c // 32)),
    "MXFP4A16;mx=floor": (lambda x: oracle.mx(x, 4, "floor"), lambda r, c: (r, c // 32)),
    "MXFP6A16;mx=rceil": (lambda x: oracle.mx(x, 6, "rceil"), lambda r, c: (r, c // 32)),
    "MXFP8A16;mx=floor": (lambda x: oracle.mx(x, 8, "floor"), lambda r, c: (r, c // 32)),
}
# Those without a group of 16 or more, on columns that fill no word: 100 codes of 3 bits are 9.4 words.
ODD = [name for name in SCHEMES if not name.startswith(("W4A16", "W8A16", "NVFP", "MXFP"))]
SMALL_FLOATS = [name for name in SCHEMES if name.startswith(("NVFP", "MXFP"))]


def weights(shape=(130, 256), dtype=np.float32, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(dtype)


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as connected:
        yield connected


def check(layer, array, expected, scale_shape=None):
    """Everything that a layer says, against the oracle's word."""
    assert (layer.status, layer.reason, layer.shape) == ("quantized", None, array.shape)
    assert layer.packed.tobytes() == expected.data
    assert layer.codes.shape == array.shape
    assert layer.codes.dtype == (np.int8 if expected.codes.dtype == np.int8 else np.uint8)
    assert layer.codes.tobytes() == expected.codes.tobytes()
    assert layer.scales.dtype == np.float32 and np.array_equal(layer.scales.ravel(), expected.scales)
    assert scale_shape is None or layer.scales.shape == scale_shape
    if expected.zero_points is None:
        assert layer.zero_points is None
    else:
        assert layer.zero_points.dtype == np.int32 and layer.zero_points.shape == layer.scales.shape
        assert np.array_equal(layer.zero_points.ravel(), expected.zero_points)
    if expected.global_scale is None:
        assert layer.global_scale is None
    else:
        assert layer.global_scale.dtype == np.float32 and layer.global_scale.shape == (1,)
        assert layer.global_scale.tobytes() == expected.global_scale.tobytes()
    others = {name for name in ("zero_points", "global_scale") if getattr(layer, name) is not None}
    assert set(layer.to_numpy()) == {"codes", "scales"} | others
    assert all(np.array_equal(array, getattr(layer, name)) for name, array in layer.to_numpy().items())
    for name, value in oracle.metrics(array.reshape(expected.values.shape), expected).items():
        assert getattr(layer.metrics, name) == (None if value is None else pytest.approx(value, rel=1e-6)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_gives_the_arrays_of_its_formula(client, scheme):
    array = weights()
    formula, scale_shape = SCHEMES[scheme]
    [layer] = client.quantize({"q_proj": array}, scheme=scheme)
    check(layer, array, formula(array), scale_shape(*array.shape))


@pytest.mark.parametrize("scheme", ODD)
def test_padding_is_not_part_of_the_codes(client, scheme):
    array = weights((33, 100))
    formula, scale_shape = SCHEMES[scheme]
    [layer] = client.quantize({"q_proj": array}, scheme=scheme)
    check(layer, array, formula(array), scale_shape(*array.shape))


@pytest.mark.parametrize("scheme", ["int3", "W4A16_ASYM", "int8/tensor", "FP8_BLOCK", *SMALL_FLOATS])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dequantize_gives_codes_times_scales_rounded_once(client, scheme, dtype):
    arrays = {name: weights(seed=seed) for seed, name in enumerate("ab")}
    formula = SCHEMES.get(scheme, (lambda x: oracle.integers(x, 3), None))[0]
    quantized = client.quantize(arrays, scheme=scheme).collect()
    expected = {name: formula(array).values.astype(wire.BINARY_DTYPES[dtype]) for name, array in arrays.items()}
    for given in (quantized, quantized.to_arrow(), list(quantized.values())):
        found = client.dequantize(given, dtype=dtype).collect()
        assert list(found) == list(arrays)
        for name, array in found.items():
            assert array.dtype == wire.BINARY_DTYPES[dtype] and array.shape == arrays[name].shape
            assert np.array_equal(array, expected[name])
    assert np.array_equal(quantized["b"].dequantize(dtype), expected["b"])


@pytest.mark.parametrize("scheme", ["int8", "W4A16", "int4-asym/tensor", "FP8_BLOCK", *SMALL_FLOATS])
def test_a_layer_of_several_runs_is_the_same_as_of_one(client, scheme, monkeypatch):
    array = weights((2600, 512))
    [whole] = client.quantize({"layer": array}, scheme=scheme)
    assert len(whole.to_arrow()) == 2
    monkeypatch.setattr(runs, "RUN_BYTES_MAX", 7 * 512 * 4)
    [cut] = client.quantize({"layer": array}, scheme=scheme)
    assert len(cut.to_arrow()) == -(-2600 // 7)
    for name, value in whole.to_numpy().items():
        assert np.array_equal(cut.to_numpy()[name], value), name
    assert cut.metrics == whole.metrics
    assert np.array_equal(cut.dequantize(), whole.dequantize())


def test_runs_are_the_layers_parts_in_order(client):
    array = weights((2600, 512))
    small = weights((4, 64))
    rows = list(client.quantize({"layer": array, "small": small}, scheme="int8-asym").runs())
    assert [(run.name, run.status, run.shape) for run in rows] == [
        ("layer", "quantized", (2600, 512)), ("layer", "quantized", (2600, 512)), ("small", "quantized", (4, 64))]
    expected = oracle.integers(array, 8, asymmetric=True)
    assert np.concatenate([run.packed for run in rows[:2]]).tobytes() == expected.data
    assert np.array_equal(np.concatenate([run.scales for run in rows[:2]]), expected.scales)
    assert np.array_equal(np.concatenate([run.zero_points for run in rows[:2]]), expected.zero_points)
    assert sum(run.metrics.elements for run in rows[:2]) == array.size


SMALL_FLOAT_TYPES = {
    "NVFP4A16": ml_dtypes.float4_e2m1fn, "MXFP4A16": ml_dtypes.float4_e2m1fn, "MXFP6A16": ml_dtypes.float6_e2m3fn,
    "MXFP8A16": ml_dtypes.float8_e4m3fn,
}


@pytest.mark.parametrize("scheme", SMALL_FLOAT_TYPES)
def test_codes_of_small_floats_are_those_of_ml_dtypes(client, scheme):
    array = weights((20, 64))
    [layer] = client.quantize({"q_proj": array}, scheme=scheme)
    numbers = layer.codes.view(SMALL_FLOAT_TYPES[scheme]).astype(np.float32)
    scales = layer.scales if layer.global_scale is None else layer.scales / layer.global_scale
    values = numbers.reshape(*scales.shape, -1) * scales[..., None]
    assert values.dtype == np.float32
    assert values.tobytes() == layer.dequantize().tobytes() == SCHEMES[scheme][0](array).values.tobytes()
    assert abs(array - values.reshape(array.shape)).max() == pytest.approx(layer.metrics.max_abs_error)


# -- the global scale of NVFP4 ----------------------------------------------------------------------------------------

def test_a_layers_first_run_has_its_global_scale(client, monkeypatch):
    monkeypatch.setattr(runs, "RUN_BYTES_MAX", 8 * 512 * 4)
    array = weights((20, 512))
    expected = oracle.nvfp4(array)
    first, second, third = client.quantize({"layer": array}, scheme="NVFP4A16").runs()
    assert first.global_scale.tobytes() == expected.global_scale.tobytes()
    assert second.global_scale is third.global_scale is None
    assert np.array_equal(np.concatenate([run.scales for run in (first, second, third)]), expected.scales)
    assert np.concatenate([run.packed for run in (first, second, third)]).tobytes() == expected.data


def test_what_is_kept_or_failed_has_no_global_scale(client):
    bad = weights((4, 64))
    bad[0, 0] = np.nan
    layers = {"norm": weights((64,)), "bad": bad, "good": weights((4, 64))}
    quantized = client.quantize(layers, scheme="NVFP4A16", on_error="continue", return_kept=True).collect()
    for name in ("norm", "bad"):
        with pytest.raises(quarrel.InvalidInputError, match=f"`{name}`.* has no global_scale"):
            quantized[name].global_scale  # noqa: B018
    assert np.array_equal(quantized["norm"].weights, layers["norm"])
    check(quantized["good"], layers["good"], oracle.nvfp4(layers["good"]))


def fused(names="qkv") -> dict[str, np.ndarray]:
    """Layers of several magnitudes, of which the greatest is 6.5."""
    arrays = {f"{name}_proj": np.clip(weights((8, 64), seed=seed) * 2**seed, -6, 6) for seed, name in enumerate(names)}
    arrays["q_proj"][3, 4] = -6.5
    return arrays


# The ways to say how great the weights of some layers are at most.
AMAX = {
    "a float": dict(scheme="NVFP4A16", amax=6.5),
    "an int": dict(scheme="NVFP4A16", amax=7),
    "numpy's f32": dict(scheme="NVFP4A16", amax=np.float32(6.5)),
    "numpy's f16": dict(scheme="NVFP4A16", amax=np.float16(6.5)),
    "numpy's f64": dict(scheme="NVFP4A16", amax=np.float64(6.5)),
    "bfloat16": dict(scheme="NVFP4A16", amax=ml_dtypes.bfloat16(6.5)),
    "beside ignore": dict(scheme="NVFP4A16", amax=6.5, ignore=["lm_head"]),
    "in a rule": dict(recipe={"rules": [{"targets": ["*"], "scheme": "NVFP4A16", "amax": 6.5}]}),
    "numpy's in a rule": dict(recipe={"rules": [{"targets": ["*"], "scheme": "NVFP4A16", "amax": np.float32(6.5)}]}),
}


@pytest.mark.parametrize("said", AMAX.values(), ids=AMAX)
def test_layers_with_one_amax_have_one_global_scale(client, said):
    layers = fused()
    amax = 7 if said.get("amax") == 7 else 6.5
    results = client.quantize(layers, **said)
    quantized = results.collect()
    for name, array in layers.items():
        check(quantized[name], array, oracle.nvfp4(array, amax))
    assert len({layer.global_scale.item() for layer in quantized.values()}) == 1
    command = results.command["quantize"]
    assert (command["recipe"]["rules"][0] if "recipe" in command else command)["amax"] == amax


def test_a_weight_above_the_amax_names_its_layer(client):
    layers = fused()
    with pytest.raises(quarrel.InvalidInputError, match="6.5.* 6.25") as caught:
        client.quantize(layers, scheme="NVFP4A16", amax=6.25).collect()
    assert (caught.value.reason, caught.value.layer) == ("amax_exceeded", "q_proj")
    quantized = client.quantize(layers, scheme="NVFP4A16", amax=6.25, on_error="continue").collect()
    assert [(layer.status, layer.reason) for layer in quantized.values()] == [
        ("failed", "amax_exceeded"), ("quantized", None), ("quantized", None)]
    assert "failed: amax_exceeded" in quantized.table()


def test_global_scales_travel_with_rows_wherever_they_go(client, monkeypatch, tmp_path):
    """Through Parquet, among layers of other schemes and kept ones, in any chunks, in part."""
    monkeypatch.setattr(runs, "RUN_BYTES_MAX", 8 * 64 * 4)
    layers = {**fused(), "norm": weights((64,)), "o_proj": weights((20, 64)), "up_proj": weights((20, 64), seed=9)}
    rules = [{"targets": ["o_proj"], "scheme": "MXFP6A16"}, {"targets": ["*"], "scheme": "NVFP4A16"}]
    quantized = client.quantize(layers, recipe={"rules": rules}, return_kept=True).collect()
    assert len(quantized["up_proj"].to_arrow()) == 3
    values = {name: oracle.nvfp4(array).values for name, array in layers.items() if array.ndim == 2}
    values |= {"norm": layers["norm"], "o_proj": oracle.mx(layers["o_proj"], 6).values}
    pq.write_table(quantized.to_arrow(), tmp_path / "rows.parquet", row_group_size=2)
    read = pq.read_table(tmp_path / "rows.parquet")
    single = pa.Table.from_batches([batch for batch in read.to_batches(max_chunksize=1)])
    forms = [quantized, quantized.values(), read, single, read.combine_chunks(), pa.RecordBatchReader.from_batches(
        single.schema, single.to_batches())]
    for given in forms:
        found = client.dequantize(given).collect()
        assert list(found) == list(layers)
        assert all(array.tobytes() == values[name].tobytes() for name, array in found.items())
    [one] = client.dequantize([quantized["up_proj"]])
    assert one[1].tobytes() == quantized["up_proj"].dequantize().tobytes() == values["up_proj"].tobytes()


def test_groups_that_do_not_divide_are_kept_of_a_file_and_beside_ignore(client, tmp_path):
    layers = {"odd.weight": weights((4, 24)), "even.weight": weights((4, 64)), "lm_head.weight": weights((4, 64))}
    save_file(layers, tmp_path / "model.safetensors")
    for given, ignore in ((tmp_path / "model.safetensors", None), (layers, ["lm_head"])):
        for scheme in SMALL_FLOAT_TYPES:
            quantized = client.quantize(given, scheme=scheme, ignore=ignore).collect()
            assert [quantized[name].reason for name in layers] == ["group_size_indivisible", None, "ignored"]


# -- shapes, order, kept layers ---------------------------------------------------------------------------------------

def test_fused_experts_have_channels_of_two_dimensions(client):
    array = weights((3, 8, 128))
    [layer] = client.quantize({"experts": array}, scheme="W4A16", channel_dims=2)
    assert layer.scales.shape == (3, 8, 1)
    check(layer, array, oracle.integers(array.reshape(24, 128), 4, group=128))
    [blocks] = client.quantize({"experts": array}, scheme="fp8/b4x64", channel_dims=2)
    assert blocks.scales.shape == (3, 2, 2)
    [floats] = client.quantize({"experts": array}, scheme="MXFP6A16;mx=floor", channel_dims=2)
    assert (floats.scheme, floats.scales.shape) == ("MXFP6A16;channel_dims=2;mx=floor", (3, 8, 4))
    check(floats, array, oracle.mx(array.reshape(24, 128), 6, "floor"))
    [nvfp4] = client.quantize({"experts": array}, scheme="NVFP4A16;channel_dims=2")
    assert (nvfp4.scales.shape, nvfp4.global_scale.shape) == ((3, 8, 8), (1,))
    check(nvfp4, array, oracle.nvfp4(array.reshape(24, 128)))


@pytest.mark.parametrize("said", [{"channel_dims": 2}, {"scheme": "int8;channel_dims=2"}])
def test_experts_too_large_for_a_message_are_cut_within(client, monkeypatch, said):
    """Each expert is larger than a run; with one dimension of channels it would be one channel."""
    monkeypatch.setattr(runs, "RUN_BYTES_MAX", 1024)
    array = weights((2, 6, 128))
    [layer] = client.quantize({"experts": array}, **{"scheme": "int8", **said})
    assert len(layer.to_arrow()) == 6
    check(layer, array, oracle.integers(array.reshape(12, 128), 8))


def test_layers_come_back_in_order_and_one_by_one(client):
    names = [f"layer{number}" for number in range(500)]
    results = client.quantize({name: weights((2, 32), seed=5) for name in names}, scheme="int8")
    assert [layer.name for layer in results] == names
    assert (results.summary.rows, results.summary.layers_quantized) == (500, 500)


def test_a_layer_is_answered_before_the_next_is_made(client):
    """A generator that waits for each answer gets it."""
    answered = queue.Queue()

    def one_by_one():
        for number in range(3):
            yield f"layer{number}", weights((2, 32))
            assert answered.get(timeout=60) == f"layer{number}"

    for layer in client.quantize(one_by_one(), scheme="int8"):
        answered.put(layer.name)
    assert answered.empty()


def test_no_layers_are_no_answers_and_a_summary_of_zeros(client):
    for nothing in ({}, [], iter(())):
        results = client.quantize(nothing, scheme="int8")
        assert list(results) == []
        assert (results.summary.rows, results.summary.bits_per_weight) == (0, None)
    empty = client.quantize({}, scheme="int8").collect()
    for given in ([], empty, empty.to_arrow()):
        assert client.dequantize(given).collect() == {}


def test_a_kept_layer_says_why_and_has_no_codes(client):
    layers = {"model.norm.weight": weights((64,)), "lm_head.weight": weights((4, 64)), "q.weight": weights((4, 64))}
    quantized = client.quantize(layers, scheme="int8", ignore=["@standard"], return_kept=True).collect()
    assert [(layer.status, layer.reason) for layer in quantized.values()] == [
        ("kept", "ignored"), ("kept", "ignored"), ("quantized", None)]
    head = quantized["lm_head.weight"]
    assert np.array_equal(head.weights, layers["lm_head.weight"])
    assert (head.scheme, head.bit_width, head.metrics) == (None, None, None)
    assert list(head.to_numpy()) == ["weights"]
    with pytest.raises(quarrel.InvalidInputError, match="`lm_head.weight`: it is kept and has no codes: `ignore`"):
        head.codes  # noqa: B018
    assert np.array_equal(client.dequantize(quantized).collect()["lm_head.weight"], layers["lm_head.weight"])


def test_kept_layers_without_weights_are_an_error_of_dequantize_with_advice(client):
    quantized = client.quantize({"norm": weights((64,))}, scheme="int8").collect()
    assert quantized["norm"].weights is None and quantized["norm"].to_numpy() == {}
    with pytest.raises(quarrel.InvalidInputError, match="return_kept") as caught:
        client.dequantize(quantized).collect()
    assert caught.value.reason == "kept_without_data"


def test_options_mean_what_the_wire_says(client):
    rows = {"a.q_proj": weights((4, 64)), "a.o_proj": weights((4, 96))}
    recipe = {"rules": [{"targets": ["*.q_proj"], "scheme": "int4", "group_size": 32}], "ignore": ["*.o_proj"]}
    results = client.quantize(rows, recipe=recipe, arith="weight-dtype", on_error="continue", return_kept=True)
    quantized = results.collect()
    assert (quantized["a.q_proj"].scheme, quantized["a.o_proj"].reason) == ("int4/g32", "ignored")
    said = results.command["quantize"]
    assert (said["arith"], said["on_error"], said["return_kept"]) == ("weight-dtype", "continue", True)
    assert client.quantize(rows, profile="edge").collect()["a.q_proj"].status == "quantized"
    fallback = {"schemes": ["int8"], "sqnr_db_min": 30.0}
    assert client.quantize(rows, scheme="int2", fallback=fallback).collect()["a.q_proj"].scheme == "int8"
    kept = client.quantize(rows, scheme="W4A16/g64", on_indivisible="keep").collect()["a.o_proj"]
    assert (kept.status, kept.reason) == ("kept", "group_size_indivisible")


@pytest.mark.parametrize("scheme, options", [("int8", {}), ("W4A16", {}), ("int4", {"group_size": 64}), (
    "int2", {"fallback": {"schemes": ["int4/g64"], "cosine_min": 0.1}}), ("FP8_BLOCK", {})])
def test_ignore_beside_a_scheme_keeps_what_it_names_and_what_groups_do_not_divide(client, scheme, options):
    rows = {"a.q_proj": weights((4, 128)), "lm_head": weights((4, 128))}
    quantized = client.quantize(rows, scheme=scheme, ignore=["lm_head"], **options).collect()
    assert [layer.status for layer in quantized.values()] == ["quantized", "kept"]


def test_a_layer_of_bad_numbers_fails_alone_where_the_command_goes_on(client):
    bad = weights((4, 64))
    bad[2, 5] = np.nan
    quantized = client.quantize({"a": weights((4, 64)), "b": bad}, scheme="int8", on_error="continue").collect()
    assert (quantized["b"].status, quantized["b"].reason) == ("failed", "non_finite")
    assert "`b`" in quantized["b"].message and quantized["a"].status == "quantized"
    assert "failed: non_finite" in quantized.table()


def test_the_table_marks_the_worst_layer_and_says_why_others_are_kept(client):
    layers = {"good": np.sign(weights((4, 128))), "bad": weights((4, 128)), "norm": weights((8,))}
    quantized = client.quantize(layers, scheme="int4").collect()
    text = quantized.table(kept=True).splitlines()
    assert [line.split()[0] for line in text] == ["layer", "good", "bad", "norm", "2"]
    assert [line.endswith("< worst") for line in text] == [False, False, True, False, False]
    assert text[3].endswith("kept: rank_1") and text[4].startswith("2 quantized, 1 kept, 0 failed: 1,024 weights")
    assert quantized.table().splitlines()[3] == "kept: rank_1  1: norm"


def test_progress_counts_to_the_total_and_names_layers(client):
    seen = []
    layers = {name: weights((2600, 512)) for name in "ab"}
    list(client.quantize(layers, scheme="int8", progress=seen.append))
    assert [each.rows for each in seen] == sorted(each.rows for each in seen)
    last = seen[-1]
    assert (last.rows, last.layers, last.layer, last.bytes_total) == (4, 2, "b", 2 * 2600 * 512 * 4)
    assert last.bytes_in == last.bytes_total


@pytest.mark.parametrize("missing", [False, True])
def test_progress_true_shows_layers_on_standard_error(client, capsys, monkeypatch, missing):
    if missing:
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    list(client.quantize({"q_proj": weights()}, scheme="int8", progress=True))
    shown = capsys.readouterr()
    assert "q_proj" in shown.err and shown.out == ""


def test_what_the_server_says_of_itself_is_typed(client):
    info = client.info()
    assert info.contract.startswith("1.") and info.limits["streams_max"] == 32 and "quantize" in info.verbs
    schemes = {scheme.name: scheme for scheme in client.schemes()}
    assert schemes["W4A16"].group_size == 128 and schemes["FP8_BLOCK"].block == (128, 128)
    nvfp4, mxfp6 = schemes["NVFP4A16"], schemes["MXFP6A16"]
    assert (nvfp4.element, nvfp4.bit_width, nvfp4.group_size, nvfp4.packing) == ("fp4_e2m1", 4, 16, "dense-uint8")
    assert (mxfp6.element, mxfp6.bit_width, mxfp6.group_size, mxfp6.packing) == ("fp6_e2m3", 6, 32, "dense-uint8")


def test_an_infinity_of_json_is_a_number():
    assert report.summary(b'{"worst_sqnr_db": "-Infinity", "rows": 1}') == report.Summary(rows=1, worst_sqnr_db=-np.inf)


def test_rows_of_arrow_are_sent_as_they_are(client):
    arrays = {"a": weights((2600, 512)), "b": weights((4, 64))}
    batches = [wire.layer_batch("a", arrays["a"], channels_per_row=100), wire.layer_batch("b", arrays["b"])]
    table = pa.Table.from_batches(batches)
    for given in (table, pa.RecordBatchReader.from_batches(table.schema, batches), batches):
        if given is batches:
            quantized = client.quantize(batches[0], scheme="int8").collect()
        else:
            quantized = client.quantize(given, scheme="int8").collect()
            check(quantized["b"], arrays["b"], oracle.integers(arrays["b"], 8))
        check(quantized["a"], arrays["a"], oracle.integers(arrays["a"], 8))


def test_metadata_of_types_is_those_of_ml_dtypes(client):
    array = weights((8, 64), ml_dtypes.bfloat16)
    [layer] = client.quantize({"a": array}, scheme="int8")
    assert layer.dtype == "bf16"
    check(layer, array, oracle.integers(array, 8))
