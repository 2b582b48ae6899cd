"""What must hold between the parts of a plan document, from the document alone.

A plan that was edited, cut short or damaged is refused whole, before anything draws, explains or runs it: first by the
seal, a digest of everything else in the document, then by what the parts say of each other.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..costmodel.actions import parse_action
from ..schedules import SCHEDULES
from ..schedules.schedule import SYNTHESIZED
from .axes import MeshShape

Document = Mapping[str, Any]
MAX_DEVICES = 1 << 24
_PLACE = r"(?:R|P|S\(\d{1,3}\))"
_PLACEMENT = re.compile(rf"{_PLACE}|(?:{_PLACE}(?:,{_PLACE})*)?->(?:{_PLACE}(?:,{_PLACE})*)?(?:@\w+)?")
_COUNTS = {"global_batch": 1, "seq_len": 1, "batch_size": 0, "seed": 0}  # of the workload, with the least of each
_TEXTS = ("model", "kind", "optimizer")
_TABLES = ("overrides", "precision")
_STATE_KINDS = ("parameters", "gradients", "optimizer")


def seal(document: Document) -> str:
    """A digest of the whole document but for the seal itself."""
    rest = {**document, "hashes": {key: value for key, value in document["hashes"].items() if key != "document"}}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def problem_of(document: Document) -> str:
    """The first thing that cannot be, as 'field: reason'; '' where the document agrees with itself.

    document: one that the schema has accepted.
    """
    for check in _CHECKS:
        if found := check(document):
            return found
    return ""


def _num_devices(document: Document) -> int:
    return MeshShape.of(document["mesh"]).num_devices


def _check_sizes(document: Document) -> str:
    for axis, size in document["mesh"].items():
        if size < 1:
            return f"mesh.{axis}: {size} ranks"
    try:
        MeshShape.of(document["mesh"])
    except ValueError as error:
        return f"mesh: {error}"
    if _num_devices(document) > MAX_DEVICES:
        return f"mesh: {_num_devices(document)} devices, more than {MAX_DEVICES}"
    for key, number in document["microbatch"].items():
        if isinstance(number, int) and number < 1:
            return f"microbatch.{key}: {number}"
    if document["schedule"]["virtual_stages"] < 1:
        return f"schedule.virtual_stages: {document['schedule']['virtual_stages']}"
    return ""


def _check_names(document: Document) -> str:
    workload = document["workload"]
    if type(workload.get("global_batch")) is not int:
        return f"workload.global_batch: {workload.get('global_batch')!r}"
    for key, value in workload.items():
        if key in _COUNTS and value is not None and (type(value) is not int or value < _COUNTS[key]):
            return f"workload.{key}: {value!r}"
        if key in _TEXTS and not (value is None or isinstance(value, str)):
            return f"workload.{key}: {value!r} is no text"
        if key in _TABLES and not isinstance(value, dict):
            return f"workload.{key}: {value!r} is no table"
    return ""


def _check_hardware(document: Document) -> str:
    hardware = document["hardware"]
    if not isinstance(hardware.get("name", ""), str):
        return "hardware.name: not a name"
    hosts = hardware.get("hosts", [])
    if not isinstance(hosts, list) or not all(isinstance(host, dict) for host in hosts):
        return "hardware.hosts: not a list of hosts"
    if not all(isinstance(host.get("device", ""), str) for host in hosts):
        return "hardware.hosts: a device that is no name"
    limit = hardware.get("memory_limit_bytes")
    if limit is not None and (type(limit) is not int or not 0 < limit < 1 << 62):
        return f"hardware.memory_limit_bytes: {limit!r}"
    sources, notes = hardware.get("sources", {}), hardware.get("notes", [])
    if not isinstance(sources, dict) or not all(type(count) is int for count in sources.values()):
        return "hardware.sources: no counts of figures by kind"
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        return "hardware.notes: not a list of texts"
    return ""


def _check_stages(document: Document) -> str:
    stages, devices = document["stages"], _num_devices(document)
    if not stages or len(stages) % document["mesh"]["pp"]:
        return f"stages: {len(stages)} over {document['mesh']['pp']} pipeline ranks"
    for number, stage in enumerate(stages):
        ranks = stage["ranks"]
        if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= rank < devices for rank in ranks):
            return f"stages.{number}.ranks: {len(ranks)} ranks that are not different ranks of 0 to {devices - 1}"
    runs, last = [stage["segments"] for stage in stages], -1
    for number, run in enumerate(runs):
        if not run or any(a >= b for a, b in itertools.pairwise(run)) or run[-1] <= last:
            return f"stages.{number}.segments: {run} does not come after what the stage before it runs"
        last = run[-1]
    # what depends on inputs alone (a prologue) may be run by several stages, or by none where nothing reads it
    names = document["segments"]
    reached_segments = {index for run in runs for index in run}
    if not reached_segments <= set(range(len(names))):
        return f"stages: they run segments besides 0 to {len(names) - 1}"
    if left := [i for i, name in enumerate(names) if i not in reached_segments and not name.startswith("prologue")]:
        return f"stages: none runs segment {left[0]}"
    reached = {rank for stage in stages for rank in stage["ranks"]}
    if len(reached) != devices:
        return f"stages: {devices - len(reached)} of {devices} ranks have none"
    return ""


def _check_schedule(document: Document) -> str:
    schedule, pp = document["schedule"], document["mesh"]["pp"]
    if schedule["name"] != SYNTHESIZED:
        if schedule["name"] not in SCHEDULES:
            return f"schedule.name: {schedule['name']!r} is no schedule"
        return "schedule.order: only a synthesized schedule has one" if schedule["order"] else ""
    if len(schedule["order"]) != pp or len(schedule["stage_rank"]) != len(document["stages"]):
        return f"schedule: {len(schedule['order'])} rows of actions for {pp} ranks"
    if not all(0 <= rank < pp for rank in schedule["stage_rank"]):
        return "schedule.stage_rank: a stage on a rank that is not there"
    for number, row in enumerate(schedule["order"]):
        try:
            actions = [parse_action(text) for text in row.split()]
        except ValueError as error:
            return f"schedule.order.{number}: {error}"
        if any(a.stage >= len(document["stages"]) or a.microbatch >= document["microbatch"]["count"] for a in actions):
            return f"schedule.order.{number}: an action of a stage or microbatch that is not there"
    return ""


def _check_placements(document: Document) -> str:
    axes = document["placement_axes"]
    if len(set(axes)) != len(axes) or not set(axes) <= set(document["mesh"]):
        return f"placement_axes: {', '.join(axes)} are not different axes of the mesh"
    for name in dict.fromkeys(document["segments"]):
        if not document["placements"].get(name):
            return f"placements.{name}: nothing is placed"
    for segment, rows in document["placements"].items():
        for node, places in rows.items():
            if len(places) != len(axes):
                return f"placements.{segment}.{node}: {len(places)} placements on {len(axes)} axes"
            if wrong := [place for place in places if not _PLACEMENT.fullmatch(place)]:
                return f"placements.{segment}.{node}: {wrong[0]!r} is no placement"
    return ""


def _check_state(document: Document) -> str:
    ranks = MeshShape.of(document["mesh"]).state_ranks
    if document["zero"] not in (0, 1, 2, 3):
        return f"zero: {document['zero']} is not 0 to 3"
    for kind, extent in document["zero_extents"].items():
        if kind not in _STATE_KINDS or extent < 1 or ranks % extent:
            return f"zero_extents.{kind}: {extent} of {ranks} data ranks"
    known = set(document["segments"]) | set(document["placements"])
    if unknown := [name for name in document["memory_policy"]["recompute"] if name not in known]:
        return f"memory_policy.recompute.{unknown[0]}: there is no such segment"
    segments, apart = document["segments"], document["memory_policy"]["instances"]
    if beyond := [index for index in apart if not 0 <= int(index) < len(segments)]:
        return f"memory_policy.instances.{beyond[0]}: there is no such segment instance"
    chosen = [("recompute", name, name, choice) for name, choice in document["memory_policy"]["recompute"].items()]
    chosen += [("instances", index, segments[int(index)], choice) for index, choice in apart.items()]
    for kind, key, name, choice in chosen:
        rows = document["placements"].get(name, {})
        if not isinstance(choice, str) and (strangers := [op for op in choice if op not in rows]):
            return f"memory_policy.{kind}.{key}: {strangers[0]!r} is not placed"
    return ""


def _check_predicted(document: Document) -> str:
    predicted = document["predicted"]
    if found := _not_a_quantity(predicted, "predicted"):
        return found
    if predicted["step_s"] <= 0:
        return f"predicted.step_s: {predicted['step_s']} s"
    if not 0 <= predicted["bubble_fraction"] <= 1:
        return f"predicted.bubble_fraction: {predicted['bubble_fraction']}"
    stages = len(document["stages"])
    for key, optional in (("peak_bytes", False), ("stage_s", True)):
        length = len(predicted[key])
        if length != stages and not (optional and length == 0):
            return f"predicted.{key}: {length} figures for {stages} stages"
    tails, pp = len(predicted["tail_s"]), document["mesh"]["pp"]
    if tails not in (0, pp):
        return f"predicted.tail_s: {tails} figures for {pp} pipeline ranks"
    return _not_a_quantity(document["planning_s"], "planning_s")


def _not_a_quantity(value: Any, where: str) -> str:
    """Seconds, bytes and shares are finite and not negative."""
    if isinstance(value, dict):
        return next((f for key, inner in value.items() if (f := _not_a_quantity(inner, f"{where}.{key}"))), "")
    if isinstance(value, list):
        return next((f for n, inner in enumerate(value) if (f := _not_a_quantity(inner, f"{where}.{n}"))), "")
    if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
        return f"{where}: {value}"
    return ""


def _check_experts(document: Document) -> str:
    size, per_host = document["mesh"].get("ep", 1), document["expert_ranks_per_host"]
    return f"expert_ranks_per_host: {per_host}, of {size} ranks" if size % per_host else ""


_CHECKS: tuple[Callable[[Document], str], ...] = (
    _check_sizes, _check_names, _check_hardware, _check_stages, _check_schedule, _check_placements, _check_state,
    _check_experts, _check_predicted,
)  # fmt: skip
