"""Program and single-device model agree in float64, loss and every gradient, for small models on every kind of layout.

SHARDWRIGHT_FULL_MATRIX=1 runs every model on every layout; else each model and each layout appears several times.
benchmarks/check_matrix.py runs the same through `shardwright check` itself and writes the figures down.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from distributed import run_ranks
from matrix import FULL

from shardwright import api, tasks
from shardwright.checking import TOLERANCE
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.workload import Workload

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from check_matrix import LAYOUTS, MODELS, spec

_captured: dict[tuple[Any, ...], ModelGraph] = {}  # of this process: each worker has its own


def _once(capture: Callable[[Workload], ModelGraph]) -> Callable[[Workload], ModelGraph]:
    """The same capture, each model and shape once in this process."""

    def cached(workload: Workload) -> ModelGraph:
        shapes = ((name, tuple(t.shape)) for name, t in workload.example_batch.items())
        key = (workload.name, str(workload.spec.get("overrides")), *shapes)
        if key not in _captured:
            _captured[key] = capture(workload)
        return _captured[key]

    return cached


def _compare(rank: int, plan: str) -> dict[str, Any]:
    """The task of `shardwright check`, in a worker that may have captured the model before."""
    events: list[dict[str, Any]] = []
    with mock.patch.object(api, "capture", _once(api.capture)):
        tasks.check({"plan": plan}, torch.device("cpu"), lambda **event: events.append(event))
    return next(event for event in events if event["event"] == "compared")


def _combinations() -> list[tuple[str, str]]:
    """Model and layout; by default every third one, along diagonals."""
    every = [(i + j, model, layout) for i, model in enumerate(MODELS) for j, layout in enumerate(LAYOUTS)]
    return [(model, layout) for k, model, layout in every if FULL or k % 3 == 0]


@pytest.mark.parametrize(("model", "layout"), _combinations())
def test_program_computes_what_the_model_computes(model: str, layout: str, tmp_path: Path) -> None:
    chosen = LAYOUTS[layout]
    with mock.patch.object(api, "capture", _once(api.capture)):
        plan = api.plan(tasks.check_workload(spec(model)), f"{chosen.processes}xCPU", force=chosen.force)
    for axis in {"pp", "dp", "tp", "zero"} & set(chosen.force):
        made = plan.zero if axis == "zero" else getattr(plan.mesh, axis)
        assert made == int(chosen.force[axis]), axis
    assert plan.microbatch.count >= 4 or "global_microbatch" not in chosen.force
    path = tmp_path / "plan.json"
    plan.save(path)
    found = run_ranks(chosen.processes, _compare, str(path))[0]
    for loss, expected in zip(found["losses"], found["reference_losses"], strict=True):
        assert abs(loss - expected) <= TOLERANCE * abs(expected)
    wrong = {name: error for name, error in found["gradients"].items() if not error <= TOLERANCE}
    assert not wrong
    assert found["gradients"], "nothing was compared"
