"""Post-validation: a rank that steps before it knows the norm ends where one that waits ends, bit for bit."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import pytest
import torch
from distributed import run_ranks
from matrix import cells
from runtime_toy import make_batch, make_plan, make_program, make_toy

from shardwright.errors import ShardwrightError
from shardwright.profiler.workload import OptimizerSpec, Precision
from shardwright.runtime.parameters import local_tensor

ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, 2, post_validation=True)
LAYOUTS = [
    (1, {}),
    (2, {"dp": 2, "zero": 3}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "chimera"}),
    (4, {"pp": 2, "dp": 2, "zero": 1}),
]


def _run(rank: int, layout: dict, spec: OptimizerSpec, spoiled: tuple[int, int], options: dict) -> dict[str, Any]:
    """Four steps; `spoiled`: rank and step that get NaN for gradients. Final values, norms, calls of the optimizer."""
    toy = make_toy(dtype=options.get("dtype", torch.float64))
    program = make_program(toy, make_plan(toy, **layout), optimizer=spec, **options.get("workload", {}))
    assert program.optimizer is not None
    calls = []
    program.optimizer.register_step_pre_hook(lambda *_: calls.append(program.step_index))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(program.optimizer, 0.7)
    norms = []
    for step in range(4):
        program.forward_backward(program.shard_batch(make_batch(16, seed=step)))
        if (rank, step) == spoiled:
            for grad in program.gradients(full=False).values():
                grad.mul_(math.nan)
        program.optimizer_step()
        scheduler.step()  # the step on trial keeps its own rate
        norms.append(float(program.grad_norm))
    program.settle()
    state = {key: local_tensor(value).clone() for key, value in program.state_dict().items()}
    return {"state": state, "norms": norms, "calls": calls}


def _compare(size: int, layout: dict, spec: OptimizerSpec, spoiled: tuple[int, int] = (-1, -1), **options: Any) -> list:
    """The runs with and without waiting are the same. What each rank did without."""
    waiting = dataclasses.replace(spec, post_validation=False)
    found = run_ranks(size, _run, layout, spec, spoiled, options)
    for here, there in zip(found, run_ranks(size, _run, layout, waiting, spoiled, options), strict=True):
        assert here["norms"] == pytest.approx(there["norms"], rel=0.0, nan_ok=True)
        assert here["state"].keys() == there["state"].keys()
        for key, value in there["state"].items():
            assert torch.equal(here["state"][key].nan_to_num(7.0), value.nan_to_num(7.0)), key
    return found


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_a_step_that_needs_no_clipping_is_done_once(size: int, layout: dict) -> None:
    for found in _compare(size, layout, dataclasses.replace(ADAM, max_grad_norm=1e3)):
        assert found["calls"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("size", "layout"), LAYOUTS, ids=str)
def test_a_step_that_needs_clipping_is_rolled_back_and_done_again(size: int, layout: dict) -> None:
    for found in _compare(size, layout, dataclasses.replace(ADAM, max_grad_norm=0.05)):
        assert found["calls"] == [0, 1, 1, 2, 3]  # at the first the norm was wrong once; from then on ranks wait


@pytest.mark.parametrize("options", [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.1}], ids=str)
def test_optimizers_with_and_without_state(options: dict) -> None:
    spec = dataclasses.replace(ADAM, name="SGD", factory=torch.optim.SGD, options=options, max_grad_norm=1e3)
    norms = _compare(2, {"pp": 2}, spec)[0]["norms"]
    greatest = norms.index(max(norms))
    found = _compare(2, {"pp": 2}, dataclasses.replace(spec, max_grad_norm=0.999 * max(norms)))
    assert found[0]["calls"] == sorted([*range(4), greatest + 1])  # that one is done again as the next begins


def test_an_update_that_writes_to_gradients_waits_for_the_norm() -> None:
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}
    spec = dataclasses.replace(ADAM, name="SGD", factory=torch.optim.SGD, options=options, max_grad_norm=0.05)
    for found in _compare(1, {}, spec):
        assert found["calls"] == [0, 1, 2, 3]


AT_STEPS = [(*layout, step) for layout in LAYOUTS for step in (0, 2)]


@pytest.mark.parametrize(("size", "layout", "step"), cells(AT_STEPS, AT_STEPS[::3] + AT_STEPS[-1:]), ids=str)
def test_a_nan_on_one_rank_leaves_the_step_out_on_all(size: int, layout: dict, step: int) -> None:
    spec = dataclasses.replace(ADAM, skip_nonfinite=True)
    one_way = layout.get("schedule") != "chimera"  # there rank 1 has copies of what rank 0 has
    for found in _compare(size, layout, spec, (size - 1 if one_way else 0, step)):
        assert math.isnan(found["norms"][step])
        assert all(bool(value.isfinite().all()) for value in found["state"].values())


def test_a_nan_that_nobody_asked_about_spreads_as_it_does_in_clipping() -> None:
    for found in _compare(2, {"pp": 2}, dataclasses.replace(ADAM, max_grad_norm=1.0), (0, 1)):
        assert any(bool(value.isnan().any()) for value in found["state"].values())


def test_master_copies_are_rolled_back_too() -> None:
    precision = Precision(torch.bfloat16, torch.float32, torch.float32)
    options = {"dtype": torch.bfloat16, "workload": {"precision": precision}}
    _compare(2, {"dp": 2, "zero": 2}, dataclasses.replace(ADAM, max_grad_norm=0.05), **options)


def _late(rank: int, spec: OptimizerSpec) -> tuple[float, float]:
    """Seconds of rank 0's optimizer step while rank 1 is late by one, and bytes that it keeps meanwhile over those of
    the parameters."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, pp=2), optimizer=spec)
    for _ in range(2):
        program.forward_backward(program.shard_batch(make_batch(16)))
        if rank:
            time.sleep(1.0)
        started = time.perf_counter()
        program.optimizer_step()
        seconds, kept = time.perf_counter() - started, program._stepper.kept_bytes()
    program.settle()
    assert not program._stepper.kept_bytes()
    return seconds, kept / program.store.param_bytes()


def test_no_rank_waits_for_the_others_before_it_steps() -> None:
    spec = dataclasses.replace(ADAM, max_grad_norm=1e3)
    seconds, kept = run_ranks(2, _late, spec)[0]
    assert seconds < 0.5
    assert kept == pytest.approx(spec.kept_tensors, rel=0.2)
    assert run_ranks(2, _late, dataclasses.replace(spec, post_validation=False))[0][0] > 0.5


def _scales_a_stage(rank: int, spec: OptimizerSpec) -> tuple[str, bool]:
    """What is refused, and whether the parameters are those of before the step."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, pp=2), optimizer=spec)
    data = program.shard_batch(make_batch(16))
    program.forward_backward(data)
    before = {name: p.detach().clone() for name, p in program.named_parameters()}
    for parameter in program.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5 + rank)
    program.optimizer_step()
    try:
        program.forward_backward(data)
    except ShardwrightError as error:
        return error.change, all(torch.equal(p, before[name]) for name, p in program.named_parameters())
    return "", False


def test_a_step_on_trial_by_unlike_factors_is_taken_back_and_refused() -> None:
    assert run_ranks(2, _scales_a_stage, dataclasses.replace(ADAM, max_grad_norm=1e3)) == [("max_grad_norm", True)] * 2
