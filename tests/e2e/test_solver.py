"""`;solver=mse`: of every group the range that makes the least squared error, judged in plain f64."""

import numpy as np
import pytest

from harness import wire

F32 = np.float32
CHANNELS, COLUMNS = 12, 256
# Scheme, bits, columns that share a scale (None: the whole layer), asymmetric.
SCHEMES = {
    "int2;solver=mse": (2, COLUMNS, False),
    "int3/g32;solver=mse": (3, 32, False),
    "W4A16;solver=mse": (4, 128, False),
    "W8A8;solver=mse": (8, COLUMNS, False),
    "int4/tensor;solver=mse": (4, None, False),
    "int3-asym/g64;solver=mse": (3, 64, True),
    "int4-asym/tensor;solver=mse": (4, None, True),
}


def weights() -> np.ndarray:
    """Normal, with outliers that are worth clipping in every third channel, zeros and a constant."""
    r = np.random.default_rng(7)
    array = r.normal(0, 0.05, (CHANNELS, COLUMNS)).astype(F32)
    array[::3, ::97] *= 6
    array[4], array[5] = 0, 0.25
    return array


def clips(groups: np.ndarray, bits: int, asymmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scales [groups, 49] by SPEC.md, and the squared error that each makes, in f64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    part = ((64 - np.arange(49)) / 64).astype(F32)
    least = np.minimum(groups.min(1), 0)[:, None] * part
    most = np.maximum(groups.max(1), 0)[:, None] * part
    if asymmetric:
        scales = (most - least) / F32(high - low)
        with np.errstate(invalid="ignore"):
            points = np.rint(np.clip(F32(low) - least / scales, low, high))
        points = np.nan_to_num(points).astype(F32)
    else:
        scales, points = np.maximum(-least, most) / F32((high - low) / 2), np.zeros_like(least)
    scales = np.where(scales == 0, F32(2**-23), scales)
    x = groups[:, None, :]
    codes = np.rint(np.clip(x / scales[..., None] + points[..., None], low, high))
    decoded = (codes - points[..., None]) * scales[..., None]
    return scales, ((x.astype(np.float64) - decoded) ** 2).sum(2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_of_each_group_makes_the_least_error(server, scheme):
    bits, group, asymmetric = SCHEMES[scheme]
    array = weights()
    reply = wire.exchange(
        server.location, {"quantize": {"scheme": scheme}}, [wire.layer_batch("layer", array, channels_per_row=5)]
    )
    layer = reply.layer("layer")
    assert layer.rows[0]["scheme"] == scheme

    scales, errors = clips(array.reshape(-1, group or array.size), bits, asymmetric)
    chosen = [np.flatnonzero(row == scale) for row, scale in zip(scales, layer.scales, strict=True)]
    assert all(len(places) for places in chosen), "a scale is none of those that are tried"
    of_chosen = np.array([row[places].min() for row, places in zip(errors, chosen, strict=True)])
    # The server sums in f32, and may be off where two ranges are as good.
    assert (of_chosen <= errors.min(1) * (1 + 1e-5)).all()
    assert layer.metrics["mse"] == pytest.approx(of_chosen.sum() / array.size, rel=1e-6)
    assert of_chosen.sum() < 0.98 * errors[:, 0].sum() or bits == 8
    assert (np.asarray(layer.scales)[errors.max(1) == 0] == scales[errors.max(1) == 0, 0]).all(), "the widest of equals"


def test_a_layer_that_is_as_good_without_clipping_is_as_it_was(server):
    array = np.tile(np.arange(-8, 8, dtype=F32), (4, 16)) / 8
    found = [
        wire.exchange(server.location, {"quantize": {"scheme": scheme}}, [wire.layer_batch("layer", array)]).layer("layer")
        for scheme in ("int4/g32", "int4/g32;solver=mse")
    ]
    assert found[1].metrics["mse"] <= found[0].metrics["mse"]


@pytest.mark.parametrize("scheme", ["fp8/channel", "NVFP4A16", "MXFP4A16"])
def test_floats_have_no_solver(server, scheme):
    with pytest.raises(Exception, match="scheme_unknown"):
        wire.exchange(server.location, {"quantize": {"scheme": f"{scheme};solver=mse"}}, [wire.layer_batch("x", weights())])
