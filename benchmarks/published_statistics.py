"""What predictions of published rows say together: errors of step time, order and regret within groups, memory."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from published_path import Prediction
from published_rows import Row

LEAST_LAYOUTS = 4  # of a group whose order is judged
OUT_OF_MEMORY = ("oom", "failed")


@dataclass(frozen=True)
class Judged:
    """A row beside what is predicted of it."""

    row: Row
    found: Prediction

    @property
    def ratio(self) -> float | None:
        """Predicted over measured seconds."""
        if self.row.measured_s is None or self.found.step_s is None:
            return None
        return self.found.step_s / self.row.measured_s

    @property
    def memory_ratio(self) -> float | None:
        if self.row.outcome != "ok" or not self.row.measured_gib or not self.found.peak_gib:
            return None
        return self.found.peak_gib / self.row.measured_gib


@dataclass(frozen=True)
class TimeErrors:
    """Of |predicted / measured - 1|, and the median of predicted / measured."""

    rows: int
    median: float
    p90: float
    bias: float


@dataclass(frozen=True)
class Choice:
    """In one group: rank correlation of predicted and measured, and how much slower, as measured, the layout that is
    predicted the fastest of those predicted to fit is than the fastest measured."""

    group: str
    layouts: int
    correlation: float
    regret: float
    picked: str
    best: str


@dataclass(frozen=True)
class Fit:
    """recall: of runs out of memory, those said not to fit; false_alarms: of runs that ran."""

    failed: int
    recall: float
    ran: int
    false_alarms: float


def quantile(values: Iterable[float], share: float) -> float:
    """Linear between the two nearest; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def time_errors(judged: Iterable[Judged]) -> TimeErrors:
    ratios = [one.ratio for one in judged if one.ratio is not None]
    errors = [abs(ratio - 1) for ratio in ratios]
    return TimeErrors(len(ratios), quantile(errors, 0.5), quantile(errors, 0.9), quantile(ratios, 0.5))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; equal values share their mean rank."""
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) - 1) / 2
    product = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    norm = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return product / norm if norm else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and values[order[last + 1]] == values[order[first]]:
            last += 1
        for place in order[first : last + 1]:
            ranks[place] = (first + last) / 2
        first = last + 1
    return ranks


def choices(judged: Iterable[Judged]) -> list[Choice]:
    """Of each group with enough layouts; of rows of one layout (other kernels, say) the fastest measured. Seconds are
    of one sequence, as batches differ."""
    groups: dict[str, dict[str, tuple[float, float, bool]]] = defaultdict(dict)
    for one in judged:
        if one.ratio is None:
            continue
        row, batch = one.row, one.row.global_batch
        assert row.measured_s is not None and one.found.step_s is not None
        entry = row.measured_s / batch, one.found.step_s / batch, bool(one.found.fits)
        known = groups[row.group].get(row.layout)
        if known is None or entry[0] < known[0]:
            groups[row.group][row.layout] = entry
    return [_choice(group, layouts) for group, layouts in groups.items() if len(layouts) >= LEAST_LAYOUTS]


def _choice(group: str, layouts: dict[str, tuple[float, float, bool]]) -> Choice:
    measured, predicted = ([entry[k] for entry in layouts.values()] for k in (0, 1))
    fitting = {layout: entry for layout, entry in layouts.items() if entry[2]} or layouts
    picked = min(fitting, key=lambda layout: fitting[layout][1])
    best = min(layouts, key=lambda layout: layouts[layout][0])
    regret = layouts[picked][0] / layouts[best][0] - 1
    return Choice(group, len(layouts), rank_correlation(measured, predicted), regret, picked, best)


def fit_of(judged: Iterable[Judged]) -> Fit:
    failed, ran = [], []
    for one in judged:
        if one.found.fits is not None:
            (failed if one.row.outcome in OUT_OF_MEMORY else ran).append(one.found.fits)
    return Fit(len(failed), _share(failed), len(ran), _share(ran))


def _share(fits: Sequence[bool]) -> float:
    return sum(not fit for fit in fits) / len(fits) if fits else math.nan
