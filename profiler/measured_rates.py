"""What ops take on one device, as measured: curves of seconds over the work of an op.

`shardwright profile` fills them (profiler/measuring.py); the cost model reads between their points
(costmodel/measured.py). A curve is of one op, dtype and form. Ops that move memory have one form; products and
attention have several, from squares to thin ones, as efficiency depends on how much arithmetic there is for each byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


class Point(NamedTuple):
    """flops: multiply and add count as two. bytes_moved: read and written, as profiler/work.py counts them."""

    flops: float
    bytes_moved: float
    seconds: float


class Measurement(NamedTuple):
    """One point, and of which curve. op: bare name, such as mm. dtype: a key such as fp32. form: '' where an op has
    one."""

    op: str
    dtype: str
    form: str
    point: Point


@dataclass(frozen=True)
class Curve:
    """points: by growing work."""

    form: str
    points: tuple[Point, ...]


class MeasuredRates:
    """Curves by op and dtype. Two are equal where all their points are."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        rows: dict[tuple[str, str], dict[str, list[Point]]] = {}
        for op, dtype, form, point in measurements:
            rows.setdefault((op, dtype), {}).setdefault(form, []).append(point)
        self.curves: dict[tuple[str, str], tuple[Curve, ...]] = {
            key: tuple(Curve(form, tuple(sorted(points))) for form, points in sorted(forms.items()))
            for key, forms in sorted(rows.items())
        }

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.curves).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MeasuredRates) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __bool__(self) -> bool:
        return bool(self.curves)

    @property
    def num_points(self) -> int:
        return sum(len(curve.points) for curves in self.curves.values() for curve in curves)

    def product_flops_per_s(self) -> dict[str, float]:
        """By dtype, of the quickest product."""
        return {
            dtype: max(point.flops / point.seconds for curve in curves for point in curve.points)
            for (op, dtype), curves in self.curves.items()
            if op == "mm"
        }

    def memory_bytes_per_s(self) -> float | None:
        """Of the largest addition; None where none was measured."""
        points = [curve.points[-1] for (op, _), curves in self.curves.items() if op == "add" for curve in curves]
        return max((point.bytes_moved / point.seconds for point in points), default=None)

    def measurements(self) -> list[Measurement]:
        return [
            Measurement(op, dtype, curve.form, point)
            for (op, dtype), curves in self.curves.items()
            for curve in curves
            for point in curve.points
        ]

    def tables(self) -> list[dict[str, Any]]:
        """One table for each curve, as hardware files hold them."""
        return [
            {
                "op": op,
                "dtype": dtype,
                **({"form": curve.form} if curve.form else {}),
                "flops": [point.flops for point in curve.points],
                "bytes": [point.bytes_moved for point in curve.points],
                "seconds": [point.seconds for point in curve.points],
            }
            for (op, dtype), curves in self.curves.items()
            for curve in curves
        ]

    @classmethod
    def of_tables(cls, tables: Iterable[Mapping[str, Any]]) -> MeasuredRates:
        """Raises ValueError, TypeError or KeyError where a table is none of those that tables() makes."""
        found = []
        for table in tables:
            columns = [table["flops"], table["bytes"], table["seconds"]]
            for flops, moved, seconds in zip(*columns, strict=True):
                point = Point(float(flops), float(moved), float(seconds))
                if not (point.seconds > 0 and point.flops >= 0 and point.bytes_moved > 0):
                    raise ValueError(f"{table['op']} {table['dtype']}: {point}")
                found.append(Measurement(str(table["op"]), str(table["dtype"]), str(table.get("form", "")), point))
        return cls(found)
