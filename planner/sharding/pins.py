"""Pins: placements that the user fixes by name, such as `layers.*.mlp.up_proj=colwise`.

A pattern is a shell pattern over dotted names; leading parts of a name (`model.`) may be left out. It names a
parameter, or a module and all below it. Forms, each with an optional axis before it (`tp:S(1)`; the tensor axis where
none is given):

    colwise      weights of linear layers and embeddings split by output features
    rowwise      the same, by input features (rows of an embedding's table)
    S(d)         a parameter, or the results of a module's ops, split on dimension d
    R, P         whole; a partial sum (of results)

Instances of one distinct segment are solved once and lie alike, so a pin that names one of them holds for all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx

from ...errors import ExitCode, ShardwrightError
from ...ops.placement import from_text
from ...profiler.graph import ModelGraph, Segment
from ...profiler.near import near_matches
from ...profiler.op_view import is_op
from ...profiler.slots import PARAM, slot_name

FORM = re.compile(r"(?:(?P<axis>[a-z]+):)?(?P<form>colwise|rowwise|replicated|R|P|S\(\d+\))$")
FEATURES = ("colwise", "rowwise")
aten = torch.ops.aten
Demand = tuple[int | None, ...]  # one place per axis; None: free


def is_pin(key: str, value: str) -> bool:
    """Is KEY=VALUE a pin, rather than a choice such as pp=2?"""
    return FORM.match(value) is not None or "." in key or "*" in key


def choices_of(force: Mapping[str, str]) -> dict[str, str]:
    """What is forced besides pins: pp, zero, schedule, ..."""
    return {key: value for key, value in force.items() if not is_pin(key, value)}


@dataclass(frozen=True)
class Pin:
    pattern: str
    axis: str
    form: str

    def __str__(self) -> str:
        return f"{self.pattern}={self.axis}:{self.form}"

    @property
    def splits(self) -> bool:
        return self.form in FEATURES or self.form.startswith("S")

    def names(self, name: str) -> bool:
        """Does the pattern name this, whole or without leading parts?"""
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[k:]), self.pattern) for k in range(len(parts)))

    def covers(self, name: str) -> bool:
        """Does it name this or anything that it is in?"""
        parts = name.split(".")
        return any(self.names(".".join(parts[:k])) for k in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Resolved:
    """Pins on one captured model. params: by name; results: by (segment, op node)."""

    params: dict[str, Demand] = field(default_factory=dict)
    results: dict[tuple[str, str], Demand] = field(default_factory=dict)
    pins: dict[object, Pin] = field(default_factory=dict)  # key in either -> the pin that asked for it

    def on(self, axes: Sequence[int]) -> Resolved:
        """Of these axes alone."""

        def kept(demands: Mapping[Any, Demand]) -> dict[Any, Demand]:
            return {key: tuple(demand[k] for k in axes) for key, demand in demands.items()}

        return replace(self, params=kept(self.params), results=kept(self.results))


@dataclass(frozen=True)
class Pins:
    pins: tuple[Pin, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, str], axes: Sequence[str]) -> Pins:
        """Raises ShardwrightError for a form or an axis that there is not."""
        found = []
        for pattern, text in given.items():
            match = FORM.match(text)
            axis = (match["axis"] or axes[-1]) if match else ""
            if match is None or axis not in axes:
                raise ShardwrightError(
                    f"--force {pattern}={text}: {'no such axis' if match else 'no such placement'}",
                    means=f"forms: colwise, rowwise, R, P, S(dim); axes: {', '.join(axes)}",
                    change="--force PATTERN=FORM",
                    works=f"--force '{pattern}=colwise'",
                )
            form = "R" if match["form"] == "replicated" else match["form"]
            found.append(Pin(pattern, axis, form))
        return cls(tuple(found))

    @property
    def split_axes(self) -> set[str]:
        """Axes that must be wider than one for the pins to mean anything."""
        return {pin.axis for pin in self.pins if pin.splits}

    def resolve(self, graph: ModelGraph, axes: Sequence[str]) -> Resolved:
        """Raises ShardwrightError for a pattern that names nothing."""
        resolved = Resolved()
        for pin in self.pins:
            at = axes.index(pin.axis)
            matched = list(_params(graph, pin))
            for name, place in matched:
                resolved.params[name] = _with(resolved.params.get(name), at, place, len(axes))
                resolved.pins[name] = pin
            if pin.form not in FEATURES and not matched:
                for key in _results(graph, pin):
                    resolved.results[key] = _with(resolved.results.get(key), at, from_text(pin.form), len(axes))
                    resolved.pins[key] = pin
                    matched.append((str(key), 0))
            if not matched:
                raise _names_nothing(graph, pin)
        return resolved


def _with(demand: Demand | None, at: int, place: int, count: int) -> Demand:
    places: list[int | None] = list(demand or (None,) * count)
    places[at] = place
    return tuple(places)


def _params(graph: ModelGraph, pin: Pin) -> Iterator[tuple[str, int]]:
    for instance in graph.instances:
        for slot, name in enumerate(instance.params):
            if pin.form in FEATURES:
                place = _feature_dim(graph.segments[instance.segment], slot, pin.form)
                if place is not None and pin.covers(name):
                    yield name, place
            elif pin.names(name):
                yield name, from_text(pin.form)


def _feature_dim(segment: Segment, slot: int, form: str) -> int | None:
    """The dimension of a weight with its output (colwise) or input (rowwise) features, by the op that reads it."""
    if len(segment.param_shapes[slot]) != 2:
        return None
    node = next(n for n in segment.joint.graph.nodes if n.op == "placeholder" and n.name == slot_name(PARAM, slot))
    for user in (u for u in node.users if u.meta.get("phase") == "forward"):
        packet = getattr(user.target, "overloadpacket", None)
        of_loss = torch.ops.shardwright.linear_cross_entropy
        if packet in (aten.t, aten.permute, aten.transpose, aten.linear, of_loss):  # nn.Linear: [out, in]
            return 0 if form == "colwise" else 1
        if packet in (aten.embedding, aten.mm, aten.addmm):  # a table [rows, features], or a weight [in, out]
            return 1 if form == "colwise" else 0
    return None


def _results(graph: ModelGraph, pin: Pin) -> Iterator[tuple[str, str]]:
    """The last forward op of each module that the pattern names, in whichever instance."""
    for name, segment in graph.segments.items():
        instances = [i for i in graph.instances if i.segment == name]
        last: dict[str, fx.Node] = {}
        for node in segment.joint.graph.nodes:
            if is_op(node) and node.meta.get("phase") == "forward":
                for path in module_paths(node):
                    last[path] = node
        for path, node in last.items():
            own = instances[0].module_path
            paths = {path} | {path.replace(own, i.module_path, 1) for i in instances if own and path.startswith(own)}
            if any(pin.names(p) for p in paths):
                yield name, node.name


def module_paths(node: fx.Node) -> list[str]:
    """Every module that a node was traced in, outermost first, without the wrapper's prefix."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path.partition(".")[2] for path, *_ in stack.values() if "." in path]


def _names_nothing(graph: ModelGraph, pin: Pin) -> ShardwrightError:
    names = {name for instance in graph.instances for name in instance.params}
    modules = {".".join(name.split(".")[:k]) for name in names for k in range(1, name.count(".") + 1)}
    known = sorted(modules | names)
    near = near_matches(pin.pattern.replace("*.", "").replace("*", ""), known) or known[:3]
    works = near[0] if near else "*"
    return ShardwrightError(
        f"--force {pin.pattern}={pin.form}: no parameter or module goes by that name",
        means=f"near matches: {', '.join(near) or 'none'}",
        change="the pattern",
        works=f"--force '{re.sub(r'[.][0-9]+[.]', '.*.', works)}={pin.form}'",
    )


def cannot_meet(pin: Pin | None, what: str, possible: str) -> ShardwrightError:
    return ShardwrightError(
        f"{f'--force {pin.pattern}={pin.form}' if pin else 'a pin'}: {what}",
        means=f"possible here: {possible}",
        change="--force PATTERN=FORM",
        works="another form, or another size of that axis",
        exit_code=ExitCode.CONTRADICTION,
    )
