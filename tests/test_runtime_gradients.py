"""Gradients that the backward writes where they are summed: whatever else is summed there, whenever it comes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import assert_same_numbers, compared, plan_once
from distributed import run_ranks
from matrix import cells
from runtime_toy import make_batch, make_plan, make_program, make_toy

from shardwright.plans.document import Schedule
from shardwright.profiler.workload import OptimizerSpec
from shardwright.runtime.specs import ParamUse
from shardwright.runtime.units import WholeUnit

SHAPE = (3, 2)


def make_unit(sum_group: Any, reduce_dtype: torch.dtype = torch.float64) -> WholeUnit:
    dtype = torch.float64
    return WholeUnit(
        {"w": SHAPE, "b": (4,)},
        sum_group=sum_group,
        dtype=dtype,
        master_dtype=dtype,
        reduce_dtype=reduce_dtype,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("sum_group", [None, "group"])
@pytest.mark.parametrize("order", ["wwg", "gww", "wgw", "ggw", "ww"])
def test_written_and_given_gradients_of_a_parameter_add_up(order: str, sum_group: Any) -> None:
    unit, total = make_unit(sum_group), torch.zeros(SHAPE, dtype=torch.float64)
    for kind in order:
        grad = torch.randn(SHAPE, dtype=torch.float64)
        total += grad
        given = grad.clone()
        if kind == "w":
            memory = unit.memory_for("w")
            assert memory is not None
            out, add = memory
            given = out.add_(grad) if add else out.copy_(grad)
        unit.add_grad("w", given)
    torch.testing.assert_close(unit.finish_reduce()["w"], total)


def test_memory_that_gradients_share_is_not_written_to() -> None:
    unit, shared = make_unit(None), torch.ones(SHAPE, dtype=torch.float64)
    unit.add_grad("w", shared)
    memory = unit.memory_for("w")
    assert memory is not None and memory[1]
    memory[0].add_(1.0)
    assert bool((shared == 1).all())


def test_a_gradient_that_is_summed_in_another_type_is_not_written_in_place() -> None:
    assert make_unit(None, torch.float32).memory_for("w") is None


def test_a_parameter_in_two_slots_gets_memory_for_one() -> None:
    """The backward may come to the later slot first, and would then add to what is not there yet."""
    toy = make_toy()
    store = make_program(toy, make_plan(toy)).store
    name = next(name for name, spec in store.specs.items() if spec.has_grad)
    use = ParamUse(name, (), True, (), ())
    first, second = store.gradient_memory([use, use], [0, 1])
    assert first is not None and second is None


EVERY = [
    ("tiny-gpt2", {"pp": 2, "dp": 2, "zero": 0, "schedule": "1f1b"}, "zb_h1"),
    ("tiny-gpt2", {"pp": 2, "zero": 0, "schedule": "1f1b"}, "zb_h1"),
    ("tiny-llama", {"pp": 4, "zero": 0, "schedule": "1f1b"}, "zb_h2"),
    ("tiny-t5", {"dp": 2, "tp": 2, "zero": 0, "recompute": "all"}, None),
    ("tiny-gpt2", {"tp": 2, "zero": 0, "recompute": "all"}, None),
    ("tiny-gpt2", {"dp": 2, "zero": 0}, None),
    ("tiny-gpt2", {"dp": 4, "zero": 0}, None),
]


@pytest.mark.parametrize(("model", "force", "schedule"), cells(EVERY, [EVERY[k] for k in (1, 4, 5)]))
def test_programs_that_write_gradients_in_place_compute_what_the_model_computes(
    model: str, force: dict[str, Any], schedule: str | None, tmp_path: Path
) -> None:
    """Split backwards, tied weights, recomputation and several microbatches."""
    chosen = {key: str(value) for key, value in {"global_microbatch": 4, "pp": 1, "dp": 1, "tp": 1, **force}.items()}
    ranks = math.prod(int(chosen[axis]) for axis in ("pp", "dp", "tp"))
    plan = plan_once({"model": f"preset:{model}", "global_batch": 16}, f"{ranks}xCPU", chosen)
    if schedule is not None:
        plan = plan.model_copy(update={"schedule": Schedule(name=schedule)})
    assert_same_numbers(compared(plan, tmp_path))


def _updated(rank: int, factory: Any, turned: bool) -> dict[str, torch.Tensor]:
    toy = make_toy()
    spec = OptimizerSpec(factory.__name__, factory, {"lr": 0.1}, 2)
    program = make_program(toy, make_plan(toy), optimizer=spec)
    for unit in program.store.units if turned else ():
        finish = unit.finish_reduce
        unit.finish_reduce = lambda finish=finish: {name: _turned(grad) for name, grad in finish().items()}
    program.step(program.shard_batch(make_batch(16)))
    return {name: parameter.detach().clone() for name, parameter in program.named_parameters()}


def _turned(grad: torch.Tensor) -> torch.Tensor:
    """The same numbers, columns first."""
    return grad.t().contiguous().t() if grad.dim() == 2 else grad


@pytest.mark.parametrize("factory", [torch.optim.SGD, torch.optim.AdamW])
def test_a_gradient_that_lies_otherwise_than_its_parameter_updates_it_alike(factory: Any) -> None:
    """Torch's fused updates on the CPU go through both memories in step."""
    expected, found = (run_ranks(1, _updated, factory, turned)[0] for turned in (False, True))
    assert any(value.dim() == 2 for value in expected.values())
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
