"""Times ops on this process's device, by size and dtype: products, attention, norms, copies and the like.

Each case makes its operands, runs once to warm up, then for MEASURE_S at least; its time is the median. Operands of
one run are not those of the next, and results are new memory each time, as they are in a step. Sizes grow by 4 until a
run takes MOST_S, or on a CPU moves MOST_BYTES. Several processes of a host measure the same case at once, as they
compute at once in a step.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from ..kernels import attention, rms_norm  # noqa: F401  they define the ops of ours
from .measurements import Case, Measurements, Row
from .work import attention_pairs

ours = torch.ops.shardwright
MEASURE_S = 0.06
LEAST_RUNS = 3
MOST_RUNS = 200
MOST_S = 0.25  # of one run: larger sizes are not measured
COPIES = 3  # of the operands, taken in turn
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MOST_BYTES = 1 << 28  # that a case moves on a CPU, whose processes share the machine's memory
Run = Callable[..., Any]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Sized:
    """A case with its work, and how to run it. make: its operands."""

    case: Case
    flops: float
    bytes_moved: float
    make: Callable[[], Tensors]
    run: Run


@dataclass(frozen=True)
class Series:
    """One curve: the sizes of an op in one form, by growing work."""

    op: str
    dtype: str
    form: str
    sizes: Sequence[Sized]


def all_series(device: torch.device, dtypes: Sequence[str]) -> list[Series]:
    """Every curve that is measured on a device. dtypes: keys of DTYPES."""
    found: list[Series] = []
    for name in dtypes:
        found += [*_products(device, name), *_attention(device, name), *_moving(device, name)]
    return found


def _series(op: str, dtype: str, form: str, sizes: Iterator[Sized]) -> Series:
    return Series(op, dtype, form, list(sizes))


def _products(device: torch.device, dtype: str) -> Iterator[Series]:
    """[m, k] by [k, n]: square, with one thin side, and of a single row."""
    kind, item = DTYPES[dtype], DTYPES[dtype].itemsize
    for form, thin in (("square", 1), ("thin8", 8), ("thin64", 64), ("row", 0)):

        def sizes(thin: int = thin, form: str = form) -> Iterator[Sized]:
            for n in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
                m = max(1, n // thin) if thin else 1
                if thin and n // thin < 4:
                    continue
                moved = float(item * (m * n + n * n + m * n))
                make = lambda m=m, n=n: (_drawn((m, n), kind, device), _drawn((n, n), kind, device))  # noqa: E731
                yield Sized(Case("mm", dtype, form, f"{m}x{n}x{n}"), 2.0 * m * n * n, moved, make, torch.mm)

        yield _series("mm", dtype, form, sizes())


def _attention(device: torch.device, dtype: str) -> Iterator[Series]:
    """Causal, heads of 64: forms by length, sizes by batch and heads."""
    kind, item, dim = DTYPES[dtype], DTYPES[dtype].itemsize, 64
    for length in (64, 256, 1024, 4096):
        for backward in (False, True):

            def sizes(length: int = length, backward: bool = backward) -> Iterator[Sized]:
                for batch, heads in ((1, 2), (1, 8), (2, 16), (8, 16), (32, 16)):
                    elements = batch * heads * length * dim
                    pairs = attention_pairs(length, length, True, 0)
                    flops = (10.0 if backward else 4.0) * batch * heads * pairs * dim
                    statistics_bytes = 4.0 * batch * heads * length
                    moved = float(item * elements * (8 if backward else 4)) + statistics_bytes
                    name = "attention_backward" if backward else "attention"
                    yield Sized(
                        Case(name, dtype, f"length{length}", f"{batch}x{heads}x{length}x{dim}"),
                        flops,
                        moved,
                        _made_for_attention((batch, heads, length, dim), kind, device, backward),
                        _attend_backward if backward else _attend,
                    )

            yield _series("attention_backward" if backward else "attention", dtype, f"length{length}", sizes())


def _made_for_attention(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, backward: bool
) -> Callable[[], Tensors]:
    def make() -> Tensors:
        query, key, value = (_drawn(shape, dtype, device) for _ in range(3))
        if not backward:
            return query, key, value
        return (_drawn(shape, dtype, device), query, key, value, *_attend(query, key, value))

    return make


def _options(query: torch.Tensor) -> tuple[Any, ...]:
    """scale, causal, window, dropout_p, and what dropout's random numbers would go by."""
    return (query.shape[-1] ** -0.5, True, 0, 0.0, 0, None, None)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Tensors:
    return tuple(ours.attention(query, key, value, None, None, *_options(query)))


def _attend_backward(grad: torch.Tensor, query: torch.Tensor, *rest: torch.Tensor) -> Any:
    key, value, out, lse = rest
    return ours.attention_backward(grad, query, key, value, None, None, out, lse, *_options(query), False)


def _moving(device: torch.device, dtype: str) -> Iterator[Series]:
    """Ops that memory limits, and those of one operand with costly arithmetic, over rows of 1,024."""
    kind, item, width = DTYPES[dtype], DTYPES[dtype].itemsize, 1024
    weight = _drawn((width,), kind, device)
    table = _drawn((4096, width), kind, device)
    indices = torch.arange(1 << 16, device=device) % 4096
    norm, other = [width], torch.bfloat16 if item == 4 else torch.float32
    # op -> (operands of the size, tensors of the size that it moves, what it runs)
    ops: dict[str, tuple[int, float, Run]] = {
        "add": (2, 3, torch.add),
        "mul": (2, 3, torch.mul),
        "clone": (1, 2, torch.clone),
        "_to_copy": (1, 1 + other.itemsize / item, lambda x: x.to(other)),
        "sum": (1, 1, lambda x: torch.sum(x, 0)),
        "gelu": (1, 2, functional.gelu),
        "gelu_backward": (2, 3, torch.ops.aten.gelu_backward.default),
        "silu": (1, 2, functional.silu),
        "silu_backward": (2, 3, torch.ops.aten.silu_backward.default),
        "_softmax": (1, 2, lambda x: torch.softmax(x, -1)),
        "_log_softmax": (1, 2, lambda x: torch.log_softmax(x, -1)),
        "_log_softmax_backward_data": (
            2, 3, lambda g, y: torch.ops.aten._log_softmax_backward_data(g, y, -1, y.dtype)),
        "native_layer_norm": (1, 2, lambda x: torch.native_layer_norm(x, norm, weight, weight, 1e-5)),
        "rms_norm": (1, 2, lambda x: ours.rms_norm(x, weight, 1e-5, False)),
    }  # fmt: skip
    for op, (operands, moved, run) in ops.items():

        def sizes(op: str = op, operands: int = operands, moved: float = moved, run: Run = run) -> Iterator[Sized]:
            for rows in _rows():
                shape = rows, width
                num_bytes = moved * item * rows * width
                make = lambda shape=shape: tuple(_drawn(shape, kind, device) for _ in range(operands))  # noqa: E731
                yield Sized(Case(op, dtype, "", f"{rows}x{width}"), float(rows * width), num_bytes, make, run)

        yield _series(op, dtype, "", sizes())

    def lookups() -> Iterator[Sized]:
        for rows in _rows():
            if rows <= len(indices):
                num_bytes = 2.0 * item * rows * width + 8 * rows
                make = lambda rows=rows: (indices[:rows],)  # noqa: E731
                run = lambda x: functional.embedding(x, table)  # noqa: E731
                yield Sized(Case("embedding", dtype, "", f"{rows}x{width}"), 0.0, num_bytes, make, run)

    yield _series("embedding", dtype, "", lookups())


def _rows() -> Iterator[int]:
    return itertools.takewhile(lambda rows: rows <= 1 << 18, (4**k for k in itertools.count()))


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float32, device=device).to(dtype) - 0.5


@dataclass(frozen=True)
class Together:
    """What processes that measure at once do between cases. wait: all are there. mean: of a number over all; of
    nan, nan."""

    wait: Callable[[], None] = lambda: None
    mean: Callable[[float], float] = lambda number: number


def measure(
    series: Sequence[Series],
    device: torch.device,
    kept: Measurements | None,
    known: dict[Case, Row],
    tell: Callable[[Row, int, int], None],
    together: Together = Together(),
) -> list[Row]:
    """Rows of all cases: those that are known as they are, the others measured, kept and told with their number.

    kept: where rows go; None on processes that only take part. A case that fails ends its series, not the run.
    """
    found: list[Row] = []
    for index, one in enumerate(series):
        for sized in one.sizes:
            if sized.bytes_moved > MOST_BYTES and device.type == "cpu":
                break
            row = known.get(sized.case)
            if row is None:
                row = _measured(sized, device, together)
                if kept is not None:
                    kept.put(row)
                tell(row, index, len(series))
            found.append(row)
            if row.seconds is None or row.seconds > MOST_S:
                break
    return found


def _measured(sized: Sized, device: torch.device, together: Together) -> Row:
    together.wait()
    error, seconds = "", math.nan
    try:
        seconds = _median_s(sized, device)
    except Exception as problem:  # an op that this device does not have must not end the others' measurement
        error = f"{type(problem).__name__}: {problem}".split("\n")[0][:200]
    mean_s = together.mean(seconds)
    if math.isnan(mean_s):
        return Row(sized.case, sized.flops, sized.bytes_moved, None, error or "failed on another process")
    return Row(sized.case, sized.flops, sized.bytes_moved, mean_s)


def synchronize_of(device: torch.device) -> Callable[[], None]:
    """What waits for all that the device was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def _median_s(sized: Sized, device: torch.device) -> float:
    operands = itertools.cycle([sized.make() for _ in range(COPIES)])
    synchronize = synchronize_of(device)
    with torch.no_grad():
        sized.run(*next(operands))
        synchronize()
        times: list[float] = []
        end = time.perf_counter() + MEASURE_S
        while len(times) < LEAST_RUNS or (time.perf_counter() < end and len(times) < MOST_RUNS):
            given = next(operands)
            started = time.perf_counter()
            sized.run(*given)
            synchronize()
            times.append(time.perf_counter() - started)
            if times[0] > MOST_S:
                break
    return statistics.median(times)
