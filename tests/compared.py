"""The comparison that `shardwright check` makes, on forked ranks, each model captured once in the test process.

plan = plan_once(spec, "2xCPU", force)         # as api.plan, in float64
found = compared(plan, tmp_path)               # losses, reference_losses, gradients: {name: relative error}
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from forked import fork_ranks

from shardwright import api, hashes, tasks
from shardwright.checking import TOLERANCE
from shardwright.plans.document import Plan
from shardwright.profiler.batches import resize_batch
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.workload import Workload

NOT_CAPTURED = ("global_batch", "batch_dims", "optimizer")  # of a workload's spec: its graph is the same without them
Graphs = dict[tuple[Any, ...], tuple[ModelGraph, torch.nn.Module]]  # with the model, so that no other gets its id
_captured: Graphs = {}  # of this process, and of the ranks forked from it


def _once(capture: Callable[..., ModelGraph], captured: Graphs, by_name: bool) -> Callable[..., ModelGraph]:
    """The same capture, each model and shape once."""

    def cached(workload: Workload, *fusions: Any, **options: Any) -> ModelGraph:
        key = (capture.__name__, *_key(workload, by_name), *map(tuple, fusions), *options.items())
        if key not in captured:
            captured[key] = capture(workload, *fusions, **options), workload.model
        return captured[key][0]

    return cached


def _key(workload: Workload, by_name: bool) -> tuple[Any, ...]:
    named = sorted((key, str(value)) for key, value in workload.spec.items() if key not in NOT_CAPTURED)
    shapes = [(name, tuple(t.shape), t.dtype) for name, t in workload.example_batch.items()]
    settings = workload.precision, workload.loss, str(workload.batch_dims)
    modes = tuple(module.training for module in workload.model.modules())
    if by_name and "model" in workload.spec:
        return (workload.name, *named, *settings, modes, *shapes)
    values = [t.flatten()[:1000].tolist() for t in workload.example_batch.values() if t.device.type != "meta"]
    return (*_state(workload.model), *named, *settings, modes, *shapes, str(workload.call), str(values))


def _state(model: torch.nn.Module) -> tuple[Any, ...]:
    """What tells that a model was changed between two captures."""
    tensors = [(id(t), t._version, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    held = [
        (name, value if isinstance(value, (int, float, str)) else (id(value), len(value) if _is_filled(value) else 0))
        for module in model.modules()
        for name, value in vars(module).items()
    ]
    return (id(model), *tensors, *held)


def _is_filled(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


@contextlib.contextmanager
def captured_once(by_name: bool = True) -> Iterator[None]:
    """Inside, plan and build share what they capture. For models that nothing changes between two captures.

    by_name: over all calls, models of one spec are one; otherwise only a model with itself, while this lasts."""
    captured = _captured if by_name else {}
    kept = {name: _once(getattr(api, name), captured, by_name) for name in ("capture", "_capture_for_running")}
    with mock.patch.multiple(api, **kept):
        yield


def plan_once(spec: Mapping[str, Any], hardware: str, force: Mapping[str, Any], **options: Any) -> Plan:
    chosen = {key: str(value) for key, value in force.items()}
    with captured_once():
        return api.plan(tasks.check_workload(spec), hardware, force=chosen, **options)


def capture_for(plan: Plan, workload: Workload) -> None:
    """What a rank builds from, kept for the ranks that are forked from here. Inside captured_once()."""
    workload = hashes.with_plans_dims(plan, workload)
    api._capture_for_running(resize_batch(workload, plan.microbatch.size), plan.fusions)


def planned_and_ran(
    workload: Workload, num_ranks: int, force: Mapping[str, Any], function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """function(rank, plan, workload, *arguments) on that many ranks; results by rank. Planned and captured here, once;
    one rank is this process."""
    with captured_once():
        plan = api.plan(workload, f"{num_ranks}xCPU", force=force)
        if num_ranks == 1:
            return [function(0, plan, workload, *arguments)]
        capture_for(plan, workload)
        return fork_ranks(num_ranks, function, plan, workload, *arguments)


def compared(plan: Plan, folder: Path) -> dict[str, Any]:
    """What rank 0 of `shardwright check` reports."""
    path = folder / "plan.json"
    plan.save(path)
    with captured_once():
        capture_for(plan, tasks.check_workload(plan.workload))
        return fork_ranks(plan.mesh.num_devices, _compare, str(path))[0]


def _compare(rank: int, path: str) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    with captured_once():
        tasks.check({"plan": path}, torch.device("cpu"), lambda **event: events.append(event))
    return next(event for event in events if event["event"] == "compared")


def forked_launch(
    task: Mapping[str, Any], num_processes: int, on_event: Callable[[dict[str, Any]], None], *, debug: bool = False
) -> None:
    """As shardwright.launch.launch, for tests of what a command makes of a run: its processes import nothing anew."""
    for event in fork_ranks(num_processes, _done, dict(task))[0]:
        on_event(json.loads(json.dumps(event)))


def _done(rank: int, task: Mapping[str, Any]) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for seed in (random.seed, torch.manual_seed, numpy.random.seed):  # as shardwright.worker does
        seed(0)
    tasks.TASKS[task["task"]](task, torch.device("cpu"), lambda **event: events.append(event))
    return events


def assert_same_numbers(found: Mapping[str, Any]) -> None:
    for loss, expected in zip(found["losses"], found["reference_losses"], strict=True):
        assert abs(loss - expected) <= TOLERANCE * abs(expected)
    wrong = {name: error for name, error in found["gradients"].items() if not error <= TOLERANCE}
    assert not wrong
    assert found["gradients"], "nothing was compared"
