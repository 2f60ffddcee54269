"""What each kernel shall reach, and whether it does.

Goals are for f32: of memcpy's rate at the best level of the CPU, or at the level that is named; or of a peer. Of the
other element types no more is asked than that an element takes no longer than one of f32.
"""

from dataclasses import dataclass

from kernel_rows import DEQUANTIZE, MEASURED, QUANTIZE, Key, Rows

MEMCPY, F32 = "memcpy", "f32"
INT8 = ("W8A8", "int8")
W4 = ("W4A16",)
FP8 = ("FP8_DYNAMIC", "FP8_BLOCK")
DENSE = ("int2", "int3", "int4", "int5", "int6", "int7")
SMALL_FLOATS = ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
WEIGHED = tuple(f"{kind}+importance" for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", *SEARCHED))
FORMATS = (*INT8, *W4, "W4A16_ASYM", "W8A16", *FP8, *DENSE, *SMALL_FLOATS)


@dataclass(frozen=True)
class Goal:
    formats: tuple[str, ...]
    op: str
    least: float
    over: str = MEMCPY
    level: str | None = None  # the best one

    def __str__(self) -> str:
        if self.over == MEMCPY:
            return f"{self.least:.2f}"
        return f"{self.least:.2f} of f32" if self.over == F32 else f"{self.least:g} times {self.over}"


GOALS = (
    Goal(INT8, QUANTIZE, 1.00),
    Goal(INT8, MEASURED, 0.65, level="avx2"),
    Goal(INT8, MEASURED, 0.75, level="avx512"),
    Goal(W4, QUANTIZE, 0.90),
    Goal(W4, MEASURED, 0.65),
    Goal(FP8, MEASURED, 0.50),
    Goal(DENSE, MEASURED, 0.40),
    Goal(SMALL_FLOATS, MEASURED, 40, over="compressed-tensors"),
    Goal(FORMATS, DEQUANTIZE, 0.60),
    Goal(("nf4", "fp4"), QUANTIZE, 15, over="bitsandbytes"),
    Goal(("int4-asym/g64;solver=hqq",), QUANTIZE, 50, over="hqq"),
    # Of blocks alone, as ggml measures nothing.
    Goal(("Q8_0",), QUANTIZE, 4, over="ggml"),
    Goal(("Q4_0",), QUANTIZE, 2, over="ggml"),
    Goal(SEARCHED, QUANTIZE, 3, over="ggml"),
    Goal(WEIGHED, QUANTIZE, 3, over="ggml"),
)
NOT_F32 = Goal(FORMATS, "", 1.00, over=F32)


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    key: Key  # with the level that it is about
    reached: float | None  # None: not measured

    @property
    def missed(self) -> bool:
        return self.reached is None or self.reached < self.goal.least

    def __str__(self) -> str:
        at = f" at {self.goal.level}" if self.goal.level else ""
        return f"{self.goal}{at}: {'NO' if self.missed else 'yes'}"


def verdicts(key: Key, rows: Rows) -> list[Verdict]:
    """Of one row, at the levels that this CPU has."""
    found = []
    for goal in goals(key):
        if goal.level is None or goal.level in rows.levels:
            at = key._replace(by=goal.level or rows.best_level)
            found.append(Verdict(goal, at, reached(goal, at, rows)))
    return found


def goals(key: Key) -> list[Goal]:
    if key.dtype != "f32":
        return [NOT_F32] if key.format in FORMATS else []
    return [goal for goal in GOALS if goal.op == key.op and key.format in goal.formats]


def reached(goal: Goal, key: Key, rows: Rows) -> float | None:
    if goal.over == MEMCPY:
        return rows.over_memcpy(key)
    if goal.over == F32:
        return rows.over_f32(key)
    over = rows.over_peer(key, goal.over)
    return over and over[0]


def unmeasured(rows: Rows, asked: list[str] | None) -> list[str]:
    """Formats that have goals and no row."""
    there = {key.format for key in rows.ours()}
    return [format for format in asked or FORMATS if format not in there]
