"""A time limit holds in every phase, and every phase says what it is at."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from typing import Any

import pytest
import torch
from planner_fakes import LLAMA_8B, Case
from torch import nn

from shardwright import api
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.watch import TimeUp, stop_at, tell, telling
from shardwright.profiler.workload import Workload


def test_code_that_knows_of_no_limit_is_stopped():
    started = time.monotonic()
    with pytest.raises(TimeUp), stop_at(started + 0.1):
        for _ in itertools.count():
            try:
                sum(range(100))
            except Exception:  # it is none
                pytest.fail("taken for an error")
    assert time.monotonic() - started < 5
    sum(range(10**6))  # nothing strikes later


def test_what_ends_in_time_is_left_alone():
    with stop_at(time.monotonic() + 30), stop_at(float("inf")):
        pass
    with pytest.raises(TimeUp), stop_at(time.monotonic() - 1):
        pytest.fail("began after the end")


def test_a_limit_that_is_over_as_its_watch_begins_leaves_no_watch_behind():
    for microseconds in range(0, 400, 2):
        with contextlib.suppress(TimeUp), stop_at(time.monotonic() + microseconds * 1e-6):
            sum(range(50))
    assert not [thread for thread in threading.enumerate() if thread.name == "time limit"]


def test_messages_reach_the_innermost_listener_alone():
    heard: list[str] = []
    tell("nobody listens")
    with telling(lambda message: pytest.fail("outer")), telling(heard.append):
        tell("one")
    assert heard == ["one"]


class Slow(nn.Module):
    """Traces for ever: a recurrence that is unrolled."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.layer, self.steps = nn.Linear(4, 4), steps

    def forward(self, x):
        for _ in range(self.steps):
            x = torch.tanh(self.layer(x))
        return {"loss": x.sum()}


def workload(steps: int) -> Workload:
    return Workload(Slow(steps), {"x": torch.zeros(4, 4)}, global_batch=4, name="Slow")


def test_capture_keeps_to_the_limit_and_says_what_it_is_at():
    messages: list[str] = []
    started = time.monotonic()
    with pytest.raises(ShardwrightError, match="while Slow was captured") as caught:
        api.plan(workload(10**6), "2xCPU", time_limit_s=2.0, progress=messages.append)
    assert caught.value.exit_code == ExitCode.TIME_LIMIT and time.monotonic() - started < 30
    assert any("tracing its step" in message for message in messages)
    messages.clear()
    assert api.plan(workload(1), "2xCPU", time_limit_s=120, progress=messages.append).mesh.num_devices == 2
    phases = ("tracing its step", "the backward of segment", "fusing", "searching", "sharding dp", "comparing orders")
    assert all(any(phase in message for message in messages) for phase in phases)


@pytest.mark.parametrize("phase", ["run_self_test", "_running_graph"])
def test_the_limit_holds_for_the_self_test_and_another_capture(phase: str, monkeypatch: pytest.MonkeyPatch):
    def endless(*args, **kwargs):
        while True:
            sum(range(100))

    monkeypatch.setattr(api, phase, endless)
    with pytest.raises(ShardwrightError, match="while Slow was") as caught:
        api.plan(workload(1), "1xCPU", time_limit_s=4.0)
    assert caught.value.exit_code == ExitCode.TIME_LIMIT


def test_a_sharder_that_never_ends_is_stopped_with_the_incumbent():
    case = Case(LLAMA_8B, "2x8xH100-80GB", 256)
    solve, found = case.sharder.solve, []

    def slow(*key: Any):
        while any(message.startswith("best so far") for message in found):
            pass
        return solve(*key)

    case.sharder.solve = slow
    result = case.search(time_limit_s=6.0, progress=found.append)
    assert result.interrupted == "time limit" and result.seconds < 60
    assert result.certificate.lower_bound_s <= result.predicted.step_s
