"""Shared by the tests: a hand-made plan, one thread a process, and what `make test` leaves to `make test-all`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from matrix import FULL

from shardwright.plans.document import (
    Certificate,
    Considered,
    Hashes,
    MemoryPolicy,
    Mesh,
    Microbatch,
    Plan,
    PlanningTime,
    Predicted,
    Schedule,
    Stage,
)

# plans for CPUs are made with the nominal figures, not with what someone measured on this machine, at some load
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "shardwright"
os.environ.setdefault("SHARDWRIGHT_CACHE", str(_CACHE))
if "PYTEST_XDIST_WORKER" in os.environ and os.environ["SHARDWRIGHT_CACHE"] == str(_CACHE):
    _CACHE /= os.environ["PYTEST_XDIST_WORKER"]  # what one process measures is not what another plans with
    os.environ["SHARDWRIGHT_CACHE"] = str(_CACHE)


@pytest.fixture
def hand_made_plan() -> Plan:
    """Two stages of two ranks each, every optional part of the document filled in."""
    return Plan(
        hashes=Hashes(model="m" * 16, shapes="s" * 16, hardware="h" * 16, version="0.1.0"),
        workload={"model": "preset:demo-llama", "global_batch": 16, "seq_len": 128},
        hardware={"name": "4xCPU", "sources": {"datasheet": 5, "fitted": 0, "measured": 2}, "notes": []},
        mesh=Mesh(pp=2, tp=2),
        microbatch=Microbatch(size=4, count=4),
        schedule=Schedule(name="1f1b"),
        stages=[Stage(segments=[0, 1, 2], ranks=[0, 1]), Stage(segments=[3, 4, 5], ranks=[2, 3])],
        segments=["embed", "block", "block", "block", "block", "head"],
        placement_axes=["tp"],
        placements={"embed": {"lookup": ["R"]}, "block": {"matmul": ["S(1)"]}, "head": {"matmul": ["S(1)"]}},
        zero=1,
        memory_policy=MemoryPolicy(recompute={"embed": "none", "block": "all", "head": "none"}),
        forced={"pp": "2"},
        predicted=Predicted(
            step_s=1.25,
            tokens_per_s_per_device=409.6,
            mfu=0.41,
            peak_bytes=[500 << 20, 560 << 20],
            bubble_fraction=0.2,
            exposed_comm_s=0.05,
            memory={"parameters": 200 << 20, "gradients": 100 << 20, "optimizer": 200 << 20, "activations": 60 << 20},
            memory_limit_bytes=600 << 20,
        ),
        certificate=Certificate(status="feasible", lower_bound_s=1.1, gap_fraction=0.12),
        planning_s=PlanningTime(capture=1.5, solve=2.0, total=3.75),
        considered=[
            Considered(mesh=Mesh(dp=4), microbatch=4, schedule="interleaved_1f1b x2", zero=3, recompute="none",
                       step_s=1.5, peak_bytes=400 << 20, reason="slower by 20.0 %"),
            Considered(mesh=Mesh(tp=4), microbatch=4, schedule="gpipe", zero=0, recompute="all", step_s=None,
                       peak_bytes=700 << 20, reason="needs 700 MiB of 600 MiB"),
        ],
        conservative_ops=[],
    )  # fmt: skip


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` and `check` work on ranks forked from the test process, not on processes that start from nothing."""
    from compared import forked_launch

    for module in ("launch", "checking"):
        monkeypatch.setattr(f"shardwright.{module}.launch", forked_launch)


@pytest.fixture(autouse=True)
def nothing_measured_stays() -> Iterator[None]:
    """A test that measures this machine, as drawn command lines may, leaves nothing that others then plan with."""
    yield
    for name in ("measurements.sqlite", "cpu.json"):
        (_CACHE / name).unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def captured_once_a_test() -> Iterator[None]:
    """What one test plans, builds and runs of one model is captured once for each shape."""
    from compared import captured_once

    with captured_once(by_name=False):
        yield


@pytest.fixture
def shared_captures() -> Iterator[None]:
    """Plans share what is captured, over all tests of this process that ask for it."""
    from compared import captured_once

    with captured_once():
        yield


_left: set[str] = set()  # tests that are left to `make test-all`


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Repetitions of a claim on more cells of a matrix run with SHARDWRIGHT_FULL_MATRIX=1 alone."""
    left = [] if FULL else [item for item in items if item.get_closest_marker("repetition")]
    _left.update(item.nodeid for item in left)
    items[:] = [item for item in items if item.nodeid not in _left]
    config.hook.pytest_deselected(items=left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist tells the process that prints."""
    _left.update(getattr(node, "workeroutput", {}).get("left", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = sorted(_left)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _left:
        terminalreporter.write_line(f"{len(_left)} repetitions on more cells of a matrix are left to `make test-all`")
