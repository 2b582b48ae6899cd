"""The plan as people read it, from the document alone."""

from __future__ import annotations

import io

import pytest

from shardwright.plans.document import ConservativeOp, Plan, Stage
from shardwright.render import make_console, print_plan


def rendered(plan: Plan, width: int, top: int = 8) -> str:
    file = io.StringIO()
    print_plan(plan, top=top, console=make_console(file=file, width=width))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_fits_the_width(hand_made_plan, width):
    assert max(len(line) for line in rendered(hand_made_plan, width).splitlines()) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_shows_what_the_plan_decides_and_predicts(hand_made_plan, width):
    text = rendered(hand_made_plan, width)
    for fact in (
        "preset:demo-llama on 4xCPU", "pp 2 x tp 2", "1F1B", "4 microbatches of 4", "1.25 s", "410 tokens/s",
        "MFU 41.0%", "50.00 ms of communication exposed", "bubble 20.0%", "embed, block x2", "2-3", "560.00 MiB",
        "600.00 MiB", "40.00 MiB", "optimizer", "12.0%", "capture 1.50 s", "solve 2.00 s", "measured", "datasheet",
        "pp=2", "slower by", "int. 1F1B",
    ):  # fmt: skip
        assert fact in text, fact


def test_a_plan_read_back_from_json_looks_the_same(hand_made_plan, tmp_path):
    hand_made_plan.save(tmp_path / "plan.json")
    assert rendered(Plan.load(tmp_path / "plan.json"), 100) == rendered(hand_made_plan, 100)


def test_top_limits_the_runners_up(hand_made_plan):
    assert "1 more considered" in rendered(hand_made_plan, 100, top=1)
    assert "Runner-up" not in rendered(hand_made_plan, 100, top=0)


def test_conservative_ops_are_listed_with_cost_and_source(hand_made_plan):
    op = ConservativeOp(op="aten.roll", node="roll", source="model.py:12", cost_s=0.002)
    text = rendered(hand_made_plan.model_copy(update={"conservative_ops": [op, op]}), 100)
    assert "aten.roll x2" in text and "4.00 ms" in text and "model.py:12" in text


def test_many_stages_are_elided(hand_made_plan):
    stages = [Stage(segments=[i], ranks=[i]) for i in range(64)]
    text = rendered(hand_made_plan.model_copy(update={"stages": stages, "segments": []}), 100)
    assert len(text.splitlines()) < 80 and "..." in text


def test_a_plan_without_a_memory_policy_recomputes_nothing(hand_made_plan):
    policy = hand_made_plan.memory_policy.model_copy(update={"recompute": {}})
    lines = rendered(hand_made_plan.model_copy(update={"memory_policy": policy}), 100).splitlines()
    assert [line.split()[1:] for line in lines if line.split()[:1] == ["recompute"]] == [["nothing"]]
