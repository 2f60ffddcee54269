"""The formulas of SPEC.md in numpy, as plain as they can be: f32 arithmetic, clamp, round half to even.

Slow, whole layers only, rank 2 only. The golden files hold both against
compressed-tensors.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

F32 = np.float32
EPS = {"f32": 2.0**-23, "bf16": 2.0**-7, "f16": 2.0**-10}
STORED = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


@dataclass
class Expected:
    """A whole layer: codes as numbers [channels, columns], scales as the wire's f32, zero points or None."""

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    data: bytes
    values: np.ndarray
    # Elements whose x/scale + zero point lies outside the range of the codes.
    saturated: int


def integers(weights, bits: int, *, group=None, per_tensor=False, asymmetric=False, packing=None) -> Expected:
    """`intN`: symmetric by default, a scale per channel unless `group` or `per_tensor`. `packing`: dense or plain."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    stored = stored_type(weights)
    x = weights.astype(F32)
    parts = x.reshape(1, 1, -1) if per_tensor else x.reshape(len(x), -1, group or x.shape[1])
    least = np.minimum(parts.min(-1, keepdims=True), F32(0))
    most = np.maximum(parts.max(-1, keepdims=True), F32(0))
    if asymmetric:
        scale = rounded((most - least) / F32(high - low), stored)
        with np.errstate(divide="ignore", invalid="ignore"):
            point = F32(low) - least / scale
        point = np.where(np.isnan(point), F32(0), np.rint(np.clip(point, F32(low), F32(high))))
    else:
        scale = rounded(np.maximum(-least, most) / F32((high - low) / 2), stored)
        point = None
    scale = np.where(scale == 0, F32(EPS[stored]), scale)
    with np.errstate(over="ignore"):
        ratio = parts / scale if point is None else parts / scale + point
    codes = np.rint(np.clip(ratio, F32(low), F32(high)))
    values = ((codes if point is None else codes - point) * scale).reshape(x.shape)
    codes = codes.astype(np.int8).reshape(x.shape)
    plain = packing == "plain" or (packing is None and bits == 8)
    data = codes.tobytes() if plain else dense(codes, bits)
    zero_points = None if point is None else point.astype(np.int32).reshape(-1)
    saturated = int(((ratio < low) | (ratio > high)).sum())
    return Expected(codes, scale.astype(F32).reshape(-1), zero_points, data, values, saturated)


def fp8(weights, *, per_tensor=False, block=None) -> Expected:
    """FP8 E4M3: a scale per channel unless `per_tensor` or `block`."""
    stored = stored_type(weights)
    x = weights.astype(F32)
    rows, columns = block or ((len(x), x.shape[1]) if per_tensor else (1, x.shape[1]))
    scales = np.empty((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), F32)
    codes, values, saturated = np.empty(x.shape, ml_dtypes.float8_e4m3fn), np.empty(x.shape, F32), 0
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            at = np.s_[r * rows:(r + 1) * rows, c * columns:(c + 1) * columns]
            scale = rounded(np.abs(x[at]).max() / F32(448), stored)
            scales[r, c] = scale if scale else EPS[stored]
            ratio = x[at] / scales[r, c]
            codes[at] = np.clip(ratio, F32(-448), F32(448)).astype(ml_dtypes.float8_e4m3fn)
            saturated += int((np.abs(ratio) > 448).sum())
            values[at] = codes[at].astype(F32) * scales[r, c]
    return Expected(codes, scales.reshape(-1), None, codes.tobytes(), values, saturated)


def stored_type(weights) -> str:
    """The type a scale is stored in: the weight's own where that is f16 or bf16, else f32."""
    return {"float16": "f16", "bfloat16": "bf16"}.get(weights.dtype.name, "f32")


def rounded(value, stored: str):
    return np.asarray(value, F32).astype(STORED[stored]).astype(F32)


def dense(codes: np.ndarray, bits: int) -> bytes:
    """Offset-binary codes as a little-endian bit stream per channel, filled up to whole 32-bit words."""
    unsigned = (codes.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint8)
    stream = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    padded = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(padded, axis=-1, bitorder="little").tobytes()


def metrics(weights, expected: Expected) -> dict:
    """Quality by definition, in f64, from the emitted codes."""
    x, y = weights.astype(F32).astype(np.float64).ravel(), expected.values.astype(np.float64).ravel()
    error = x - y
    signal, noise, rebuilt = x @ x, error @ error, y @ y
    return {
        "elements": x.size,
        "mse": noise / x.size,
        "sqnr_db": 10 * np.log10(signal / noise) if signal and noise else None,
        "cosine": (x @ y) / np.sqrt(signal * rebuilt) if signal and rebuilt else None,
        "max_abs_error": np.abs(error).max(),
        "amax": np.abs(x).max(),
        "saturated": expected.saturated,
    }


def crc32c(data: bytes) -> int:
    """Castagnoli, reflected, bit by bit: check value of b"123456789" is 0xe3069283."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
