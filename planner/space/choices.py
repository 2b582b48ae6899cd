"""What is decided of a plan, and what is open: one record for what the user forces, what a candidate of the search has,
and what a plan states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ...plans.axes import names, role_of, stage_axes
from ...plans.document import Plan
from ...schedules.schedule import SYNTHESIZED


@dataclass(frozen=True)
class Choices:
    """None, False, "auto" and "time" leave a choice open. sizes: of axes of the mesh. microbatch: sequences on each
    data-parallel rank; global_microbatch: on all of them together."""

    sizes: tuple[tuple[str, int], ...] = ()
    zero: int | None = None
    schedule: str | None = None
    synthesize: bool = False  # an order of the plan's own, however little it saves
    microbatch: int | None = None
    global_microbatch: int | None = None
    virtual_stages: int | None = None
    recompute: str = "auto"
    cuts: tuple[int, ...] | None = None  # segment instance at which each next stage begins
    zero_extent: tuple[int, int] | None = None  # ranks that share parameters, ranks that share other state
    offload: bool = False  # an order of the plan's own may send activations to host memory
    optimizer_state: str | None = None  # with the copies that the optimizer steps over
    prefer: str = "time"  # of placements: "state" splits all weights but vectors, whatever it takes; "memory" all
    # training state that can be split, and then what is kept for the backward
    attention: str = "auto"  # where sequences are cut
    experts: str = "auto"  # how their work is shared on an expert axis
    expert_imbalance: str = "auto"  # of any number of ranks that hold experts, or RANKS:FACTOR/RANKS:FACTOR/...
    loss: str = "auto"  # "chunked": some rows of a linear layer's logits at a time; "whole": all of them
    sequence_parallel: str = "auto"  # may tensor ranks divide tokens between the products that they cut?
    memory_margin: float | None = None  # share of the memory limit that is left free; None: as the memory error asks

    @property
    def axes(self) -> dict[str, int]:
        return dict(self.sizes)

    @property
    def factors(self) -> dict[str, int]:
        """Those whose product is the number of devices."""
        return {axis: size for axis, size in self.sizes if role_of(axis).is_factor}

    @property
    def pp(self) -> int | None:
        return self.size(stage_axes()[0])

    def size(self, axis: str) -> int | None:
        return self.axes.get(axis)

    def value(self, name: str) -> Any:
        """Of an axis, or of another choice."""
        return self.size(name) if name in names() else getattr(self, name)

    def without(self, *choices: str) -> Choices:
        """The same, with these left to the search: axes, or choices that are None where they are free."""
        free: dict[str, Any] = {name: None for name in choices if name not in names()}
        return replace(self, sizes=tuple(pair for pair in self.sizes if pair[0] not in choices), **free)

    @property
    def decided(self) -> dict[str, Any]:
        """Axes and other choices that are not open."""
        others = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sizes"}
        return {**self.axes, **{name: value for name, value in others.items() if value != getattr(OPEN, name)}}

    def allows(self, other: Choices) -> bool:
        """Is nothing decided here that the other has decided otherwise?"""
        theirs = other.decided
        return all(theirs.get(name, value) == value for name, value in self.decided.items())

    def texts(self) -> dict[str, str]:
        """What is decided, as `--force` takes it."""
        texts = {name: _text(name, value) for name, value in self.decided.items()}
        if texts.pop("synthesize", ""):
            texts["schedule"] = SYNTHESIZED
        return texts

    @classmethod
    def of(cls, sizes: Mapping[str, int], **others: Any) -> Choices:
        """Axes in the order in which they are known."""
        return cls(sizes=tuple((name, sizes[name]) for name in names() if name in sizes), **others)

    @classmethod
    def of_plan(cls, plan: Plan) -> Choices:
        """What a plan states and a user could force. Recomputation that differs between segments is left open: nothing
        that is forced says so much."""
        own, extents = plan.schedule.name == SYNTHESIZED, plan.zero_extents
        others = extents.get("optimizer", 1)
        return cls.of(
            plan.mesh.model_dump(),
            zero=plan.zero,
            schedule=None if own else plan.schedule.name,
            synthesize=own,
            microbatch=plan.microbatch.size // plan.mesh.shape.batch_ranks,
            global_microbatch=plan.microbatch.size,
            virtual_stages=plan.schedule.virtual_stages,
            recompute="auto" if plan.memory_policy.recomputed(plan.segments) else "none",
            cuts=tuple(max(stage.segments) + 1 for stage in plan.stages[:-1]) or None,
            zero_extent=(extents["parameters"] if plan.zero == 3 else others, others) if extents else None,
            optimizer_state=plan.memory_policy.optimizer_state,
        )


OPEN = Choices()


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "auto"
    if isinstance(value, tuple):
        return ("/" if name == "zero_extent" else ",").join(map(str, value))
    return str(value)
