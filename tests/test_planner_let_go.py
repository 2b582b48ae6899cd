"""Plans that let single activations go where memory is short."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from compared import assert_same_numbers, captured_once, compared
from distributed import run_ranks
from runtime_toy import make_batch, make_plan, make_program, make_toy
from sparing_orders import letting_go

from shardwright import api, cli, tasks
from shardwright.costmodel.actions import Action
from shardwright.costmodel.activation_memory import peak_host_memory
from shardwright.costmodel.stage_times import StageTimes
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.planner.report.timeline import predicted_trace
from shardwright.planner.search import synthesized_schedule
from shardwright.plans.document import Plan
from shardwright.plans.order import num_let_go, pipeline_schedule
from shardwright.schedules.schedule import SYNTHESIZED

LIMIT = 820 << 10
SHAPE = {"num_layers": 8, "hidden_size": 32}


def on_a_busy_machine():
    """There the clock of an order's synthesis counts twice."""
    return mock.patch.object(synthesized_schedule, "MAX_SECONDS", 12.0)


def planned(memory_limit_bytes: int = LIMIT, **force: str) -> Plan:
    workload = tasks.check_workload({"model": "preset:tiny-gpt2", "global_batch": 16, "overrides": SHAPE})
    settings = {"pp": "4", "tp": "1", "microbatch": "2", **force}
    with captured_once(), on_a_busy_machine():
        return api.plan(workload, "4xCPU", force=settings, memory_limit_bytes=memory_limit_bytes)


@pytest.fixture(scope="module")
def short() -> Plan:
    return planned()


def test_where_memory_is_short_single_activations_are_recomputed(short: Plan) -> None:
    again, away = num_let_go(short)
    assert 0 < again < len(short.stages) * short.microbatch.count and away == 0
    assert max(short.predicted.peak_bytes) <= LIMIT
    for name in ("gpipe", "1f1b", "zb_h1", "interleaved_1f1b", "chimera"):
        try:
            published = planned(schedule=name)
        except ShardwrightError as error:
            assert error.exit_code == ExitCode.DOES_NOT_FIT
        else:
            assert short.predicted.step_s < published.predicted.step_s, name


def test_where_there_is_room_nothing_is() -> None:
    plan = planned(64 << 20, schedule="auto")
    assert plan.schedule.name == SYNTHESIZED and num_let_go(plan) == (0, 0)


def test_recomputation_is_not_offered_where_it_is_forbidden() -> None:
    plan = planned(2 << 20, schedule="auto", recompute="none")
    assert num_let_go(plan) == (0, 0) and set(plan.memory_policy.recompute.values()) == {"none"}


def test_the_document_keeps_the_order_and_its_timeline(short: Plan) -> None:
    again = Plan.model_validate_json(short.to_json())
    assert pipeline_schedule(again) == pipeline_schedule(short)
    events = predicted_trace(short).events
    assert sum(event.kind == "R" for event in events) == num_let_go(short)[0]
    assert max(event.end_s for event in events) == pytest.approx(short.predicted.step_s, rel=0.02)


def test_copies_that_were_never_timed_take_no_time_in_the_timeline(short: Plan) -> None:
    edited = letting_go(planned(64 << 20, schedule="zb_h1"))
    kinds = [event.kind for event in predicted_trace(edited).events]
    assert kinds.count("O") == kinds.count("L") == num_let_go(edited)[1] > 0


def test_host_memory_holds_what_is_offloaded_from_its_forward_to_its_backward() -> None:
    stages = [StageTimes(1.0, 1.0, 1.0, activation_bytes=10, offload_bytes=8)]
    actions = [Action(text[0], 0, int(text[1])) for text in "F0 F1 O0 F2 O1 L0 I0 W0 L1 I1 W1 I2 W2".split()]
    assert peak_host_memory([actions], stages) == [2 * 8]


def test_the_program_computes_what_the_model_computes(short: Plan, tmp_path: Path) -> None:
    assert_same_numbers(compared(short, tmp_path))


@pytest.mark.parametrize(
    ("hardware", "force"),
    [("4xCPU", {}), ("4xH100-80GB", {"schedule": "1f1b"}), ("4xH100-80GB", {"pp": "1"})],
)
def test_offloading_that_nothing_could_do_is_refused(hardware: str, force: dict[str, str]) -> None:
    with pytest.raises(ShardwrightError) as caught:
        api.plan("preset:tiny-gpt2", hardware, global_batch=16, force={"offload": "auto", **force})
    assert caught.value.exit_code == ExitCode.CONTRADICTION


@pytest.mark.parametrize("text", ["junk", "99R0", "0R0", "0O0"])
def test_a_plan_whose_order_lets_go_what_it_cannot_is_refused(short: Plan, text: str, tmp_path: Path) -> None:
    edited = short.model_copy(deep=True)
    edited.schedule.order[0] = f"{text} {edited.schedule.order[0]}"
    edited.save(tmp_path / "edited.json")
    with pytest.raises(ShardwrightError, match="order of actions cannot be run"):
        num_let_go(edited)
    assert cli.main(["diff", str(tmp_path / "edited.json"), str(tmp_path / "edited.json")]) == ExitCode.PLAN_MISMATCH
    assert cli.main(["plan", str(tmp_path / "edited.json")]) == ExitCode.PLAN_MISMATCH


def test_offloading_is_planned_where_it_is_asked_for() -> None:
    """Long sequences: what a stage saves takes less time to copy than to compute."""
    with on_a_busy_machine():
        plan = api.plan(
            "preset:llama-3.2-1b",
            "4xH100-80GB",
            global_batch=16,
            seq_len=32768,
            overrides={"vocab_size": 8192, "num_layers": 8},
            force={
                "pp": "4",
                "tp": "1",
                "microbatch": "1",
                "schedule": "auto",
                "chunks": "2",
                "offload": "auto",
                "memory_margin": "0",
            },
            memory_limit_bytes=8 << 30,
        )
    assert num_let_go(plan)[1] > 0
    assert max(plan.predicted.peak_bytes) <= 8 << 30
    assert {"O", "L", "offload", "load"} <= {event.kind for event in predicted_trace(plan).events}


KEPT, AGAIN, AWAY = "FIW", "FRIW", "FOLIW"


def _held(rank: int, way: str) -> int:
    """Bytes of activations, gradients and state at the worst moment of a step under GPipe."""
    toy = make_toy()
    plan = make_plan(toy, pp=2, schedule="gpipe", microbatch=2, count=8)
    rows = []
    for actions in pipeline_schedule(plan).ranks:
        row = []
        for action in actions:
            if action.kind == "F":
                row += [str(action._replace(kind=kind)) for kind in ("F", "O") if kind in way]
            else:
                row += [str(action._replace(kind=kind)) for kind in ("R", "L") if kind in way]
                row += [str(action._replace(kind=kind)) for kind in "IW"]
        rows.append(" ".join(row))
    plan.schedule.name, plan.schedule.order, plan.schedule.stage_rank = SYNTHESIZED, rows, [0, 1]
    program = make_program(toy, plan)
    program.step(program.shard_batch(make_batch(16)))
    return program.memory.peak_bytes - program.memory.static_bytes()


def test_what_is_let_go_is_not_held() -> None:
    held = {way: run_ranks(2, _held, way) for way in (KEPT, AGAIN, AWAY)}
    for rank in range(2):
        assert held[AGAIN][rank] < 0.7 * held[KEPT][rank]
        assert held[AWAY][rank] < 0.7 * held[KEPT][rank]
