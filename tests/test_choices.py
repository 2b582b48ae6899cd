"""What a user forces, what a candidate has decided and what a plan states are one record."""

from __future__ import annotations

from typing import Any

import pytest

import shardwright
from shardwright.planner.space.candidates import enumerate_candidates
from shardwright.planner.space.choices import OPEN, Choices
from shardwright.planner.space.forcing import force_keys, parse_forced

EVERY = Choices.of(
    {"pp": 2, "dp": 4, "cp": 1, "ep": 2, "tp": 2}, zero=3, schedule="1f1b", microbatch=2,
    global_microbatch=8, virtual_stages=1, recompute="all", cuts=(3, 5), zero_extent=(2, 4), offload=True,
    optimizer_state="host", prefer="memory", attention="gather", experts="dispatch", sequence_parallel="off",
    memory_margin=0.05, loss="chunked", expert_imbalance="2:1.25",
)  # fmt: skip


def test_choices_are_read_back_from_their_texts() -> None:
    assert parse_forced(EVERY.texts()) == EVERY
    assert set(EVERY.texts()) == set(force_keys())
    assert parse_forced(Choices(synthesize=True).texts()) == Choices(synthesize=True)
    assert OPEN.texts() == {} and parse_forced({}) == OPEN


@pytest.mark.parametrize(
    "force", [{"pp": 2}, {"dp": 4, "zero": 2}, {"microbatch": 2}, {"global_microbatch": 8}, {"zero": 3, "ep": 2}]
)
def test_a_force_leaves_the_candidates_that_agree_with_it_and_no_others(force: dict[str, int]) -> None:
    forced = parse_forced({key: str(value) for key, value in force.items()})
    every, found = (
        {str(c): c.choices for c in enumerate_candidates(of, 8, 16, 6, max_tensor=8, domain=4, num_experts=4)}
        for of in (OPEN, forced)
    )
    assert found and len(found) < len(every)
    assert found == {text: choices for text, choices in every.items() if forced.allows(choices)}


@pytest.mark.parametrize("force", [{"pp": 2}, {"dp": 4, "zero": 3, "zero_extent": "2/4"}])
def test_what_a_plan_states_can_be_forced_and_gives_it_again(shared_captures: None, force: dict[str, Any]) -> None:
    first = shardwright.plan("preset:tiny-llama", "4xCPU", global_batch=8, force=force)
    stated = Choices.of_plan(first)
    assert parse_forced({key: str(value) for key, value in force.items()}).allows(stated)
    again = shardwright.plan("preset:tiny-llama", "4xCPU", global_batch=8, force=stated.texts())
    assert Choices.of_plan(again) == stated
    assert (again.predicted.step_s, again.placements) == (first.predicted.step_s, first.placements)
