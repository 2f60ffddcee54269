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
    """A whole layer: codes as numbers [channels, columns], or the bits of small floats; scales as the wire's f32, zero
    points or None.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    data: bytes
    values: np.ndarray
    # Elements whose x/scale + zero point lies outside the range of the codes.
    saturated: int
    # What the scales are divided by, [1], or None.
    global_scale: np.ndarray | None = None
    # Bits that a scale is stored in.
    scale_bits: int = 32


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


# By bits of a code: OCP Microscaling Formats 1.0, section 5.3; of E4M3, 0x7f is NaN and no number.
EXPONENT_BITS = {4: 2, 6: 2, 8: 4}


def magnitudes(bits: int) -> np.ndarray:
    """Values of the codes without a sign, by the code, in f64: E2M1, E2M3, E4M3."""
    exponent_bits = EXPONENT_BITS[bits]
    mantissa_bits, bias = bits - 1 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = np.divmod(np.arange(2 ** (bits - 1) - (bits == 8)), 2**mantissa_bits)
    one = np.where(exponent > 0, 1.0, 0.0)  # no leading one where the exponent is the least
    return (one + mantissa / 2**mantissa_bits) * 2.0 ** (np.maximum(exponent, 1) - bias)


def nearest(values: np.ndarray, bits: int) -> np.ndarray:
    """Codes of magnitudes: the nearest, ties to the even one, the largest for what is larger."""
    table = magnitudes(bits)
    middles = (table[:-1] + table[1:]) / 2
    below, above = (np.searchsorted(middles, values, side) for side in ("left", "right"))
    return np.where(below % 2 == 0, below, above)  # they differ at a tie only


def small_floats(ratio: np.ndarray, scale: np.ndarray, bits: int, shape, scales, **more) -> Expected:
    """Codes of `ratio`, x over its `scale`. Of E2M1 what is below zero has a sign, of others -0.0 too."""
    table = magnitudes(bits)
    code = nearest(np.abs(ratio), bits)
    sign = ratio < 0 if bits == 4 else np.signbit(ratio)
    with np.errstate(over="ignore"):
        values = np.where(sign, -table[code], table[code]).astype(F32) * scale
    codes = (code + np.where(sign, 2 ** (bits - 1), 0)).astype(np.uint8).reshape(shape)
    saturated = int((np.abs(ratio) > table[-1]).sum())
    data = stream(codes, bits)
    return Expected(codes, scales.reshape(-1), None, data, values.reshape(shape), saturated, scale_bits=8, **more)


def mx(weights, bits: int, rule="even") -> Expected:
    """MXFP4, MXFP6, MXFP8: groups of 32 under a power of two, 2^(e-127)."""
    x = weights.astype(F32)
    parts = x.reshape(len(x), -1, 32)
    most = np.abs(parts).max(-1)
    offset = {4: 2, 6: 2, 8: 8}[bits]
    if rule == "even":
        e = ((as_bits(most) + {4: 1 << 21, 6: 1 << 19, 8: 1 << 21}[bits]) >> 23) - offset
    elif rule == "floor":
        e = (as_bits(most) >> 23) - offset
    else:
        q = as_bits(most / F32(magnitudes(bits)[-1]))
        e = np.where(q < 0x800000, q > 0x400000, (q + 0x7FFFFF) >> 23)
    e = np.clip(e, 0, 254)
    scale = np.ldexp(F32(1), e - 127)
    ratio = parts * np.ldexp(F32(1), 127 - e)[..., None]
    return small_floats(ratio, scale[..., None], bits, x.shape, scale)


def nvfp4(weights, amax=None) -> Expected:
    """NVFP4: groups of 16 under an E4M3 number, which is divided by one f32 for the layer, made of `amax`."""
    x = weights.astype(F32)
    parts = x.reshape(len(x), -1, 16)
    most = np.abs(parts).max(-1)
    with np.errstate(divide="ignore", over="ignore"):
        global_scale = F32(1) / F32(np.abs(x).max() if amax is None else amax) * F32(2688)
    if not np.isfinite(global_scale):
        global_scale = F32(1)
    local = magnitudes(8)[nearest(global_scale * (most / F32(6)), 8)].astype(F32)
    local = np.where(local == 0, F32(0.125), local)
    scale = (local / global_scale)[..., None]
    return small_floats(parts / scale, scale, 4, x.shape, local, global_scale=np.array([global_scale]))


def as_bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32).astype(np.int64)


def stored_type(weights) -> str:
    """The type a scale is stored in: the weight's own where that is f16 or bf16, else f32."""
    return {"float16": "f16", "bfloat16": "bf16"}.get(weights.dtype.name, "f32")


def rounded(value, stored: str):
    return np.asarray(value, F32).astype(STORED[stored]).astype(F32)


def dense(codes: np.ndarray, bits: int) -> bytes:
    """Offset-binary codes as a little-endian bit stream per channel, filled up to whole 32-bit words."""
    return stream((codes.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint8), bits)


def stream(unsigned: np.ndarray, bits: int) -> bytes:
    """The same of codes that have no sign, or have it in a bit of their own."""
    found = np.unpackbits(unsigned[..., None], axis=-1, count=bits, bitorder="little").reshape(len(unsigned), -1)
    padded = np.pad(found, ((0, 0), (0, -found.shape[1] % 32)))
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
