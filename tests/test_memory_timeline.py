"""What each rank holds over a step: the ledger's peak is the plan's, and pages, numbers and traces show it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import shardwright
from shardwright.cli import main
from shardwright.costmodel.ledger import ledgers
from shardwright.costmodel.memory import RankMoments
from shardwright.costmodel.stage_times import StageTimes, Tail
from shardwright.costmodel.trace import MemorySample, Trace, merge, to_chrome
from shardwright.memory_timeline import thinned, write_memory_timeline
from shardwright.planner.report.timeline import memory_ledgers, predicted_trace
from shardwright.plans.document import Plan
from shardwright.schedules.published.library import SCHEDULES, build_schedule

MOMENTS = RankMoments(
    lasting={"parameters": 100, "optimizer": 400, "buffers": 7, "communication": 11},
    pipeline={"gathered_parameters": 30, "gradients": 200, "gradient_buffers": 50, "workspace": 60},
    step={"gradients": 200, "workspace": 100},
    slack_fraction=0.07,
    reserve_bytes=1000,
)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_under_every_order_the_peak_is_that_of_the_plan(name: str) -> None:
    schedule = build_schedule(name, 4, 8, min(SCHEDULES[name].chunks))
    num_stages = 1 + max(action.stage for row in schedule.ranks for action in row)
    stages = [StageTimes(1.0, 1.0, 1.0, activation_bytes=1000 + 17 * stage) for stage in range(num_stages)]
    timeline = schedule.simulate(stages, tails=[Tail(0.5)] * 4, with_events=True, with_memory=True)
    for found, most in zip(ledgers(timeline, stages, [MOMENTS] * 4), timeline.peak_bytes, strict=True):
        assert found.peak_bytes == sum(MOMENTS.worst(most).values())
        assert found.worst.items == MOMENTS.worst(most)
        assert found.samples[-1].items["activations"] == 0, "all is let go in the end"
        times = [sample.at_s for sample in found.samples]
        steps = {event.rank: event.end_s for event in timeline.extra if event.kind == "optimizer"}
        assert times == sorted(times) and times[-1] == steps[found.rank]


def test_an_optimizer_step_that_holds_more_than_the_pipeline_is_the_peak() -> None:
    schedule = build_schedule("1f1b", 2, 2, 1)
    stages = [StageTimes(1.0, 1.0, 1.0, activation_bytes=10)] * 2
    moments = RankMoments({"parameters": 1}, {"gradients": 5, "workspace": 5}, {"gradients": 500}, 0.0, 0)
    timeline = schedule.simulate(stages, tails=[Tail(0.5)] * 2, with_events=True)
    for found in ledgers(timeline, stages, [moments] * 2):
        assert found.peak_bytes == 501 and found.worst.at_s == timeline.compute_end_s[found.rank]


def test_activations_are_listed_by_stage_and_microbatch() -> None:
    schedule = build_schedule("1f1b", 2, 3, 1)
    stages = [StageTimes(1.0, 1.0, 1.0, activation_bytes=10), StageTimes(1.0, 1.0, 1.0, activation_bytes=20)]
    timeline = schedule.simulate(stages, with_events=True)
    first, second = ledgers(timeline, stages, [MOMENTS] * 2)
    assert sorted((held.stage, held.microbatch) for held in first.activations) == [(0, 0), (0, 1), (0, 2)]
    assert {held.num_bytes for held in second.activations} == {20}
    for found in (first, second):
        for sample in found.samples[:-1]:
            alive = sum(h.num_bytes for h in found.activations if h.start_s <= sample.at_s < h.end_s)
            assert sample.items["activations"] == alive


@pytest.fixture(scope="module")
def plan() -> Plan:
    return shardwright.plan(
        "preset:mlp", "2xCPU", global_batch=16, force={"pp": 2, "schedule": "1f1b", "microbatch": 4}, self_test=False
    )


def test_a_plans_document_alone_gives_its_ledger(plan: Plan) -> None:
    again = Plan.model_validate_json(plan.to_json())
    peaks = [found.peak_bytes for found in memory_ledgers(again)]
    assert peaks == plan.predicted.peak_bytes
    worst = max(memory_ledgers(again), key=lambda found: found.peak_bytes).worst
    assert dict(worst.items) == plan.predicted.memory


def test_a_trace_has_a_track_of_bytes_for_each_rank(plan: Plan) -> None:
    trace = predicted_trace(plan)
    assert {sample.rank for sample in trace.memory} == {0, 1}
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))) == trace
    assert len(merge([trace, trace]).memory) == 2 * len(trace.memory)
    counters = [row for row in to_chrome([trace])["traceEvents"] if row["ph"] == "C"]
    assert len(counters) == len(trace.memory)
    most = max(sum(row["args"].values()) for row in counters)
    assert most * 2**20 == pytest.approx(max(plan.predicted.peak_bytes))


class _Page(HTMLParser):
    """Tags that are open, and what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.charts = 0
        self.outside: list[Any] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.charts += tag == "svg"
        self.outside += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_stands_alone_and_has_a_chart_for_each_rank(plan: Plan, tmp_path: Path) -> None:
    measured = Trace("measured", (), memory=(MemorySample(0, 0.0, {"parameters": 5}), MemorySample(0, 1.0, {})))
    write_memory_timeline(tmp_path / "m.html", plan, measured)
    page = _Page()
    page.feed((tmp_path / "m.html").read_text())
    assert page.charts == 3 and not page.open and not page.outside
    assert "http" not in (tmp_path / "m.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m.html"], "nothing is left of the writing"


def test_a_long_timeline_is_thinned_to_its_worst_moments() -> None:
    samples = [MemorySample(0, i * 0.01, {"activations": i * 7919 % 1000}) for i in range(5000)]
    shown = thinned(samples, 100)
    assert len(shown) <= 100 and shown[0] == samples[0] and shown[-1] == samples[-1]
    assert max(s.total_bytes for s in shown) == max(s.total_bytes for s in samples)
    assert thinned(samples[:50], 100) == samples[:50]


def test_plan_writes_what_its_ending_says(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan.save(tmp_path / "plan.json")
    named = str(tmp_path / "plan.json")
    assert main(["plan", named, "--memory-timeline", str(tmp_path / "m.json")]) == 0
    assert "memory timeline written" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "m.json").read_text())
    for row, peak in zip(numbers["predicted"], plan.predicted.peak_bytes, strict=True):
        sums = [sum(sizes) for sizes in zip(*row["bytes"].values(), strict=True)]
        assert max(sums) == row["peak_bytes"] == peak and len(row["at_s"]) == len(sums)
    assert main(["plan", named, "--memory-timeline", str(tmp_path / "m.txt")]) == 2
    assert "would work: --memory-timeline memory.html" in capsys.readouterr().err
    old = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"rank_memory": []})})
    old.save(tmp_path / "old.json")
    assert main(["plan", str(tmp_path / "old.json"), "--memory-timeline", str(tmp_path / "o.html")]) == 7
    assert not (tmp_path / "o.html").exists()


@pytest.mark.usefixtures("forked")
def test_a_run_writes_what_it_held_beside_the_prediction(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    command = ["run", str(tmp_path / "plan.json"), "--steps", "1", "--memory-timeline", str(tmp_path / "m.json")]
    assert main(command) == 0
    measured = json.loads((tmp_path / "m.json").read_text())["measured"]
    assert [row["rank"] for row in measured] == [0, 1]
    for row in measured:
        assert max(row["bytes"]["activations"]) > 0 and row["bytes"]["parameters"][0] > 0
        assert row["at_s"] == sorted(row["at_s"])
