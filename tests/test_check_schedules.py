"""Every schedule of the library computes what the model computes.

SHARDWRIGHT_FULL_MATRIX=1 runs each on every model and two pipeline sizes; else each on one.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from distributed import run_ranks
from matrix import FULL
from sparing_orders import letting_go
from test_check_matrix import MODELS, _compare, _once, spec

from shardwright import api, tasks
from shardwright.schedules import SCHEDULES
from shardwright.schedules.schedule import SYNTHESIZED

# Deep enough for four ranks with two stages each.
OVERRIDES: dict[str, dict[str, Any]] = {
    "tiny-llama": {"num_layers": 6},
    "tiny-gpt2": {"num_layers": 6},
    "tiny-t5": {"num_layers": 4, "num_decoder_layers": 4},
    "tiny-unet": {},
}
PIPELINED = [name for name in OVERRIDES if name in MODELS]


ORDERS = (*SCHEDULES, SYNTHESIZED)


def _chunks(schedule: str) -> list[int]:
    return [1, 2] if schedule == SYNTHESIZED else [v for v in (1, 2) if v in SCHEDULES[schedule].chunks]


def _combinations() -> list[tuple[str, str, int, int]]:
    """Model, schedule, pipeline ranks, chunks on each."""
    if FULL:
        orders = [(schedule, chunks) for schedule in ORDERS for chunks in _chunks(schedule)]
        return [(model, *order, pp) for model, order, pp in itertools.product(PIPELINED, orders, (2, 4))]
    few = [name for name in ORDERS if not name.endswith("_2bp") or name == "1f1b_2bp"]
    rows = [(PIPELINED[k % len(PIPELINED)], schedule, _chunks(schedule)[-1], 2) for k, schedule in enumerate(few)]
    return [
        *rows,
        ("tiny-gpt2", SYNTHESIZED, 1, 4),
        ("tiny-t5", "bitpipe", 2, 4),
        ("tiny-unet", "chimera", 1, 4),
    ]


def _check(model: str, tmp_path: Path, let_go: bool = False, **force: object) -> None:
    workload = tasks.check_workload({**spec(model), "overrides": OVERRIDES[model]})
    asked = {"tp": "1", "microbatch": "2", **{key: str(value) for key, value in force.items()}}
    ranks = int(asked["pp"]) * int(asked["dp"])
    with mock.patch.object(api, "capture", _once(api.capture)):
        plan = api.plan(workload, f"{ranks}xCPU", force=asked)
    assert plan.schedule.name == asked["schedule"]
    assert asked.get("virtual_stages") in (None, str(plan.schedule.virtual_stages))
    plan = letting_go(plan) if let_go else plan
    plan.save(tmp_path / "plan.json")
    found = run_ranks(ranks, _compare, str(tmp_path / "plan.json"))[0]
    assert found["losses"] == pytest.approx(found["reference_losses"], rel=1e-9)
    assert found["gradients"] and max(found["gradients"].values()) <= 1e-9


@pytest.mark.parametrize(("model", "schedule", "chunks", "pp"), _combinations())
def test_order_of_actions_does_not_change_the_numbers(
    model: str, schedule: str, chunks: int, pp: int, tmp_path: Path
) -> None:
    _check(model, tmp_path, schedule=schedule, virtual_stages=chunks, pp=pp, dp=1)


@pytest.mark.parametrize(
    ("model", "schedule"), [("tiny-llama", "zb_v"), ("tiny-t5", "1f1b"), ("tiny-unet", "zb_v"), ("tiny-gpt2", "zb_h1")]
)
def test_letting_activations_go_does_not_change_the_numbers(model: str, schedule: str, tmp_path: Path) -> None:
    _check(model, tmp_path, let_go=True, schedule=schedule, pp=2, dp=1)


@pytest.mark.parametrize(
    ("model", "schedule", "zero"),
    [("tiny-gpt2", "chimera", 0), ("tiny-llama", "bitpipe", 2), ("tiny-t5", "chimera", 3)],
)
def test_two_directions_with_data_parallel_ranks(model: str, schedule: str, zero: int, tmp_path: Path) -> None:
    _check(model, tmp_path, schedule=schedule, pp=2, dp=2, zero=zero)
