"""What the outer search may choose from.

A candidate is a mesh of all devices, a microbatch, a schedule with its virtual stages and a ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ...costmodel.memory import Extents
from ...errors import ShardwrightError
from ...plans.axes import (
    MeshShape,
    easiest_first,
    expert_axes,
    free_axis,
    role_of,
    searched_axes,
    sequence_axes,
    stage_axes,
)
from ...schedules.published.library import SCHEDULES, SEARCHED
from .choices import Choices
from .forcing import contradiction, divisors, nearest_multiple

VIRTUAL_STAGES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
MAX_PP = 64
LONG_SEQUENCE = 16384  # tokens: shorter ones are cut where that is forced
LEAST_PART = 4096  # tokens of a sequence that each rank has


@dataclass(frozen=True)
class Candidate:
    """microbatch: sequences that all data-parallel ranks hold together; count of them in a step."""

    mesh: MeshShape
    microbatch: int
    count: int
    schedule: str
    virtual_stages: int
    zero: int
    split: tuple[int, int] | None = None  # data-parallel ranks that share parameters, and other state; None: all
    optimizer_state: str = "device"  # or "host"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a search looks each up many times
        order = self.schedule, self.virtual_stages
        return hash((self.mesh, self.microbatch, self.count, order, self.zero, self.split, self.optimizer_state))

    @cached_property
    def pp(self) -> int:
        return self.mesh.pipeline_ranks

    @property
    def batch_ranks(self) -> int:
        """Ranks that together hold a microbatch."""
        return self.mesh.batch_ranks

    @property
    def state_ranks(self) -> int:
        """Ranks over which ZeRO may split training state."""
        return self.mesh.state_ranks

    @property
    def tensor_ranks(self) -> int:
        """Ranks that parameters are cut over."""
        return self.mesh.tensor_ranks

    @cached_property
    def extents(self) -> Extents:
        """Ranks over which each kind of training state is split."""
        if self.state_ranks == 1 or self.zero == 0:
            return Extents()
        return Extents.of(self.zero, *(self.split or (self.state_ranks, self.state_ranks)))

    @property
    def choices(self) -> Choices:
        """What it decides; cuts and recomputation are open."""
        return Choices.of(
            self.mesh.named,
            zero=self.zero,
            schedule=self.schedule,
            microbatch=self.local_batch,
            global_microbatch=self.microbatch,
            virtual_stages=self.virtual_stages,
            zero_extent=self.split,
            optimizer_state=self.optimizer_state,
        )

    @property
    def on_host(self) -> bool:
        """Is the optimizer's state in host memory?"""
        return self.optimizer_state == "host"

    @property
    def simplicity(self) -> tuple[int, int, int, int, str]:
        """Of plans as fast as each other, the least is taken."""
        return (
            int(self.on_host),
            self.zero,
            self.virtual_stages,
            0 if self.split is None else 1 + (self.split[0] != self.split[1]),
            self.schedule,
        )

    @property
    def local_batch(self) -> int:
        return self.microbatch // self.batch_ranks

    @property
    def num_stages(self) -> int:
        return self.pp * self.virtual_stages

    def __str__(self) -> str:
        chunks = f" x{self.virtual_stages}" if self.virtual_stages > 1 else ""
        schedule = f"{self.schedule}{chunks} zero={self.zero}{self.split_text}"
        schedule += f" optimizer_state={self.optimizer_state}" if self.on_host else ""
        return f"{self.mesh.text()} microbatch={self.microbatch} {schedule}"

    @property
    def split_text(self) -> str:
        if self.split is None:
            return ""
        return (
            f" over {self.split[1]}"
            if self.zero < 3 or self.split[0] == self.split[1]
            else f" over {self.split[0]}/{self.split[1]}"
        )


def enumerate_candidates(
    forced: Choices,
    num_devices: int,
    global_batch: int,
    num_instances: int,
    max_tensor: int,
    domain: int = 1,
    max_sequence: int = 1,
    num_experts: int = 0,
) -> Iterator[Candidate]:
    """All candidates that divide. max_tensor: the widest axis that cuts parameters tried, unless forced; max_sequence:
    that cuts sequences. domain: devices that fast links join, inside which hybrid sharding may keep a copy.
    num_experts: of the model's layers that have the fewest; 0 where none have any.
    """
    place = forced.optimizer_state or "device"
    limits = {axis: min(num_instances, MAX_PP) if axis in stage_axes() else max_tensor for axis in searched_axes()}
    limits |= {axis: max_sequence for axis in sequence_axes() if axis not in forced.axes and max_sequence > 1}
    for mesh in _meshes(forced, num_devices, num_instances, limits, num_experts):
        ranks = mesh.batch_ranks
        for local_batch in divisors(global_batch // ranks) if global_batch % ranks == 0 else ():
            microbatch = local_batch * ranks
            if mesh.sequence_ranks > 1 and local_batch > 1:  # sequences that are cut come one at a time
                continue
            if not forced.allows(Choices(microbatch=local_batch, global_microbatch=microbatch)):
                continue
            count = global_batch // microbatch
            for schedule, chunks in _schedules(forced, mesh.pipeline_ranks, num_instances):
                for zero in _zeros(forced, mesh.state_ranks):
                    for split in _splits(forced, zero, mesh.state_ranks, domain // mesh.tensor_ranks):
                        yield Candidate(mesh, microbatch, count, schedule, chunks, zero, split, place)


def widest_sequence_axis(tokens: int, num_devices: int) -> int:
    """The widest that is tried for sequences of so many tokens."""
    return 1 if tokens < LONG_SEQUENCE else min(num_devices, tokens // LEAST_PART)


def _meshes(
    forced: Choices, num_devices: int, num_instances: int, limits: Mapping[str, int], num_experts: int
) -> Iterator[MeshShape]:
    """Widths of the axes that have a limit, those that are searched and, where sequences are long, those that cut them;
    the free one takes the devices that the others leave. What has none is as wide as it is forced to be."""
    given = {axis: size for axis, size in forced.factors.items() if not role_of(axis).is_searched}
    left = num_devices // math.prod(given.values()) if num_devices % math.prod(given.values()) == 0 else 0

    def widen(axes: Sequence[str], left: int, sizes: dict[str, int]) -> Iterator[MeshShape]:
        if not axes:
            if forced.size(free_axis()) in (None, left):
                for parts in _expert_widths(forced, left, num_experts):
                    yield MeshShape.of({**sizes, free_axis(): left, **parts})
            return
        for size in divisors(left):
            wanted, most = forced.size(axes[0]), limits[axes[0]]
            too_many_stages = axes[0] in stage_axes() and size > num_instances
            if wanted == size or (wanted is None and size <= most):
                if not too_many_stages:
                    yield from widen(axes[1:], left // size, {**sizes, axes[0]: size})

    if left:
        yield from widen([axis for axis in limits if axis != free_axis()], left, given)


def _expert_widths(forced: Choices, data_ranks: int, num_experts: int) -> Iterator[dict[str, int]]:
    """Of the data ranks, how many hold different experts: powers of two that divide both, up to all."""
    (axis,) = expert_axes()
    wanted = forced.size(axis)
    if wanted is not None:
        if data_ranks % wanted == 0:
            yield {axis: wanted}
        return
    yield {}
    width = 2
    while width <= num_experts and num_experts % width == 0 and data_ranks % width == 0:
        yield {axis: width}
        width *= 2


def _zeros(forced: Choices, ranks: int) -> Sequence[int]:
    if forced.zero is not None:
        return (forced.zero,)
    return (0,) if ranks == 1 else (0, 1, 2, 3)


def _splits(forced: Choices, zero: int, ranks: int, near: int) -> Iterator[tuple[int, int] | None]:
    """How far each kind of state is split: over all data-parallel ranks, or inside a fast domain of `near` of them;
    parameters inside and the rest over all is the third way."""
    if zero == 0 or ranks == 1:
        if forced.zero_extent is None:
            yield None
        return
    if forced.zero_extent is not None:
        params, others = forced.zero_extent
        if ranks % params == 0 and ranks % others == 0 and others % params == 0:
            yield None if params == others == ranks else forced.zero_extent
        return
    yield None
    if 1 < near < ranks and ranks % near == 0:
        yield near, near
        if zero == 3:
            yield near, ranks


def _schedules(forced: Choices, pp: int, num_instances: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        name = forced.schedule or "1f1b"
        if SCHEDULES[name].chunks[0] == 1 and forced.virtual_stages in (None, 1):
            if forced.cuts in (None, ()):
                yield name, 1
        return
    for name in SEARCHED if forced.schedule is None else (forced.schedule,):
        entry = SCHEDULES[name]
        options = [1] if entry.chunks[0] == 1 else [v for v in VIRTUAL_STAGES if v in entry.chunks]
        if forced.virtual_stages is not None:
            usual = forced.schedule is not None or forced.virtual_stages > 1 or entry.chunks[0] == 1
            options = [forced.virtual_stages] if forced.virtual_stages in entry.chunks and usual else []
        for chunks in options:
            if pp * chunks <= num_instances and (forced.cuts is None or len(forced.cuts) + 1 == pp * chunks):
                yield name, chunks


# What a user may let go of besides widths of axes, most particular first.
LET_GO = ("cuts", "zero_extent", "virtual_stages", "schedule", "global_microbatch", "microbatch")
MAX_BATCHES = 1024  # looked at


def nothing_divides(
    forced: Choices,
    num_devices: int,
    global_batch: int,
    num_instances: int,
    max_tensor: int,
    domain: int = 1,
    max_sequence: int = 1,
    num_experts: int = 0,
) -> ShardwrightError:
    """No candidate at all: names the forced value without which there is one, else the nearest batch that has one."""

    def first(of: Choices, batch: int) -> Candidate | None:
        space = num_devices, batch, num_instances, max_tensor, domain, max_sequence, num_experts
        return next(enumerate_candidates(of, *space), None)

    values = {
        name: value for name in (*LET_GO, *expert_axes(), *easiest_first()) if (value := forced.value(name)) is not None
    }
    named = " ".join(f"{name}={_text(value)}" for name, value in values.items())
    under = f"{num_devices} devices" + (f" with {named}" if named else "")
    near = (
        batch for d in range(1, min(num_devices, MAX_BATCHES) + 1) for batch in (global_batch + d, global_batch - d)
    )
    axes_alone = Choices(sizes=forced.sizes)
    if first(axes_alone, global_batch) is None:
        works = next((batch for batch in near if batch > 0 and first(forced, batch) is not None), None)
        if works is not None:
            return contradiction(
                f"a global batch of {global_batch} does not divide over {under}",
                f"data-parallel ranks take equal numbers of sequences; {num_instances} segments make no more stages",
                "--global-batch",
                f"--global-batch {works}",
            )
    for name in values:
        found = first(forced.without(name), global_batch)
        if found is not None:
            return contradiction(
                f"{name}={_text(values[name])} goes with no mesh of {num_devices} devices and a global batch of "
                f"{global_batch}" + (f", with {named}" if len(values) > 1 else ""),
                _why_not(name, values[name]),
                f"--force {name}",
                force_text(name, found),
            )
    return contradiction(
        f"{under} cannot be divided over a model of {num_instances} segments and a global batch of {global_batch}",
        f"every stage runs a segment, every data-parallel rank takes a sequence, and {_tensor_axis()} is at most "
        f"{max_tensor}",
        "--global-batch",
        f"--global-batch {nearest_multiple(global_batch, num_devices)}",
    )


def force_text(name: str, found: Candidate) -> str:
    """What forces a candidate's own choice; or that nothing does."""
    text = found.choices.texts().get(name)
    return f"no --force {name}" if text is None else f"--force {name}={text}"


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _tensor_axis() -> str:
    return next(axis for axis in searched_axes() if role_of(axis).cuts_params)


def _why_not(name: str, value: object) -> str:
    axis = free_axis()
    if name in expert_axes():
        return f"it divides {axis}"
    if name == "microbatch":
        return f"{axis} times {value} sequences must divide the global batch, for a {axis} that divides the devices"
    if name == "global_microbatch":
        return f"{value} sequences must divide over {axis}, for a {axis} that divides the devices"
    return "no candidate has it"
