"""The software stack that a plan is timed for: what a framework's own code adds to the hardware's figures.

A stack is at most eight of these factors and times (costmodel/stacks.toml), fitted to published runs of that framework
through the planner's own path (benchmarks/calibrate.py). The stack of plans that Shardwright runs itself is the
default; another one says how long the same plan would take in that framework.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ShardwrightError
from ..profiler.near import near_matches

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STACKS_FILE = Path(__file__).parent / "stacks.toml"
OWN_STACK = "shardwright"


@dataclass(frozen=True)
class StackFigures:
    """What the cost model knows of a framework. Factors are of the time that the hardware's constants give."""

    product_factor: float = 1.0  # matrix products
    hopper_factor: float = 1.0  # matrix products on H100 and H200, beside product_factor
    attention_factor: float = 1.0  # attention kernels
    memory_factor: float = 1.0  # all other ops
    op_s: float = 0.0  # added by each op: gaps between kernels
    dispatch_s: float = 0.0  # of the host to start an op, ahead of the device: a segment takes no less than all of them
    tensor_factor: float = 1.0  # collectives of axes that cut tensors: skew between their ranks
    state_contention: float = 0.0  # of data-parallel collectives, for each doubling of hosts beyond two
    unhidden_fraction: float = 0.0  # of the shorter of compute and a data-parallel collective that pass at once


@dataclass(frozen=True)
class Stack:
    """name: as `--stack` takes it. kind: fitted or assumed. spread: between which shares of the predicted step eight
    of ten published runs took, with figures that were fitted without them. order_error: median error of the predicted
    ratio of two layouts' steps, of one model on as many devices. memory_error: what eight of ten runs took beyond the
    predicted peak, as a share of it, or less. None and 0: nothing is known."""

    name: str
    figures: StackFigures = StackFigures()
    means: str = ""
    source: str = ""
    kind: str = "assumed"
    date: str = ""
    spread: tuple[float, float] | None = None
    order_error: float = 0.0
    memory_error: float | None = None

    def with_figures(self, **figures: float) -> Stack:
        return replace(self, figures=replace(self.figures, **figures))


def figure_names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(StackFigures))


@cache
def _document() -> Mapping[str, Any]:
    with STACKS_FILE.open("rb") as file:
        return tomllib.load(file)


def kernels() -> Mapping[str, float]:
    """Attention kernels, with their time over FlashAttention 2's."""
    return {name: float(entry["factor"]) for name, entry in _document()["kernels"].items()}


@cache
def stacks() -> Mapping[str, Stack]:
    """By name, in the file's order."""
    found = {}
    for name, entry in _document()["stacks"].items():
        low, high = entry.get("spread", (0.0, 0.0))
        found[name] = Stack(
            name,
            StackFigures(**figures_of(name)),
            entry["meaning"],
            entry["source"],
            entry["kind"],
            entry["date"],
            (low, high) if high else None,
            entry.get("order_error", 0.0),
            entry.get("memory_error"),
        )
    return found


def figures_of(name: str) -> dict[str, float]:
    """Those that a stack has of its own."""
    entry = _document()["stacks"][name]
    return {key: float(entry[key]) for key in figure_names() if key in entry}


def stack_named(name: str) -> Stack:
    """name: of a stack, or STACK+KERNEL with another attention kernel. Raises ShardwrightError where there is none."""
    known, (name, plus, kernel) = stacks(), name.partition("+")
    if plus and kernel not in kernels():
        raise ShardwrightError(
            f"unknown attention kernel {kernel!r}; known: {', '.join(kernels())}",
            means="nothing is known of its time",
            change="--stack",
            works=f"--stack {name}+{next(iter(near_matches(kernel, list(kernels()))), 'flash2')}",
        )
    if name not in known:
        near = near_matches(name, list(known))
        raise ShardwrightError(
            f"unknown software stack {name!r}; known: {', '.join(known)}",
            means=f"did you mean {' or '.join(near)}?" if near else "nothing was fitted to a framework of that name",
            change="--stack",
            works=f"--stack {near[0] if near else OWN_STACK}",
        )
    if not plus:
        return known[name]
    factor = known[name].figures.attention_factor * kernels()[kernel]
    return replace(known[name].with_figures(attention_factor=factor), name=f"{name}+{kernel}")


def own_stack() -> Stack:
    return stack_named(OWN_STACK)


def stack_rows() -> list[dict[str, str]]:
    """Every figure of every stack, as Constants.rows() has the others."""
    meanings = _document()["figures"]
    return [
        {
            "name": f"stack.{stack.name}.{name}",
            "value": f"{getattr(stack.figures, name):g}",
            "kind": stack.kind,
            "source": stack.source,
            "date": stack.date,
            "meaning": meanings[name],
        }
        for stack in stacks().values()
        for name in figures_of(stack.name)
    ] + [
        {
            "name": f"kernel.{name}",
            "value": f"{entry['factor']:g}",
            "kind": "assumed",
            "source": entry["source"],
            "date": "2026-11",
            "meaning": "time of this attention kernel over FlashAttention 2's, for --stack NAME+KERNEL",
        }
        for name, entry in _document()["kernels"].items()
    ]
