"""What the answers must be: the pinned formula in plain numpy, over a whole run at once.

Exact equality, no tolerance: SPEC.md promises the same bits for every chunking and CPU.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

import layers

GROUP = 128  # W4A16


def int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, one scale a channel."""
    s = abs(x).max(1, keepdims=True) / 127.5
    q = np.clip(np.rint(x / s), -128, 127).astype(np.int8)
    return q, s


def int8_of_bf16(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `int8` in f32; the scale is rounded once to bf16, the weight's own type, and that scale makes the codes."""
    x = layers.widen(bits)
    s = layers.widen(layers.narrow(abs(x).max(1, keepdims=True) / 127.5))
    return np.clip(np.rint(x / s), -128, 127).astype(np.int8), s


def w4a16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int4 in groups of 128: code + 8, two a byte, the even element in the low nibble."""
    groups = x.reshape(-1, GROUP)
    s = abs(groups).max(1, keepdims=True) / 7.5
    u = (np.clip(np.rint(groups / s), -8, 7) + 8).astype(np.uint8).reshape(-1, 2)
    return u[:, 0] | u[:, 1] << 4, s


def check(formula: Callable, sent: list[pa.RecordBatch], answers: list[pa.RecordBatch]) -> dict[str, str]:
    """Every run is answered by one row, in order, with the codes and scales of `formula`.

    Returns the metadata of the answer's schema: there our server says which command, version and CPU level it ran.
    """
    rows = [row for answer in answers for row in zip(answer["quantized_data"], answer["scales"])]
    count(len(rows), len(sent), "rows")
    for number, (batch, (codes, scales)) in enumerate(zip(sent, rows)):
        expected_codes, expected_scales = formula(layers.run_of(batch))
        same(np.frombuffer(codes.as_buffer(), expected_codes.dtype), expected_codes.ravel(), f"codes of run {number}")
        same(scales.values.to_numpy(), expected_scales.ravel(), f"scales of run {number}")
    return {key.decode(): value.decode() for key, value in (answers[0].schema.metadata or {}).items()}


def check_echo(sent: list[pa.RecordBatch], answers: list[pa.RecordBatch]) -> None:
    count(len(answers), len(sent), "batches")
    for number, (batch, answer) in enumerate(zip(sent, answers)):
        same(layers.run_of(answer), layers.run_of(batch), f"elements of run {number}")


def count(got: int, expected: int, what: str) -> None:
    if got != expected:
        raise AssertionError(f"expected {expected} {what} in the answer, got {got}")


def same(got, expected, what: str) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise AssertionError(f"{what}: expected {expected.size} values, got {got.size}")
    differ = np.flatnonzero(got != expected)
    if differ.size:
        at = differ[0]
        raise AssertionError(
            f"{what}: {differ.size} of {got.size} differ, "
            f"first at {at}: expected {expected.flat[at]}, got {got.flat[at]}"
        )
