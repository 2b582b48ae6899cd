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
_captured: dict[tuple[Any, ...], ModelGraph] = {}  # of this process, and of the ranks forked from it
_kept: list[torch.nn.Module] = []


def _once(capture: Callable[..., ModelGraph]) -> Callable[..., ModelGraph]:
    """The same capture, each model and shape once in this process."""

    def cached(workload: Workload, *fusions: Any, **options: Any) -> ModelGraph:
        shapes = ((name, tuple(t.shape), t.dtype) for name, t in workload.example_batch.items())
        named = sorted((key, str(value)) for key, value in workload.spec.items() if key not in NOT_CAPTURED)
        model = workload.name if "model" in workload.spec else id(workload.model)
        modes = tuple(module.training for module in workload.model.modules())
        settings = (
            workload.precision,
            workload.loss,
            str(workload.batch_dims),
            modes,
            *map(tuple, fusions),
            *options.items(),
        )
        key = (capture.__name__, model, *named, *settings, *shapes)
        if key not in _captured:
            _captured[key] = capture(workload, *fusions, **options)
            _kept.append(workload.model)  # so that no other model gets its id
        return _captured[key]

    return cached


@contextlib.contextmanager
def captured_once() -> Iterator[None]:
    """Inside, plan and build share what they capture. For models that nothing changes between two captures."""
    kept = {name: _once(getattr(api, name)) for name in ("capture", "_capture_for_running")}
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
