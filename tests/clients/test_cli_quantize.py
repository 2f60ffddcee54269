"""`quarrel quantize`: the same file wherever it is made, a report that says what the wire says, what options mean."""

import json
import os
from functools import cache

import ml_dtypes
import numpy as np
import pytest

from golden import cases
from harness import cli, wire
from harness.command import recipe
from harness.server import Server

BF16 = ml_dtypes.bfloat16
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
REPORT_FIELDS = {
    "source", "destination", "server", "quarrel", "contract", "cpu_level", "command", "seconds", "totals", "layers",
    "left_out",
}
TOTALS_FIELDS = {
    "quantized", "kept", "failed", "elements", "bits_per_weight", "worst_layer", "worst_sqnr_db", "source_bytes",
    "destination_bytes",
}
LAYER_FIELDS = {"name", "status", "reason", "message", "dtype", "shape", "scheme", "metrics", "tensors", "bytes"}
METRICS_FIELDS = {"elements", "mse", "sqnr_db", "cosine", "max_abs_error", "amax", "saturated", "bits_per_weight"}
# What two reports of one command may differ in.
OF_THE_RUN = ("server", "seconds", "destination", "cpu_level")


def normal(name: str, shape, dtype=np.float32) -> np.ndarray:
    return (cases.normal(cases.generator(f"cli {name}"), shape) * 0.05).astype(dtype)


@cache
def model() -> dict[str, np.ndarray]:
    """Three types, a layer of several runs (12 MiB), and what is copied."""
    return {
        "lm_head.weight": normal("head", (8, 256)),
        f"{ATTENTION}.q_proj.weight": normal("q", (130, 256), BF16),
        f"{ATTENTION}.q_proj.bias": normal("bias", (130,), BF16),
        f"{ATTENTION}.v_proj.weight": normal("v", (20, 256), np.float16),
        f"{MLP}.up_proj.weight": normal("up", (3072, 1024)),
        f"{MLP}.down_proj.weight": normal("down", (12, 100)),
        f"{MLP}.gate_proj.weight": normal("gate", (64, 256), np.float64),
        "model.norm.weight": np.ones(256, np.float32),
        "model.position_ids": np.arange(16).reshape(1, 16),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cli.write(tmp_path_factory.mktemp("source") / "model.safetensors", model())


@pytest.fixture(scope="module")
def unix_server(tmp_path_factory):
    running = Server.start(listen=f"unix:{tmp_path_factory.mktemp('unix')}/s")
    yield running
    running.end()


def report_of(destination) -> dict:
    return json.loads(destination.with_suffix(".report.json").read_text())


def layers_of(destination) -> dict[str, dict]:
    return {layer["name"]: layer for layer in report_of(destination)["layers"]}


def outcomes(destination) -> dict[str, str]:
    """The scheme of each layer, or why it has none."""
    return {name: layer["scheme"] or layer["reason"] for name, layer in layers_of(destination).items()}


# -- the same everywhere ----------------------------------------------------------------------------------------------

EVERYWHERE = [
    ("--scheme", "W4A16_ASYM"), ("--scheme", "FP8_BLOCK"), ("--scheme", "int8/tensor"), ("--profile", "edge"),
]


@pytest.mark.parametrize("how", EVERYWHERE, ids=" ".join)
def test_a_file_is_the_same_wherever_it_is_made(how, source, server, unix_server, tmp_path):
    host = server.location.removeprefix("grpc://")
    places = {
        "here": (), "here again": (), "one thread": ("--threads", 1), "scalar": ("--cpu-level", "scalar"),
        "tcp": ("--server", server.location), "host and port": ("--server", host),
        "four streams": ("--server", server.location, "--streams", 4),
        "unix": ("--server", unix_server.location.replace("grpc+unix://", "unix:")),
        "unix as it is printed": ("--server", unix_server.location, "--streams", 4),
    }
    made, reports = {}, {}
    for place, flags in places.items():
        destination = tmp_path / f"{place}.safetensors"
        cli.quantize(source, destination, *how, *flags)
        made[place] = destination.read_bytes()
        reports[place] = {key: value for key, value in report_of(destination).items() if key not in OF_THE_RUN}

    assert [place for place in places if made[place] != made["here"]] == []
    assert [place for place in places if reports[place] != reports["here"]] == []


def test_the_report_says_where_it_was_done(source, server, tmp_path):
    cli.quantize(source, tmp_path / "here.safetensors", "-s", "int8")
    cli.quantize(source, tmp_path / "there.safetensors", "-s", "int8", "--server", server.location)

    assert report_of(tmp_path / "here.safetensors")["server"] is None
    assert report_of(tmp_path / "there.safetensors")["server"] == server.location


# -- the report -------------------------------------------------------------------------------------------------------

def test_the_report_holds_a_word_on_every_tensor(source, tmp_path):
    destination = tmp_path / "made.safetensors"
    cli.quantize(source, destination, "--scheme", "W4A16")
    report, written = report_of(destination), cli.read(destination).tensors

    assert report.keys() == REPORT_FIELDS and report["totals"].keys() == TOTALS_FIELDS
    assert [layer["name"] for layer in report["layers"]] == list(model()), "not in the order of the source"
    assert sorted(name for layer in report["layers"] for name in layer["tensors"]) == sorted(written)
    for layer in report["layers"]:
        tensor = model()[layer["name"]]
        assert layer.keys() == LAYER_FIELDS
        assert (layer["dtype"], layer["shape"]) == (cli.NAMES[tensor.dtype], list(tensor.shape))
        if layer["status"] == "quantized":
            assert layer["metrics"].keys() == METRICS_FIELDS
            assert layer["reason"] is None and layer["message"] is None
        else:
            assert layer["status"] == "kept" and layer["metrics"] is None and layer["scheme"] is None
            assert layer["tensors"] == [layer["name"]] and layer["name"] in layer["message"]
            assert np.array_equal(written[layer["name"]], tensor)
    assert outcomes(destination) == {
        "lm_head.weight": "ignored", f"{ATTENTION}.q_proj.weight": "W4A16", f"{ATTENTION}.q_proj.bias": "not_a_weight",
        f"{ATTENTION}.v_proj.weight": "W4A16", f"{MLP}.up_proj.weight": "W4A16",
        f"{MLP}.down_proj.weight": "group_size_indivisible", f"{MLP}.gate_proj.weight": "W4A16",
        "model.norm.weight": "ignored", "model.position_ids": "not_float",
    }


def test_totals_are_those_of_the_layers(source, tmp_path):
    destination = tmp_path / "made.safetensors"
    cli.quantize(source, destination, "--scheme", "W4A16")
    report = report_of(destination)
    totals, layers = report["totals"], report["layers"]
    measured = [layer for layer in layers if layer["metrics"]]
    worst = min(measured, key=lambda layer: layer["metrics"]["sqnr_db"])
    elements = sum(layer["metrics"]["elements"] for layer in measured)
    bits = sum(layer["metrics"]["bits_per_weight"] * layer["metrics"]["elements"] for layer in measured)

    assert (totals["quantized"], totals["kept"], totals["failed"]) == (4, 5, 0)
    assert totals["elements"] == elements == sum(model()[layer["name"]].size for layer in measured)
    assert totals["bits_per_weight"] == pytest.approx(bits / elements, rel=1e-12)
    assert (totals["worst_layer"], totals["worst_sqnr_db"]) == (worst["name"], worst["metrics"]["sqnr_db"])
    assert totals["source_bytes"] == sum(tensor.nbytes for tensor in model().values())
    assert totals["destination_bytes"] == destination.stat().st_size


@pytest.mark.parametrize("scheme", ["W4A16", "int4-asym/tensor", "FP8_BLOCK"])
def test_the_report_measures_what_the_wire_measures(scheme, source, server, tmp_path):
    destination = tmp_path / "made.safetensors"
    cli.quantize(source, destination, "--scheme", scheme)
    report = report_of(destination)
    quantized = [layer for layer in report["layers"] if layer["status"] == "quantized"]
    assert len(quantized) >= 4

    for layer in quantized:
        batch = wire.layer_batch(layer["name"], model()[layer["name"]], channels_per_row=128)
        reply = wire.exchange(server.location, {"quantize": {"scheme": scheme}}, [batch])
        assert layer["metrics"] == reply.layer(layer["name"]).metrics, layer["name"]
        assert layer["scheme"] == reply.rows[-1]["scheme"]


def test_the_report_echoes_the_effective_command(source, server, tmp_path):
    cli.quantize(source, tmp_path / "made.safetensors", "--scheme", "W4A16", "--ignore", "re:x+")
    rule = {"targets": ["*"], "scheme": "W4A16", "on_indivisible": "keep"}
    same = recipe(rule, ignore=["@standard", "re:x+"])
    reply = wire.exchange(server.location, same, [wire.layer_batch("a", normal("a", (2, 128)))])

    assert report_of(tmp_path / "made.safetensors")["command"] == json.loads(reply.schema_metadata["quarrel.command"])


def test_the_report_goes_where_it_is_told(source, tmp_path):
    told = tmp_path / "elsewhere.json"
    cli.quantize(source, tmp_path / "made.safetensors", "-s", "int8", "--report", told)

    assert json.loads(told.read_text())["destination"] == str(tmp_path / "made.safetensors")
    assert sorted(tmp_path.iterdir()) == [told, tmp_path / "made.safetensors"]


def test_the_files_are_readable_by_whom_any_new_file_is(source, tmp_path):
    cli.quantize(source, tmp_path / "made.safetensors", "-s", "int8", preexec_fn=lambda: os.umask(0o027))

    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"made.safetensors": "0o640", "made.report.json": "0o640"}


def test_a_destination_may_have_the_longest_name_that_there_is(source, tmp_path):
    """255 bytes: the names that it has before it is complete must not be longer."""
    longest = "n" * (255 - len(".report.json")) + ".safetensors"
    cli.quantize(source, tmp_path / longest, "-s", "int8")

    assert (tmp_path / longest).is_file() and len(list(tmp_path.iterdir())) == 2


def test_the_metadata_of_the_source_stays_and_the_schemes_are_added(source, tmp_path):
    cli.write(tmp_path / "in.safetensors", {"a.weight": normal("a", (4, 128))}, {"format": "np", "who": "I"})
    cli.quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "-s", "int8")

    metadata = cli.read(tmp_path / "out.safetensors").metadata
    assert json.loads(metadata.pop("quarrel.schemes")) == {"int8": ["a"]}
    assert metadata == {"format": "np", "who": "I"}


def test_what_was_quantized_before_is_still_known_after_a_second_run(tmp_path):
    """8 columns fill one word at 2, 3 and 4 bits: only the metadata says which of them `mlp` has."""
    first, second, third, dense = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third", "dense"))
    cli.write(first, {"mlp.weight": normal("mlp", (16, 8)), "attention.weight": normal("attention", (16, 8))})
    cli.quantize(first, second, "-s", "int3", "--ignore", "attention")
    cli.quantize(second, third, "-s", "int8")

    assert json.loads(cli.read(third).metadata["quarrel.schemes"]) == {"int3": ["mlp"], "int8": ["attention"]}
    cli.done("dequantize", third, dense)
    assert cli.read(dense).tensors.keys() == {"mlp.weight", "attention.weight"}


# -- options ----------------------------------------------------------------------------------------------------------

def small() -> dict[str, np.ndarray]:
    return {
        "lm_head.weight": normal("head", (8, 256)), "a.up.weight": normal("up", (16, 256)),
        "a.down.weight": normal("down", (16, 96)), "b.up.weight": normal("b", (16, 256), BF16),
        "b.norm.weight": np.ones(256, np.float32), "experts.weight": normal("experts", (2, 4, 128)),
    }


ALL = {"a.up.weight", "a.down.weight", "b.up.weight", "experts.weight"}
OPTIONS = [
    ("group size", ("-s", "W4A16", "--group-size", 32), dict.fromkeys(ALL, "W4A16/g32")),
    ("group size of intN", ("-s", "int4", "--group-size", 32), dict.fromkeys(ALL, "int4/g32")),
    ("indivisible is kept", ("-s", "W4A16"),
     dict.fromkeys(ALL, "W4A16") | {"a.down.weight": "group_size_indivisible"}),
    ("indivisible is kept when told", ("-s", "W4A16", "--on-indivisible", "keep"),
     dict.fromkeys(ALL, "W4A16") | {"a.down.weight": "group_size_indivisible"}),
    ("nothing is standard", ("-s", "int8", "--no-standard"),
     dict.fromkeys(ALL | {"lm_head.weight"}, "int8") | {"b.norm.weight": "rank_1"}),
    ("a name is ignored", ("-s", "int8", "--ignore", "a.up"), dict.fromkeys(ALL, "int8") | {"a.up.weight": "ignored"}),
    ("a glob is ignored", ("-s", "int8", "--ignore", "a.*", "--ignore", "exp*"), {"b.up.weight": "int8"}),
    ("a regex is ignored", ("-s", "int8", "--ignore", "re:.*up"),
     {"a.down.weight": "int8", "experts.weight": "int8"}),
    ("channel dims", ("-s", "int8", "--channel-dims", 2, "--ignore", "[ab].*"),
     {"experts.weight": "int8;channel_dims=2"}),
    ("the profile local", ("--profile", "local"),
     dict.fromkeys(ALL, "W4A16") | {"a.down.weight": "group_size_indivisible"}),
    ("the profile cloud", ("--profile", "cloud"),
     dict.fromkeys(ALL, "W8A16") | {"a.down.weight": "group_size_indivisible"}),
    # Normal numbers: int2 has about 6 dB, int4/g128 19. 96 columns are neither 64's nor 128's, so int8.
    ("the profile edge", ("--profile", "edge"), dict.fromkeys(ALL, "int4/g128") | {"a.down.weight": "int8"}),
]


@pytest.mark.parametrize("flags, expected", [row[1:] for row in OPTIONS], ids=[row[0] for row in OPTIONS])
def test_options_say_what_becomes_of_each_layer(flags, expected, tmp_path):
    destination = tmp_path / "out.safetensors"
    cli.quantize(cli.write(tmp_path / "in.safetensors", small()), destination, *flags)

    found = outcomes(destination)
    assert found == dict.fromkeys(small(), "ignored") | expected
    written = cli.read(destination).tensors
    for name, tensor in small().items():
        if found[name] in ("ignored", "rank_1", "group_size_indivisible"):
            assert written[name].dtype == tensor.dtype and np.array_equal(written[name], tensor)


def test_two_channel_dimensions_make_a_scale_for_each_expert_and_row(tmp_path):
    cli.write(tmp_path / "in.safetensors", {"experts.weight": normal("experts", (2, 4, 128))})
    cli.quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "-s", "int4", "--channel-dims", 2)

    written = cli.read(tmp_path / "out.safetensors").tensors
    assert written["experts.weight_scale"].shape == (2, 4, 1)
    assert written["experts.weight_packed"].shape == (2, 4, 16)
    assert written["experts.weight_shape"].tolist() == [2, 4, 128]


@pytest.mark.parametrize("arith", ["f32", "weight-dtype"])
def test_arith_is_that_of_the_wire(arith, server, tmp_path):
    layer = normal("arith", (64, 256), BF16)
    cli.write(tmp_path / "in.safetensors", {"a.weight": layer})
    cli.quantize(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "-s", "int8", "--arith", arith)
    codes = {
        other: wire.exchange(server.location, {"quantize": {"scheme": "int8", "arith": other}},
                             [wire.layer_batch("a", layer)]).layer("a").codes
        for other in ("f32", "weight-dtype")
    }

    assert codes["f32"] != codes["weight-dtype"], "the layer does not tell the two apart"
    assert cli.read(tmp_path / "out.safetensors").tensors["a.weight"].tobytes() == codes[arith]


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPE_YAML = """\
# Attention is dear.
rules:
  - targets: [a.*]
    scheme: W4A16
    group_size: 32
  - targets: ["re:b\\\\.up", Linear]
    scheme: int4
    fallback: {schemes: [int8], sqnr_db_min: 30}
ignore: ["@standard", "experts"]
"""
RECIPE = {
    "rules": [
        {"targets": ["a.*"], "scheme": "W4A16", "group_size": 32},
        {"targets": ["re:b\\.up", "Linear"], "scheme": "int4", "fallback": {"schemes": ["int8"], "sqnr_db_min": 30}},
    ],
    "ignore": ["@standard", "experts"],
}


def test_a_recipe_is_the_same_in_yaml_and_in_json(tmp_path):
    source = cli.write(tmp_path / "in.safetensors", small())
    made = []
    for ending, text in (("yaml", RECIPE_YAML), ("yml", RECIPE_YAML), ("json", json.dumps(RECIPE)),
                         ("txt", json.dumps(RECIPE))):
        (tmp_path / f"recipe.{ending}").write_text(text)
        destination = tmp_path / f"{ending}.safetensors"
        cli.quantize(source, destination, "--recipe", tmp_path / f"recipe.{ending}")
        made.append(destination.read_bytes())
        assert outcomes(destination) == {
            "lm_head.weight": "ignored", "a.up.weight": "W4A16/g32", "a.down.weight": "W4A16/g32",
            "b.up.weight": "int8", "b.norm.weight": "ignored", "experts.weight": "ignored",
        }

    assert made == made[:1] * 4


def test_a_recipe_may_come_through_a_pipe(tmp_path):
    """As bash's `<(...)` gives it."""
    source = cli.write(tmp_path / "in.safetensors", small())
    (tmp_path / "recipe.yaml").write_text(RECIPE_YAML)
    cli.quantize(source, tmp_path / "file.safetensors", "--recipe", tmp_path / "recipe.yaml")
    into = {"stdin": None, "input": RECIPE_YAML}
    cli.quantize(source, tmp_path / "pipe.safetensors", "--recipe", "/dev/stdin", **into)

    assert (tmp_path / "pipe.safetensors").read_bytes() == (tmp_path / "file.safetensors").read_bytes()


def test_a_ladder_keeps_what_no_rung_brings_over_its_threshold(tmp_path):
    source = cli.write(tmp_path / "in.safetensors", small())
    rule = {"targets": ["*"], "scheme": "int4", "fallback": {"schemes": ["int8"], "sqnr_db_min": 99}}
    (tmp_path / "recipe.json").write_text(json.dumps({"rules": [rule]}))
    cli.quantize(source, tmp_path / "out.safetensors", "--recipe", tmp_path / "recipe.json")

    found = layers_of(tmp_path / "out.safetensors")
    assert found["a.up.weight"]["status"] == "kept" and found["a.up.weight"]["reason"] == "below_threshold"
    written = cli.read(tmp_path / "out.safetensors").tensors
    assert written.keys() == small().keys()
    assert all(np.array_equal(written[name], tensor) for name, tensor in small().items())


def test_layers_that_fail_stay_as_they_were_where_the_command_goes_on(tmp_path):
    broken = small()
    broken["a.up.weight"][0, 7] = np.nan
    source, destination = cli.write(tmp_path / "in.safetensors", broken), tmp_path / "out.safetensors"
    ended = cli.run("quantize", source, destination, "-s", "int8", "--on-error", "continue")

    cli.check_refusal(ended, 6, "`a.up.weight`", "7", "NaN")
    layer = layers_of(destination)["a.up.weight"]
    assert (layer["status"], layer["reason"], layer["metrics"]) == ("failed", "non_finite", None)
    assert "`a.up.weight`" in layer["message"]
    assert report_of(destination)["totals"]["failed"] == 1 and outcomes(destination)["b.up.weight"] == "int8"
    written = cli.read(destination).tensors
    assert written["a.up.weight"].tobytes() == broken["a.up.weight"].tobytes()
    assert "a.up.weight_scale" not in written and "b.up.weight_scale" in written
