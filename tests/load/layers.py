"""The input: layers [4096, 4096] in runs of 1 MiB, one run a row, one row a batch.

1 MiB is what raw TCP is pinned to, holds whole channels, and stays under the 4 MiB that a stock tonic server accepts.
All layers share one array of 64 MiB: it is twice the L3 cache of the machines at hand, so each run comes from memory,
and the client needs no gigabyte of its own. No kernel's speed depends on the values.
"""

import functools

import numpy as np
import pyarrow as pa

ROWS = COLUMNS = 4096
RUN_BYTES = 1 << 20
MIB = 1 << 20


@functools.cache
def weights() -> np.ndarray:
    """Normal weights of the size that trained layers have, the same in every run."""
    return np.random.default_rng(20260101).standard_normal((ROWS, COLUMNS), dtype=np.float32) * np.float32(0.02)


@functools.cache
def weights_bf16() -> np.ndarray:
    """`weights` rounded to bf16, as the uint16 that holds its bits."""
    return narrow(weights())


def f32(mib: int) -> list[pa.RecordBatch]:
    """`mib` MiB as large_list<float32>, which point into `weights` without a copy."""
    return batches(weights(), mib, lambda run: {"weights": pa.LargeListArray.from_arrays(
        pa.array([0, run.size], pa.int64()), pa.array(run.reshape(-1)))})


def bf16(mib: int) -> list[pa.RecordBatch]:
    """`mib` MiB as large_binary with a `dtype` column, which point into `weights_bf16` without a copy."""
    return batches(weights_bf16(), mib, lambda run: {
        "weights": large_binary(run), "dtype": pa.array(["bf16"])})


def batches(layer: np.ndarray, mib: int, columns_of) -> list[pa.RecordBatch]:
    """Whole layers of distinct names that make `mib` MiB, run by run."""
    run_rows = RUN_BYTES // layer[0].nbytes
    runs = [columns_of(layer[row:row + run_rows]) for row in range(0, ROWS, run_rows)]
    shape = pa.array([list(layer.shape)], pa.list_(pa.int64()))
    return [
        pa.RecordBatch.from_pydict({"layer_name": pa.array([f"layers.{number}.weight"]), **run, "shape": shape})
        for number in range(mib * MIB // layer.nbytes)
        for run in runs
    ]


def large_binary(values: np.ndarray) -> pa.LargeBinaryArray:
    """One value that is the bytes of `values`, not copied."""
    offsets = pa.py_buffer(np.array([0, values.nbytes], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(values)])


def narrow(x: np.ndarray) -> np.ndarray:
    """The bits of `x` rounded to bf16, half to even (finite values)."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 that a bf16 stands for: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def run_of(batch: pa.RecordBatch) -> np.ndarray:
    """The elements of a batch as whole channels: float32, or the uint16 bits of bf16."""
    column = batch["weights"]
    if pa.types.is_large_binary(column.type):
        flat = np.frombuffer(column[0].as_buffer(), np.uint16)
    else:
        flat = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(-1, batch["shape"][0][1].as_py())
