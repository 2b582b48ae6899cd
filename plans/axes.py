"""The axes of a mesh: what each carries (AxisRole), and how wide they are (MeshShape).

Nothing outside this module asks for an axis by name. Code asks for the axes of a kind: those that carry the batch,
those over which ZeRO splits training state, those over which parameters are cut. A new axis is a role that is
registered; its strategies and its cost follow from the role, unless the role names its own.

Ranks are row-major indices into the axes of a mesh, outermost first. Roles stand in that order: stages, then axes on
which parameters are whole, then axes that cut them, so that the ranks which share a copy of the state are neighbours.
Several axes may cut one dimension of a tensor; each then cuts what the axes before it left.

One set of ranks may be factored twice. The experts' axis is a digit of the ranks that carry the batch: users name those
ranks as a whole (dp=4) and its part of them (ep=2); inside a mesh both are axes, dp the copies of the experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from ..ops.strategy import Strategy


class Carries(Enum):
    """What is divided over the ranks of an axis."""

    STAGES = "pipeline stages"
    BATCH = "batch"
    SEQUENCE = "sequence"
    FEATURES = "heads and features"


@dataclass(frozen=True)
class AxisRole:
    """What an axis does with tensors.

    params_whole: every parameter is whole on it inside the graph. grads_partial: every gradient of a parameter leaves
    the graph as a partial sum over it. State of parameters that are whole on axes of partial gradients is what ZeRO
    splits. cuts_experts: parameters that expert ops alone read may be cut on it all the same. shares: it may cut
    dimensions that other axes cut which carry the same. is_searched: the search tries its widths; others are one wide
    unless they are forced, or the model asks for them. divides: users count its ranks among those of the axes that
    carry this, which it divides. allows: which of an op's strategies it runs, all where None. cost: (kind of
    collective, bytes of the tensor whole on the axis, seconds by the cluster's links) -> seconds.
    """

    name: str
    carries: Carries
    meaning: str
    params_whole: bool = False
    grads_partial: bool = False
    cuts_experts: bool = False
    shares: bool = False
    is_searched: bool = False
    divides: Carries | None = None
    allows: Callable[[Strategy], bool] | None = None
    cost: Callable[[str, float, float], float] | None = None

    @property
    def carries_batch(self) -> bool:
        return self.carries is Carries.BATCH

    @property
    def carries_sequence(self) -> bool:
        return self.carries is Carries.SEQUENCE

    @property
    def carries_features(self) -> bool:
        return self.carries is Carries.FEATURES

    @property
    def splits_state(self) -> bool:
        """Does ZeRO split training state over it?"""
        return self.params_whole and self.grads_partial

    @property
    def cuts_params(self) -> bool:
        """May it cut any parameter inside the graph?"""
        return self.is_placed and not self.params_whole

    @property
    def is_factor(self) -> bool:
        """Do the devices of a mesh number its width times those of the other axes, as users name them?"""
        return self.divides is None

    @property
    def is_placed(self) -> bool:
        """Do tensors have placements on it?"""
        return self.carries is not Carries.STAGES

    def shares_dimensions_with(self, other: AxisRole) -> bool:
        """May both cut the same dimension of a tensor? Tokens of all samples in one dimension are cut by samples, and
        those of a sample by its sequence."""
        if {self.carries, other.carries} == {Carries.BATCH, Carries.SEQUENCE}:
            return True
        return self.carries is other.carries and (self.shares or other.shares)


_ROLES = [
    AxisRole("pp", Carries.STAGES, "pipeline: layers split into stages", is_searched=True),
    AxisRole(
        "dp",
        Carries.BATCH,
        "data: the batch split, parameters as ZeRO says",
        params_whole=True,
        grads_partial=True,
        is_searched=True,
    ),
    AxisRole(
        "ep",
        Carries.BATCH,
        "expert: experts split over a part of the data ranks",
        params_whole=True,
        grads_partial=True,
        cuts_experts=True,
        shares=True,
        divides=Carries.BATCH,
    ),
    AxisRole(
        "cp",
        Carries.SEQUENCE,
        "context: each sequence split",
        params_whole=True,
        grads_partial=True,
    ),
    AxisRole("tp", Carries.FEATURES, "tensor: layers split", is_searched=True),
]


def roles() -> tuple[AxisRole, ...]:
    """All axes that there are, outermost (slowest links) first."""
    return tuple(_ROLES)


def names(wanted: Callable[[AxisRole], bool] = lambda role: True) -> tuple[str, ...]:
    """Names of the axes that are wanted, outermost first."""
    return tuple(role.name for role in _ROLES if wanted(role))


def role_of(name: str) -> AxisRole:
    return next(role for role in _ROLES if role.name == name)


@contextmanager
def registered(role: AxisRole, before: str | None = None) -> Iterator[AxisRole]:
    """Within it there is one more axis, outside the axis `before`; innermost where None."""
    place = len(_ROLES) if before is None else names().index(before)
    added = [*_ROLES[:place], role, *_ROLES[place:]]
    ranks = [0 if r.carries is Carries.STAGES else 1 if r.params_whole else 2 for r in added]
    if role.name in names() or ranks != sorted(ranks):
        raise ValueError(
            f"axis {role.name!r} before {before!r}: names differ, and stages come first, then axes on which parameters "
            "are whole, then those that cut them"
        )
    before_it = _ROLES[:]
    _ROLES[:] = added
    try:
        yield role
    finally:
        _ROLES[:] = before_it


def placement_axes(shape: MeshShape | None = None) -> tuple[str, ...]:
    """The axes that may have a placement in a plan, outermost first; of one mesh: those that are searched, and others
    where they are wide."""
    return names(lambda r: r.is_placed and (shape is None or r.is_searched or shape.size(r.name) > 1))


def stage_axes() -> tuple[str, ...]:
    return names(lambda role: role.carries is Carries.STAGES)


def batch_axes() -> tuple[str, ...]:
    """The axes that carry the batch: their ranks together hold a microbatch."""
    return names(lambda role: role.is_placed and role.carries_batch)


def sequence_axes() -> tuple[str, ...]:
    """The axes that cut sequences."""
    return names(lambda role: role.is_placed and role.carries_sequence)


def state_axes() -> tuple[str, ...]:
    """The axes over which ZeRO splits training state. They stand next to each other."""
    return names(lambda role: role.is_placed and role.splits_state)


def tensor_axes() -> tuple[str, ...]:
    """The axes over which parameters are cut inside the graph."""
    return names(lambda role: role.cuts_params)


def expert_axes() -> tuple[str, ...]:
    """The axes that carry the batch and may cut parameters of experts."""
    return names(lambda role: role.cuts_experts)


def state_axes_beside(cut: Iterable[str]) -> tuple[str, ...]:
    """The axes over which ZeRO splits the state of a parameter that these cut inside the graph."""
    taken = set(cut)
    return tuple(axis for axis in state_axes() if axis not in taken)


def inner_axes() -> tuple[str, ...]:
    """The axes inside those that carry the batch: they decide where a sample's tensors lie."""
    return (*sequence_axes(), *tensor_axes())


def searched_axes() -> tuple[str, ...]:
    return names(lambda role: role.is_searched)


def free_axis() -> str:
    """The axis that takes the devices which the others leave."""
    return names(lambda role: role.is_searched and role.carries_batch)[-1]


def easiest_first() -> tuple[str, ...]:
    """The axes whose widths number the devices, that which is changed with least harm first."""
    known = names(lambda role: role.is_factor)
    return tuple(sorted(known, key=lambda name: not role_of(name).carries_batch))


@dataclass(frozen=True, order=True)
class MeshShape:
    """Ordered axes and their sizes, outermost first. Ranks are indices into them."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, named: Mapping[str, int] | None = None) -> MeshShape:
        """Of sizes as users name them; axes not named are one wide. Raises ValueError for an axis that there is not,
        and for one that does not divide what it has to."""
        given = dict(named or {})
        if unknown := set(given) - set(names()):
            raise ValueError(f"{', '.join(sorted(unknown))}: no axis of a mesh; there are {', '.join(names())}")
        for part in names(lambda role: not role.is_factor):
            whole, size = _divided_by(part), given.get(part, 1)
            if given.get(whole, 1) % size:
                carried = role_of(part).divides.value  # type: ignore[union-attr]
                raise ValueError(
                    f"{part}={size} does not divide the {given.get(whole, 1)} ranks that carry the {carried}"
                )
            given[whole] = given.get(whole, 1) // size
        return cls(names(), tuple(given.get(name, 1) for name in names()))

    @cached_property
    def named(self) -> dict[str, int]:
        """Axis -> size, as users name them: that of an axis which another divides is with the other's ranks."""
        sizes = self.factors
        for part in names(lambda role: not role.is_factor):
            if part in sizes:
                sizes[_divided_by(part)] *= sizes[part]
        return sizes

    def size(self, axis: str) -> int:
        """1 where the mesh has no such axis."""
        return self._sizes.get(axis, 1)

    def size_of(self, axes: Iterable[str]) -> int:
        return math.prod(self.size(axis) for axis in axes)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return dict(zip(self.axes, self.sizes, strict=True))

    @property
    def factors(self) -> dict[str, int]:
        """Axis -> size: what ranks are indices into."""
        return dict(self._sizes)

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes)

    @cached_property
    def pipeline_ranks(self) -> int:
        return self.size_of(stage_axes())

    @cached_property
    def batch_ranks(self) -> int:
        return self.size_of(batch_axes())

    @cached_property
    def sequence_ranks(self) -> int:
        return self.size_of(sequence_axes())

    @cached_property
    def state_ranks(self) -> int:
        return self.size_of(state_axes())

    @cached_property
    def expert_ranks(self) -> int:
        return self.size_of(expert_axes())

    @cached_property
    def tensor_ranks(self) -> int:
        return self.size_of(tensor_axes())

    @property
    def ranks_per_stage(self) -> int:
        return self.num_devices // self.pipeline_ranks

    @cached_property
    def of_stage(self) -> MeshShape:
        """The mesh inside one pipeline stage."""
        return self.with_sizes(dict.fromkeys(stage_axes(), 1))

    @cached_property
    def inner_part(self) -> MeshShape:
        """The axes alone that decide where a sample's tensors lie, and experts."""
        kept = {*inner_axes(), *expert_axes()}
        return self.with_sizes({axis: 1 for axis in self.axes if axis not in kept})

    @cached_property
    def without_batch(self) -> MeshShape:
        """The mesh on which every rank takes the whole batch."""
        return self.with_sizes(dict.fromkeys(batch_axes(), 1))

    def with_sizes(self, sizes: Mapping[str, int]) -> MeshShape:
        return replace(self, sizes=tuple({**self.factors, **sizes}[axis] for axis in self.axes))

    def within(self, num_devices: int, axis: str = "") -> MeshShape:
        """The mesh with as many stages as the devices allow. Where it asks for more devices than there are, `axis`
        alone on all of them; the first of its wide axes where none is named."""
        if self.ranks_per_stage <= num_devices:
            return self.with_sizes({stage_axes()[0]: num_devices // self.ranks_per_stage})
        axis = axis or next(name for name in placement_axes() if self.size(name) > 1)
        return MeshShape.of().with_sizes({axis: num_devices})

    def in_copies(self, extent: int, beside: Iterable[str] = ()) -> tuple[MeshShape, str, str]:
        """The mesh with the axes that ZeRO splits state over as one, and that in two digits: `extent` neighbours that
        share one copy, and the copies. Also the names of both digits, copies first. beside: state axes that stay apart,
        inside the others."""
        apart = {axis for axis in beside if self.size(axis) > 1}
        axes = state_axes_beside(apart)
        copies = self.size_of(axes) // extent
        outer, inner = (f"{'.'.join(axes)}.{digit}" for digit in ("copies", "shards"))
        rows: list[tuple[str, int]] = []
        for axis, size in self.factors.items():
            if axis == axes[0]:
                rows += [(outer, copies), (inner, extent)]
            elif axis not in axes:
                rows.append((axis, size))
        return MeshShape(tuple(name for name, _ in rows), tuple(size for _, size in rows)), outer, inner

    def text(self, axes: Sequence[str] | None = None) -> str:
        """'pp=1 dp=2 tp=2': axes that are searched or wide, as users name them."""
        named = self.named
        shown = [name for name in axes or self.axes if role_of(name).is_searched or named.get(name, 1) > 1]
        return " ".join(f"{name}={named.get(name, 1)}" for name in shown)


def _divided_by(part: str) -> str:
    """The axis whose ranks this one divides, of those that users name: the innermost that carries the same."""
    return names(lambda role: role.is_factor and role.carries is role_of(part).divides)[-1]
