"""Every schedule of the library computes what the model computes.

Each runs on one model; `make test-all` runs each on every model and two pipeline sizes.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from compared import assert_same_numbers, compared, plan_once
from matrix import cells
from sparing_orders import letting_go
from test_check_matrix import MODELS, spec

from shardwright.schedules import SCHEDULES
from shardwright.schedules.schedule import SYNTHESIZED

PIPELINED = [name for name in ("tiny-llama", "tiny-gpt2", "tiny-t5", "tiny-unet") if name in MODELS]


ORDERS = (*SCHEDULES, SYNTHESIZED)


def _chunks(schedule: str) -> list[int]:
    return [1, 2] if schedule == SYNTHESIZED else [v for v in (1, 2) if v in SCHEDULES[schedule].chunks]


def _every() -> list[tuple[str, str, int, int]]:
    """Model, schedule, pipeline ranks, chunks on each."""
    orders = [(schedule, chunks) for schedule in ORDERS for chunks in _chunks(schedule)]
    return [(model, *order, pp) for model, order, pp in itertools.product(PIPELINED, orders, (2, 4))]


def _each_once() -> list[tuple[str, str, int, int]]:
    """Every order on two ranks: the first ones on the models in turn, the others on the model that is built fastest."""
    few = [name for name in ORDERS if not name.endswith("_2bp") or name == "1f1b_2bp"]
    models = [*PIPELINED, *["tiny-gpt2"] * len(few)]
    rows = [(model, schedule, _chunks(schedule)[-1], 2) for model, schedule in zip(models, few, strict=False)]
    return [*rows, ("tiny-gpt2", SYNTHESIZED, 1, 4)]


def _spec(model: str, ranks: int) -> dict[str, Any]:
    """Deep enough for two stages on each rank, and four microbatches of two, or eight on four ranks."""
    layers = {"num_layers": ranks + 2} if model != "tiny-t5" else {"num_layers": ranks, "num_decoder_layers": ranks}
    return {**spec(model), "overrides": layers if model != "tiny-unet" else {}, "global_batch": 4 * ranks}


def _check(model: str, tmp_path: Path, let_go: bool = False, **force: object) -> None:
    asked = {"tp": "1", "microbatch": "2", **{key: str(value) for key, value in force.items()}}
    pp, ranks = int(asked["pp"]), int(asked["pp"]) * int(asked["dp"])
    plan = plan_once(_spec(model, pp), f"{ranks}xCPU", asked)
    assert plan.schedule.name == asked["schedule"]
    assert asked.get("virtual_stages") in (None, str(plan.schedule.virtual_stages))
    assert_same_numbers(compared(letting_go(plan) if let_go else plan, tmp_path))


@pytest.mark.parametrize(("model", "schedule", "chunks", "pp"), cells(_every(), _each_once()))
def test_order_of_actions_does_not_change_the_numbers(
    model: str, schedule: str, chunks: int, pp: int, tmp_path: Path
) -> None:
    _check(model, tmp_path, schedule=schedule, virtual_stages=chunks, pp=pp, dp=1)


LETTING_GO = [("tiny-llama", "zb_v"), ("tiny-t5", "1f1b"), ("tiny-unet", "zb_v"), ("tiny-gpt2", "zb_h1")]
TWO_DIRECTIONS = [("tiny-gpt2", "chimera", 0), ("tiny-llama", "bitpipe", 2), ("tiny-t5", "chimera", 3)]


@pytest.mark.parametrize(("model", "schedule"), cells(LETTING_GO, LETTING_GO[:2]))
def test_letting_activations_go_does_not_change_the_numbers(model: str, schedule: str, tmp_path: Path) -> None:
    _check(model, tmp_path, let_go=True, schedule=schedule, pp=2, dp=1)


@pytest.mark.parametrize(("model", "schedule", "zero"), cells(TWO_DIRECTIONS, TWO_DIRECTIONS[:2]))
def test_two_directions_with_data_parallel_ranks(model: str, schedule: str, zero: int, tmp_path: Path) -> None:
    _check(model, tmp_path, schedule=schedule, pp=2, dp=2, zero=zero)
