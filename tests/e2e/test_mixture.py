"""What a layer becomes does not depend on which others share its batch, and so its unit of work."""

import numpy as np
import pyarrow as pa
import pytest

from harness import wire

# Of one pass and of several, with zero points and without, that search and that do not.
SCHEMES = """int8 int8-asym int8/tensor int8-asym/tensor W8A16 W4A16 W4A16_ASYM int3 int5-asym/g32 FP8_DYNAMIC fp8/tensor FP8_BLOCK fp8/b7x48
    NVFP4A16 MXFP4A16 MXFP6A16 MXFP8A16 nf4 fp4/g128 nf4;double_quant=true int8_rowwise int4/tensor;solver=hqq int4/g32;solver=hqq W4A16_ASYM;solver=hqq
    int6-asym/tensor;solver=hqq int3/tensor;solver=mse int3-asym/tensor;solver=mse W4A16;solver=mse Q8_0 Q4_0 Q5_1 Q4_K Q6_K IQ4_NL MXFP4 NVFP4""".split()


def batches(seed: int) -> tuple[dict, list[pa.RecordBatch]]:
    """Layers in random order, of means far from zero too, each cut into rows somewhere; and the recipe that gives each its scheme."""
    r = np.random.default_rng(seed)
    rules, found = [], []
    for turn, at in enumerate(r.permutation(2 * len(SCHEMES))):
        scheme, name = SCHEMES[at % len(SCHEMES)], f"layer.{turn}"
        weights = r.normal(r.choice([0, 0.5, -3]), 1, (int(r.integers(1, 40)), 256)).astype(np.float32)
        rules.append({"targets": [name], "scheme": scheme})
        found.append(wire.layer_batch(name, weights, channels_per_row=int(r.integers(1, 41))))
    return {"recipe": {"rules": rules}}, found


@pytest.mark.parametrize("seed", range(4))
def test_layers_of_one_batch_are_what_each_is_alone(server, seed):
    recipe, alone = batches(seed)
    together = [pa.Table.from_batches(alone).combine_chunks().to_batches()[0]]
    def quantized(batches):
        return rows(wire.exchange(server.location, {"quantize": recipe}, batches).batches)
    expected, found = quantized(alone), quantized(together)
    assert len(found) == len(expected) == sum(batch.num_rows for batch in alone)
    for one, other in zip(found, expected, strict=True):
        assert one == other, f"{one['layer_name']}, {one['scheme']}"
    assert {row["status"] for row in found} == {"quantized"}


def rows(batches: list[pa.RecordBatch]) -> list[dict]:
    return [row for batch in batches for row in batch.to_pylist()]
