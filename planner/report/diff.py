"""Two plans side by side, from their documents alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ...plans.axes import names as axis_names
from ...plans.document import Plan
from ...plans.order import num_activations, num_let_go
from ...units import format_bytes

TIGHT = 0.95  # of the memory limit


@dataclass(frozen=True)
class Change:
    """what: a choice or a figure. Texts, as people read them."""

    what: str
    before: str
    after: str


@dataclass(frozen=True)
class PlacementChange:
    """An op or tensor of a distinct segment that lies otherwise; '' where only one plan has it."""

    segment: str
    node: str
    before: str
    after: str


@dataclass(frozen=True)
class Difference:
    """time_s: "compute", "communication", "bubble" -> (before, after), of the step on the slowest rank. binding: of
    the second plan, what keeps it from being faster."""

    choices: tuple[Change, ...]
    step_s: tuple[float, float]
    time_s: dict[str, tuple[float, float]]
    memory_bytes: dict[str, tuple[int, int]]  # of the worst rank
    peak_bytes: tuple[int, int]
    placements: tuple[PlacementChange, ...]
    comparable: bool  # whether both are of the same model: placements go by the names of its ops
    binding: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(before: Plan, after: Plan) -> Difference:
    first, second = time_parts(before), time_parts(after)
    kinds = dict.fromkeys([*before.predicted.memory, *after.predicted.memory])
    comparable = before.hashes.model == after.hashes.model
    return Difference(
        choices=tuple(_choices(before, after)),
        step_s=(before.predicted.step_s, after.predicted.step_s),
        time_s={part: (first[part], second[part]) for part in first},
        memory_bytes={
            kind: (before.predicted.memory.get(kind, 0), after.predicted.memory.get(kind, 0)) for kind in kinds
        },
        peak_bytes=(max(before.predicted.peak_bytes, default=0), max(after.predicted.peak_bytes, default=0)),
        placements=tuple(_placements(before, after)) if comparable else (),
        comparable=comparable,
        binding=binding(after),
    )


def time_parts(plan: Plan) -> dict[str, float]:
    """Where the step goes: waiting in the pipeline, collectives that nothing hides, and the rest, which computes."""
    predicted = plan.predicted
    bubble_s = predicted.bubble_fraction * predicted.step_s
    exposed_s = min(predicted.exposed_comm_s, predicted.step_s - bubble_s)
    return {"compute": predicted.step_s - bubble_s - exposed_s, "communication": exposed_s, "bubble": bubble_s}


def binding(plan: Plan) -> str:
    """The constraint or the cost that stands in the way of a faster step."""
    limit, peak = plan.predicted.memory_limit_bytes, max(plan.predicted.peak_bytes, default=0)
    parts = time_parts(plan)
    found = []
    if limit and peak > TIGHT * limit:
        kind = max(plan.predicted.memory, key=lambda k: plan.predicted.memory[k], default="memory")
        found.append(f"memory: {format_bytes(peak)} of {format_bytes(limit)}, most of it {kind}")
    recomputed = plan.memory_policy.recomputed(plan.segments)
    if whole := [name for name, text in recomputed.items() if text == "all"]:
        found.append(f"memory: {len(whole)} kinds of segment are computed twice to save it")
    if parts_of := [f"{text} of {name}" for name, text in recomputed.items() if text != "all"]:
        found.append(f"memory: {', '.join(parts_of)} are computed twice to save it")
    if plan.memory_policy.optimizer_state == "host":
        found.append("memory: the optimizer steps in host memory to save it")
    again, away = num_let_go(plan)
    for count, what in ((again, "computed twice"), (away, "sent to host memory")):
        if count:
            found.append(f"memory: {count} of {num_activations(plan)} activations are {what} to save it")
    lost = max(("communication", "bubble"), key=lambda part: parts[part])
    if parts[lost] > 0.01 * plan.predicted.step_s:
        words = {"communication": "collectives that nothing hides", "bubble": "ranks that wait in the pipeline"}
        found.append(f"time: {parts[lost] / plan.predicted.step_s:.1%} of the step goes to {words[lost]}")
    return "; ".join(found) or "compute"


def _choices(before: Plan, after: Plan) -> Iterator[Change]:
    first, second = _described(before), _described(after)
    for what in dict.fromkeys([*first, *second]):
        if first.get(what, "") != second.get(what, ""):
            yield Change(what, first.get(what, ""), second.get(what, ""))


def _described(plan: Plan) -> dict[str, str]:
    sizes = plan.mesh.shape
    recomputed = plan.memory_policy.recomputed(plan.segments)
    let_go = zip(num_let_go(plan), ("recomputed", "offloaded"), strict=True)
    return {
        "model": str(plan.workload.get("model", "")),
        "hardware": str(plan.hardware.get("name", "")),
        **{axis: str(sizes.size(axis)) for axis in axis_names()},
        "microbatch": f"{plan.microbatch.count} of {plan.microbatch.size}",
        "microbatch of a rank": str(plan.microbatch.size // plan.mesh.shape.batch_ranks),
        **{f"split on {axis}": _shares(s) for axis, s in plan.predicted.split.items() if sizes.size(axis) > 1},
        "schedule": plan.schedule.name if plan.mesh.pp > 1 else "",
        "virtual stages": str(plan.schedule.virtual_stages),
        "stage cuts": " ".join(str(len(stage.segments)) for stage in plan.stages),
        "ZeRO": str(plan.zero),
        "ZeRO extents": " ".join(f"{kind}={size}" for kind, size in plan.zero_extents.items()),
        "recompute": "; ".join(f"{name}={text}" for name, text in recomputed.items()),
        "optimizer state": plan.memory_policy.optimizer_state,
        "let go one by one": ", ".join(f"{count} {what}" for count, what in let_go if count),
        "fused kernels": " ".join(plan.fusions),
        "forced": " ".join(f"{key}={value}" for key, value in plan.forced.items()),
    }


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%} of {kind}" for kind, share in shares.items())


def _placements(before: Plan, after: Plan) -> Iterator[PlacementChange]:
    for segment in dict.fromkeys([*before.placements, *after.placements]):
        first, second = before.placements.get(segment, {}), after.placements.get(segment, {})
        for node in dict.fromkeys([*first, *second]):
            texts = tuple(_text(rows.get(node), plan) for rows, plan in ((first, before), (second, after)))
            if texts[0] != texts[1]:
                yield PlacementChange(segment, node, *texts)


def _text(places: list[str] | None, plan: Plan) -> str:
    """On the axes that are wider than one and split something: on the others a placement means nothing."""
    sizes = plan.mesh.shape
    if places is None:
        return ""
    split = [
        f"{axis} {place}"
        for axis, place in zip(plan.placement_axes, places, strict=True)
        if sizes.size(axis) > 1 and ("S(" in place or "P" in place)
    ]
    return ", ".join(split) or "whole"
