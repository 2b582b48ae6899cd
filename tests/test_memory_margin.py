"""What a plan leaves free of the memory limit: as much as memory is known to be predicted too low."""

from __future__ import annotations

import dataclasses
import json

import pytest

import shardwright
from shardwright.cli import main
from shardwright.costmodel.memory import memory_error, memory_sure
from shardwright.costmodel.stacks import own_stack, stack_named, stacks
from shardwright.errors import ShardwrightError
from shardwright.planner.space.forcing import parse_forced
from shardwright.plans.document import Plan
from shardwright.profiler.hardware import parse_hardware

MODEL, GPUS = "preset:mlp", "2xA100-80GB"


def planned(hardware: str = GPUS, **options: object) -> Plan:
    return shardwright.plan(MODEL, hardware, global_batch=64, self_test=False, **options)  # type: ignore[arg-type]


def needed_bytes() -> int:
    return max(planned(force=FORCED).predicted.peak_bytes)


FORCED = {"dp": "2", "zero": "0", "microbatch": "32", "recompute": "none", "optimizer_state": "device"}


def test_a_plan_states_its_memory_error_and_stays_below_the_limit_by_it():
    predicted = planned().predicted
    assert predicted.memory_limit_bytes == parse_hardware(GPUS).worst_device().memory_bytes
    assert predicted.memory_error > 0 and 0.5 < predicted.memory_sure < 1
    usable = predicted.memory_limit_bytes - predicted.memory_margin_bytes
    assert usable * (1 + predicted.memory_error) == pytest.approx(predicted.memory_limit_bytes, rel=1e-6)
    assert max(predicted.peak_bytes) <= usable


def test_what_is_kept_free_may_be_said_by_name():
    """Of a limit of the user's nothing is, unless it is asked for."""
    needed = needed_bytes()
    limit = round(1.2 * needed)
    plan = planned(force=FORCED, memory_limit_bytes=limit)
    assert plan.predicted.memory_margin_bytes == 0 < plan.predicted.memory_error
    assert max(plan.predicted.peak_bytes) == needed <= plan.predicted.memory_limit_bytes == limit
    kept = planned(force=FORCED | {"memory_margin": "10%"}, memory_limit_bytes=limit).predicted
    assert kept.memory_margin_bytes == pytest.approx(0.1 * limit, abs=2)
    with pytest.raises(ShardwrightError) as caught:
        planned(force=FORCED | {"memory_margin": "0.3"}, memory_limit_bytes=limit)
    assert "kept free" in caught.value.means and caught.value.works == "--force memory_margin=0"
    assert planned(force={"memory_margin": "0"}).predicted.memory_margin_bytes == 0


def test_tensors_of_cpus_are_counted_as_they_are():
    assert memory_error("cpu", stack_named("megatron_2021")) == 0
    predicted = planned("2xCPU", memory_limit_bytes=1 << 30).predicted
    assert predicted.memory_margin_bytes == 0 and predicted.memory_limit_bytes == 1 << 30


def test_a_stack_with_memory_figures_of_its_own_goes_before_all_runs():
    known = [stack for stack in stacks().values() if stack.memory_error is not None]
    assert known
    for stack in known:
        assert memory_error("gpu", stack) == stack.memory_error
    neutral = dataclasses.replace(known[0], memory_error=None)
    assert memory_error("gpu", neutral) == memory_error("gpu", own_stack()) > 0 and memory_sure("gpu") == 0.8


def test_a_margin_is_a_share_or_a_percentage():
    for text in ("0.1", "10", "10%"):
        assert parse_forced({"memory_margin": text}).memory_margin == pytest.approx(0.1)
    assert parse_forced({"memory_margin": "0"}).memory_margin == 0
    for text in ("-0.1", "100", "100%", "much", "nan"):
        with pytest.raises(ShardwrightError, match="memory_margin takes a share"):
            parse_forced({"memory_margin": text})


def test_fits_says_what_is_kept_free_and_how_sure_that_is(capsys):
    arguments = ["fits", MODEL, "--hardware", "1xA100-80GB", "--global-batch", "8", "--only-answer"]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "kept free" in shown and "8 of 10 runs" in shown
    assert main([*arguments, "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["kept_free_bytes"] > 0 and verdict["memory_sure"] == 0.8
    assert verdict["margin_bytes"] == verdict["limit_bytes"] - verdict["peak_bytes"]
