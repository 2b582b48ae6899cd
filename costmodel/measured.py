"""Seconds of an op between the points that were measured on the device at hand (profiler/measured_rates.py).

Along a curve seconds are a power of the work between two points, and a constant rate beyond the last one; before the
first one they are what that took, which is what starting an op costs. The work of an op is its arithmetic, of those
that only move memory their bytes. An op between two forms, by its arithmetic for each byte, takes what lies as far
between theirs; one thinner than all of them moves more bytes at the rate of the thinnest.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..profiler.measured_rates import Curve, MeasuredRates
from .op_classes import ARITHMETIC, op_class

# the op that stands for its class where it was not measured itself
STANDS_FOR = {
    "matmul": "mm",
    "attention": "attention",
    "attention_backward": "attention_backward",
    "pointwise": "add",
    "copy": "clone",
    "reduction": "sum",
    "normalization": "native_layer_norm",
    "gather": "embedding",
}


class _Logs(NamedTuple):
    """Of a curve: logarithms of its work, of its seconds, and of its arithmetic for each byte."""

    work: tuple[float, ...]
    seconds: tuple[float, ...]
    density: tuple[float, ...]


@lru_cache(maxsize=1 << 16)
def measured_seconds(
    rates: MeasuredRates, op: str, kind: str, dtype: str, flops: float, bytes_moved: float
) -> float | None:
    """op: bare name. kind: its class in compute.py. None where nothing like it was measured."""
    stand_in = STANDS_FOR.get(kind, "")
    logs_of = _all_logs(rates)
    by_form = logs_of.get((op, dtype)) or logs_of.get((stand_in, dtype))
    if not by_form or bytes_moved <= 0:
        return None
    if kind not in ARITHMETIC or flops <= 0:
        return math.exp(_at(by_form[0], math.log(bytes_moved)))
    work, density = math.log(flops), math.log(flops / bytes_moved)
    forms = sorted((_value(logs.work, logs.density, work), _at(logs, work)) for logs in by_form)
    densities = [found for found, _ in forms]
    place = bisect.bisect_left(densities, density)
    if place == len(forms):
        return math.exp(forms[-1][1])
    if place == 0:
        return math.exp(forms[0][1] + densities[0] - density)
    (low, low_s), (high, high_s) = forms[place - 1], forms[place]
    share = (density - low) / (high - low) if high > low else 1.0
    return math.exp(low_s + share * (high_s - low_s))


@lru_cache(maxsize=16)
def _all_logs(rates: MeasuredRates) -> dict[tuple[str, str], list[_Logs]]:
    """By op and dtype, of each form."""
    return {
        key: [_logs(curve, op_class(key[0]) in ARITHMETIC) for curve in curves] for key, curves in rates.curves.items()
    }


def _logs(curve: Curve, by_flops: bool) -> _Logs:
    """Seconds never fall with more work: what noise did to single points is evened out from the larger ones."""
    points = sorted(curve.points, key=lambda p: p.flops if by_flops else p.bytes_moved)
    work = [math.log(max(p.flops if by_flops else p.bytes_moved, 1.0)) for p in points]
    falling = itertools.accumulate((math.log(p.seconds) for p in reversed(points)), min)
    density = [math.log(max(p.flops, 1.0) / p.bytes_moved) for p in points]
    return _Logs(tuple(work), tuple(reversed(list(falling))), tuple(density))


def _at(logs: _Logs, work: float) -> float:
    """Logarithm of the seconds."""
    beyond = max(0.0, work - logs.work[-1])
    return _value(logs.work, logs.seconds, work) + beyond


def _value(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """Between points on a line; at the ends as they are."""
    place = bisect.bisect_left(x, at)
    if place == 0 or place == len(x):
        return y[min(place, len(x) - 1)]
    low, high = x[place - 1], x[place]
    share = (at - low) / (high - low) if high > low else 1.0
    return y[place - 1] + share * (y[place] - y[place - 1])
