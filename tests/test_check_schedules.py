"""Every schedule that the runtime executes computes what the model computes.

SHARDWRIGHT_FULL_MATRIX=1 runs each on every model; else each on one.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from distributed import run_ranks
from test_check_matrix import MODELS, _compare, _once, spec

from shardwright import api, tasks
from shardwright.planner.schedules import SCHEDULES
from shardwright.planner.schedules.library import EXECUTED

PIPELINED = [name for name in ("tiny-llama", "tiny-gpt2", "tiny-t5", "tiny-unet") if name in MODELS]


def _combinations() -> list[tuple[str, str, int]]:
    rows = [(model, schedule, 2) for schedule in EXECUTED for model in PIPELINED]
    if os.environ.get("SHARDWRIGHT_FULL_MATRIX"):
        return rows
    return [rows[len(PIPELINED) * k + k % len(PIPELINED)] for k in range(len(EXECUTED))] + [("tiny-t5", "zb_h1", 4)]


@pytest.mark.parametrize(("model", "schedule", "pp"), _combinations())
def test_order_of_actions_does_not_change_the_numbers(model: str, schedule: str, pp: int, tmp_path: Path) -> None:
    force = {"pp": str(pp), "dp": "1", "tp": "1", "schedule": schedule, "microbatch": "2"}
    with mock.patch.object(api, "capture", _once(api.capture)):
        plan = api.plan(tasks.check_workload(spec(model)), f"{pp}xCPU", force=force)
    assert plan.schedule.name == schedule
    assert plan.schedule.virtual_stages in SCHEDULES[schedule].chunks
    plan.save(tmp_path / "plan.json")
    found = run_ranks(pp, _compare, str(tmp_path / "plan.json"))[0]
    assert found["losses"] == pytest.approx(found["reference_losses"], rel=1e-9)
    assert found["gradients"] and max(found["gradients"].values()) <= 1e-9
