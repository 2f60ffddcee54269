"""The page for those who come from ArrowQuant V2 is true: its blocks run as a reader would run them, beside MiniLM's
`model.safetensors`, and what it says of numbers and columns holds. What it says of ArrowQuant V2 was read, not run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import quarrel
from harness.server import binary

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from demo import models  # noqa: E402

PAGE = REPOSITORY / "client/python/docs/from_arrowquant_v2.md"
TEXT = PAGE.read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^<!-- test: (\S+) -->\n```python\n(.*?)^```$", TEXT, re.M | re.S))
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
COMMANDS = re.findall(r"^    (quarrel .*)$", TEXT, re.M)

# What `arrow_quant_v2` 0.3.0 gives to Python, and what a config of it holds.
CALLS = """
ArrowQuantV2 AsyncArrowQuantV2 DiffusionQuantConfig from_profile get_markov_metrics load_sharded_safetensors
quantize quantize_arrow quantize_arrow_batch quantize_batch quantize_batch_arrow quantize_batch_with_progress
quantize_diffusion_model quantize_diffusion_model_arrow quantize_from_safetensors quantize_layer_auto
validate_quality
""".split()
OPTIONS = """
bit_width calibration_samples continue_on_error enable_memory_aware_scheduling enable_mixed_precision
enable_simd enable_streaming group_size layer_bit_widths max_memory_limit_mb min_accuracy modality num_threads
num_time_groups progress_callback sensitive_layer_names sensitive_layer_patterns simd_threshold
skip_sensitive_layers target_model_size_mb
""".split()
RESULTS = """
quantized_path compression_ratio cosine_similarity model_size_mb modality bit_width quantization_time_s
per_layer_accuracy passed
""".split()


@pytest.fixture(scope="module")
def client(server):
    with quarrel.connect(server.location) as connected:
        yield connected


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(models.minilm() / "model.safetensors")
    (tmp_path / "quarrel").symlink_to(binary())
    return tmp_path


def run(command, folder):
    package = REPOSITORY / "client/python/src"
    environment = {**os.environ, "PYTHONPATH": str(package), "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)[1]


def normal(shape, seed=0, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 0.02, shape).astype(np.float32)


def test_every_block_of_the_page_is_an_example():
    assert TEXT.count("```python") == TEXT.count("<!-- test:") == len(EXAMPLES) == 10
    assert len(COMMANDS) == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_page_runs_as_printed(folder, name):
    (folder / "example.py").write_text(EXAMPLES[name], encoding="utf-8")
    printed = run([sys.executable, "-W", "error", "example.py"], folder)
    assert printed.strip(), "a reader would not see that it worked"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_writes_the_file_that_it_names(folder, command):
    run(shlex.split(command), folder)
    assert (folder / shlex.split(command)[3]).is_file()


@pytest.mark.parametrize("name", [*CALLS, *OPTIONS, *RESULTS])
def test_the_page_has_an_answer_for(name):
    assert any(re.search(rf"\b{name}\b", code) for code in re.findall(r"`([^`\n]*)`", PROSE))


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXT)
    assert len(links) > 10
    for path, anchor in links:
        text = (PAGE.parent / path).resolve().read_text(encoding="utf-8") if path else TEXT
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in anchors, f"{path}#{anchor}"


def test_the_table_of_columns_names_those_that_come_back(client):
    rows = re.findall(r"^\| (`.*?) \|", section("Arrow tables"), re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    answered = client.quantize({"q_proj": normal((2, 128))}, scheme="W4A16_ASYM").collect().to_arrow()
    assert named == set(answered.column_names)
    assert answered.schema.field("quantized_data").type == pa.large_binary()
    assert answered.schema.field("scales").type.value_type == pa.float32()
    assert answered.schema.field("zero_points").type.value_type == pa.int32()
    assert answered.schema.field("bit_width").type == pa.uint8()


@pytest.mark.parametrize("mean", [0.0, 0.01, -0.03])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_nearest_scheme_has_the_scale_of_before_and_codes_one_off_at_most(client, bits, mean):
    array = normal((64, 128), bits, mean)
    assert array.min() < 0 < array.max()
    scale = (array.max() - array.min()) / np.float32(2**bits - 1)
    zero_point = -array.min() / scale
    codes = np.clip(np.round(array / scale + zero_point), 0, 2**bits - 1)

    [layer] = client.quantize({"q_proj": array}, scheme=f"int{bits}-asym/tensor")
    offset = 2 ** (bits - 1)
    assert layer.scales.tolist() == [scale]
    assert abs(layer.zero_points[0] + offset - zero_point) <= 0.5
    assert np.abs(layer.codes.astype(int) + offset - codes).max() <= 1


def test_a_range_without_zero_is_widened_to_it(client):
    array = np.linspace(1, 3, 256, dtype=np.float32).reshape(2, 128)
    [layer] = client.quantize({"q_proj": array}, scheme="int8-asym/tensor")
    assert layer.scales.tolist() == [np.float32(3) / np.float32(255)]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_scales_and_groups_are_as_the_page_says(client, bits):
    array = normal((4, 256))
    [layer] = client.quantize({"q_proj": array}, scheme=f"int{bits}/g64")
    magnitude = np.abs(array.reshape(4, 4, 64)).max(axis=-1)
    assert np.array_equal(layer.scales, magnitude / np.float32((2**bits - 1) / 2))
    assert layer.zero_points is None
    assert layer.packed.nbytes == array.size * bits // 8


def table(shape, **more):
    return pa.table({"layer_name": ["bias"], "weights": [normal(1000)], **shape, **more})


@pytest.mark.parametrize(
    ("shape", "status"), [({"shape": [[1000]]}, "kept"), ({"shape": [[1, 1000]]}, "quantized"), ({}, "quantized")]
)
def test_a_layer_of_rank_1_is_kept_unless_its_shape_is_left_out_or_widened(client, shape, status):
    [layer] = client.quantize(table(shape), scheme="int4")
    assert (layer.status, layer.reason) == (status, "rank_1" if status == "kept" else None)


def test_a_column_of_ones_own_is_an_error(client):
    with pytest.raises(quarrel.InvalidInputError) as raised:
        client.quantize(table({}, note=["mine"]), scheme="int4").collect()
    assert raised.value.reason == "column_unexpected"


def test_all_chunks_of_a_table_come_back_in_their_order(client):
    names = ["z", "a", "m"]
    chunks = [table({}).set_column(0, "layer_name", pa.array([name])) for name in names]
    assert list(client.quantize(pa.concat_tables(chunks), scheme="int4").collect()) == names


def test_what_a_callback_raises_is_raised(client):
    def callback(_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        client.quantize({"q_proj": normal((2, 128))}, scheme="int8", progress=callback).collect()


@pytest.mark.parametrize(("profile", "indivisible"), [("edge", "quantized"), ("local", "kept"), ("cloud", "kept")])
def test_a_profile_is_what_the_page_says(client, profile, indivisible):
    [row] = re.findall(rf"^\| `{profile}` \|.*\| (.*?) \|$", section("Profiles"), re.M)
    layers = {"q_proj": normal((2, 256)), "lm_head.weight": normal((2, 256)), "odd": normal((2, 100))}
    quantized = client.quantize(layers, profile=profile).collect()
    assert quantized["q_proj"].scheme in re.findall(r"`(.*?)`", row)
    assert profile != "edge" or quantized["q_proj"].metrics.sqnr_db >= 18
    assert quantized["lm_head.weight"].reason == "ignored"
    assert quantized["odd"].status == indivisible


NAMES = """
model.embed_tokens.weight Model.Embedding.weight transformer.wte.weight wte.weight transformer.wpe.weight
x.norm1.weight blocks.0.ln_1.weight RMSNorm.scale lm_head.weight model.head.weight ahead.weight head.weight
model.heads.weight layers.0.output.dense.weight layers.0.OutProj.weight pooler.dense.weight q_proj.weight
k_proj swte.weight
""".split()
SKIPPED = ("embed", "embedding", ".wte.", ".wpe.", "norm", "ln_", "layernorm", "lm_head", ".head.", "output", "pooler")


def test_the_pattern_for_sensitive_layers_names_those_that_were_skipped(client):
    [pattern] = re.findall(r'^as_before = r"(re:.*?)"', EXAMPLES["sensitive"], re.M)
    layers = client.quantize({name: normal((2, 8)) for name in NAMES}, scheme="int4", ignore=[pattern])
    kept = [layer.name for layer in layers if layer.reason == "ignored"]
    assert kept == [name for name in NAMES if any(part in name.lower() for part in SKIPPED)]
    assert 5 < len(kept) < len(NAMES)
