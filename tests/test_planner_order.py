"""An order of the plan's own: never slower than the published ones, within memory, kept by the plan document."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwright import api
from shardwright.errors import ShardwrightError
from shardwright.planner.report.timeline import predicted_trace
from shardwright.plans.document import Plan
from shardwright.plans.order import pipeline_schedule, splits_backward
from shardwright.profiler.models import load_workload
from shardwright.schedules import build_schedule
from shardwright.schedules.schedule import SYNTHESIZED

pytestmark = pytest.mark.usefixtures("shared_captures")

ASKED = {"pp": "4", "tp": "1", "dp": "2", "global_microbatch": "4"}


def planned(**force: str) -> Plan:
    settings = {"num_layers": 6, "hidden_size": 128, "num_heads": 4, "vocab_size": 4096, "n_positions": 64}
    options = {"global_batch": 32, "seq_len": 64, "overrides": settings}
    return api.plan("preset:gpt2", "8xH100-80GB", force={**ASKED, **force}, **options)


@pytest.fixture(scope="module")
def own() -> Plan:
    return planned(schedule="auto")


def test_it_is_no_slower_than_published_orders_of_one_direction(own: Plan) -> None:
    assert own.schedule.name == SYNTHESIZED
    for name in ("gpipe", "1f1b", "zb_h1", "zb_h2"):
        assert own.predicted.step_s <= planned(schedule=name).predicted.step_s * (1 + 1e-9), name


def test_document_keeps_it(own: Plan) -> None:
    again = Plan.model_validate_json(own.to_json())
    assert pipeline_schedule(again) == pipeline_schedule(own)
    assert splits_backward(again) == pipeline_schedule(own).splits_backward
    ends = [event.end_s for event in predicted_trace(own).events]
    assert max(ends) == pytest.approx(own.predicted.step_s, rel=0.02)


@pytest.mark.parametrize("name", ["1f1b", "zb_v"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_the_timeline_ends_when_the_step_does(name: str, max_grad_norm: float | None) -> None:
    """Under clipping the updates wait for the norm of all ranks; links have a latency."""
    force = {"pp": "4", "tp": "1", "dp": "1", "global_microbatch": "1", "schedule": name}
    settings = {"num_layers": 6, "hidden_size": 128, "num_heads": 4, "vocab_size": 4096, "n_positions": 64}
    workload = load_workload("preset:gpt2", global_batch=8, seq_len=64, overrides=settings)
    clipped = replace(workload, optimizer=replace(workload.optimizer, max_grad_norm=max_grad_norm))
    plan = api.plan(clipped, "4x1xA100-40GB", force=force)
    assert plan.predicted.tails_wait == (max_grad_norm is not None)
    assert any(row.send_latency_s for row in plan.predicted.stage_s)
    end = max(event.end_s for event in predicted_trace(plan).events)
    assert end == pytest.approx(plan.predicted.step_s, rel=1e-6)


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2", "auto"])
def test_no_cut_moved_by_one_makes_the_step_faster(own: Plan, name: str) -> None:
    """A large vocabulary makes the last stage heavy. Of an order of its own, under that order."""
    plan = own if name == "auto" else planned(schedule=name)
    first = [stage.segments[0] for stage in plan.stages][1:]
    for index in range(len(first)):
        for step in (-1, 1):
            cuts = [*first[:index], first[index] + step, *first[index + 1 :]]
            if sorted(set(cuts)) == cuts and cuts[0] > plan.stages[0].segments[0]:
                moved = planned(schedule=name, cuts=",".join(map(str, cuts)))
                assert plan.predicted.step_s <= moved.predicted.step_s * (1.01 if name == "auto" else 1 + 1e-9)


@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 20])
def test_it_serves_steps_of_any_number_of_microbatches(own: Plan, count: int) -> None:
    schedule = pipeline_schedule(own, count)  # complete and in order, or ValueError
    assert schedule.num_microbatches == count
    stages = [_times(row) for row in own.predicted.stage_s]
    made = schedule.simulate(stages, with_memory=False)  # or Deadlock
    assert made.makespan_s >= max(sum(t.forward_s + t.backward_s for t in stages) / 4, 0.0)


def test_an_order_of_two_chunks_chooses_its_placement() -> None:
    own = planned(schedule="auto", chunks="2", pp="2", dp="4")
    assert own.schedule.stage_rank in ([0, 1, 0, 1], [0, 1, 1, 0])
    assert [stage.ranks[0] // 4 for stage in own.stages] == own.schedule.stage_rank
    assert max(own.predicted.peak_bytes) <= own.predicted.memory_limit_bytes
    for name in ("interleaved_1f1b", "zb_v", "v_half"):
        published = planned(schedule=name, chunks="2", pp="2", dp="4")
        assert own.predicted.step_s <= published.predicted.step_s * (1 + 1e-9), name


def test_ctrl_c_while_an_order_is_made_keeps_the_best_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    whole = planned()
    monkeypatch.setattr("shardwright.planner.search.chosen.own_order", interrupted)
    plan = planned()
    timed = [row.step_s for row in plan.considered if row.step_s is not None]
    assert plan.predicted.step_s <= min(timed) * 1.011
    assert plan.predicted.step_s >= whole.predicted.step_s * (1 - 1e-9)
    assert plan.schedule.name != SYNTHESIZED


def test_published_names_stay_published() -> None:
    plan = planned(schedule="zb_h1")
    assert plan.schedule.order == []
    assert pipeline_schedule(plan) == build_schedule("zb_h1", 4, plan.microbatch.count, 1)


@pytest.mark.parametrize(
    "edited",
    [{"order": ["zz", "", "", ""]}, {"order": []}, {"stage_rank": []}, {"name": "nonsense"}],
    ids=str,
)
def test_an_edited_order_is_refused(own: Plan, edited: dict) -> None:
    changed = own.model_copy(update={"schedule": own.schedule.model_copy(update=edited)})
    with pytest.raises(ShardwrightError):
        pipeline_schedule(changed)


def test_certificate_holds_for_orders_of_any_kind(own: Plan) -> None:
    """Half of a plan's time is forwards and backwards that no order avoids; its bound must not lean on 1F1B's."""
    stages = [_times(row) for row in own.predicted.stage_s]
    work_s = sum(t.forward_s + t.backward_s for t in stages) * own.microbatch.count / own.mesh.pp
    assert own.certificate.lower_bound_s <= own.predicted.step_s
    assert own.certificate.status != "optimal" or work_s >= 0.99 * own.predicted.step_s


def _times(row):  # type: ignore[no-untyped-def]
    from shardwright.costmodel.stage_times import StageTimes

    return StageTimes(row.forward_s, row.backward_input_s, row.backward_weight_s)
