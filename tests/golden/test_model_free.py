"""The bytes of a quantized model's folder are those of llm-compressor's `model_free_ptq`, whose digests `model_free.py` keeps."""

import json

import pytest

from golden.model_free import EXPERT_SCHEMES, FILE, SCHEMES, digests, write_mixture
from harness import cli
from harness.model import tensors, write_model

GOLDEN = json.loads(FILE.read_text())


def test_every_scheme_has_its_digests():
    assert GOLDEN["schemes"].keys() == set(SCHEMES) and GOLDEN["experts"].keys() == set(EXPERT_SCHEMES)
    for scheme, found in GOLDEN["schemes"].items():
        assert len(found) > len(tensors()), scheme


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_is_what_model_free_ptq_makes_of_it(scheme, shards, tmp_path):
    """However many files it lies in. Its arithmetic on a CPU is that of the weights' own type."""
    model = write_model(tmp_path / "model", shards=shards)
    same(model, scheme, GOLDEN["schemes"][scheme], tmp_path)


@pytest.mark.parametrize("scheme", EXPERT_SCHEMES)
def test_fused_experts_are_split_as_model_free_ptq_splits_them(scheme, tmp_path):
    same(write_mixture(tmp_path / "model"), scheme, GOLDEN["experts"][scheme], tmp_path)


def same(model, scheme, expected, tmp_path):
    cli.quantize(model, tmp_path / "out", "-s", scheme, "--arith", "weight-dtype")
    found = digests(tmp_path / "out")
    assert found.keys() == expected.keys()
    unlike = [name for name in expected if found[name] != expected[name]]
    assert not unlike, (unlike[:4], found[unlike[0]], expected[unlike[0]])
