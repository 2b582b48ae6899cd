"""Parameters, gradients and optimizer state cut over parts of the data-parallel axis, each over its own: same numbers,
less on each rank, and the frequent collectives inside the part."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from matrix import cells
from runtime_toy import make_batch, make_plan, make_program, make_toy, reference

from shardwright.errors import ShardwrightError
from shardwright.profiler.workload import OptimizerSpec, Precision
from shardwright.runtime import sharded
from shardwright.runtime.extents import DataCut
from shardwright.runtime.parameters import local_tensor

ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2, max_grad_norm=0.05)
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"dp": 4, "zero": 1, "extents": {"optimizer": 2}}),
    (4, {"dp": 4, "zero": 2, "extents": {"gradients": 2, "optimizer": 2}}),
    (4, {"dp": 4, "zero": 2, "extents": {"gradients": 2}}),
    (4, {"dp": 4, "zero": 3, "extents": {"parameters": 2, "gradients": 2, "optimizer": 2}}),
    (4, {"dp": 4, "zero": 3, "extents": {"parameters": 2, "gradients": 2}}),
    (4, {"dp": 4, "zero": 3, "extents": {"parameters": 2}}),
    (4, {"dp": 4, "zero": 3, "extents": {"parameters": 1, "gradients": 2}}),
    (8, {"dp": 8, "zero": 3, "extents": {"parameters": 2, "gradients": 4}}),
    (8, {"dp": 4, "tp": 2, "zero": 3, "extents": {"parameters": 2, "gradients": 2, "optimizer": 2}}),
    (8, {"pp": 2, "dp": 4, "zero": 2, "extents": {"gradients": 2}}),
]


def _train(rank: int, layout: dict[str, Any], steps: int) -> dict[str, float]:
    """Errors of loss, gradients and parameters against the model itself, on this rank."""
    toy = make_toy()
    plan = make_plan(toy, **layout)
    program = make_program(toy, plan, optimizer=ADAM)
    optimizer = ADAM.factory([p for p in toy.model.parameters() if p.requires_grad], **ADAM.options)
    errors: dict[str, float] = {}
    for step in range(steps):
        batch = make_batch(16, seed=step)
        loss = program.forward_backward(program.shard_batch(batch))
        expected_loss, expected, buffers = reference(toy, batch, plan.microbatch.size, step=step)
        grads = program.gradients()
        assert set(grads) == set(expected)
        errors[f"loss {step}"] = abs(float(loss - expected_loss))
        for name, grad in expected.items():
            errors[f"grad {step} {name}"] = float((grads[name] - grad).abs().max())
        program.optimizer_step()
        for name, parameter in toy.model.named_parameters():
            parameter.grad = expected.get(name)
        for name, buffer in toy.model.named_buffers():
            buffer.copy_(buffers[name])
        torch.nn.utils.clip_grad_norm_(toy.model.parameters(), 0.05)
        optimizer.step()
    whole = dict(toy.model.named_parameters())
    for name, parameter in program.named_parameters():
        difference = local_tensor(parameter.detach()) - whole[name].detach()[program.store.local_index(name)]
        errors[f"param {name}"] = float(difference.abs().max()) if difference.numel() else 0.0
    return errors


@pytest.mark.parametrize(("size", "layout"), cells(LAYOUTS, LAYOUTS[::2]), ids=str)
def test_numbers_are_those_of_the_model(size: int, layout: dict[str, Any]) -> None:
    for errors in run_ranks(size, _train, layout, 3):
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-9, (worst, errors[worst])


def _mixed(rank: int) -> dict[str, torch.Tensor]:
    toy = make_toy(dtype=torch.bfloat16)
    precision = Precision(torch.bfloat16, torch.float32, torch.float32)
    layout = {"dp": 4, "zero": 3, "extents": {"parameters": 2, "gradients": 2}}
    program = make_program(toy, make_plan(toy, **layout), precision=precision)
    program.step(program.shard_batch(make_batch(16)))
    program.forward_backward(program.shard_batch(make_batch(16)))
    return program.gradients()


def test_masters_of_another_width_refresh_the_parameters() -> None:
    toy = make_toy(dtype=torch.bfloat16)
    program = make_program(toy, make_plan(toy), precision=Precision(torch.bfloat16, torch.float32, torch.float32))
    program.step(make_batch(16))
    program.forward_backward(make_batch(16))
    expected = program.gradients()
    for grads in run_ranks(4, _mixed):
        for name, grad in grads.items():
            assert float((grad - expected[name]).abs().max()) < 0.1 * max(float(expected[name].abs().max()), 1e-2), name


def _traffic(rank: int, extents: dict[str, int]) -> tuple[dict[str, set[int]], int, int]:
    """Sizes of the groups of each kind of collective in a step; elements of a large parameter kept and stepped over."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, dp=4, zero=3, extents=extents))
    seen: dict[str, set[int]] = {"gather": set(), "scatter": set(), "sum": set()}

    def spied(kind: str, call: Any) -> Any:
        def spy(*args: Any, **options: Any) -> Any:
            seen[kind].add(dist.get_world_size(options["group"] if "group" in options else args[-1]))
            return call(*args, **options)

        return spy

    gather, scatter, total = sharded.start_all_gather, sharded.start_reduce_scatter, dist.all_reduce
    with (
        mock.patch.object(sharded, "start_all_gather", spied("gather", gather)),
        mock.patch.object(sharded, "start_reduce_scatter", spied("scatter", scatter)),
        mock.patch.object(dist, "all_reduce", spied("sum", total)),
    ):
        program.forward_backward(program.shard_batch(make_batch(16)))
    unit = next(unit for unit in program.store.units if "blocks.0.up" in unit.names)
    assert isinstance(unit, sharded.ShardedUnit) and unit._block is not None
    return seen, unit._block.numel(), sum(master.numel() for master in unit.masters.values())


def test_gathers_and_scatters_stay_inside_the_part() -> None:
    for seen, kept, stepped in run_ranks(4, _traffic, {"parameters": 2, "gradients": 2, "optimizer": 2}):
        assert seen["gather"] == {2} and seen["scatter"] == {2} and 2 in seen["sum"]
        assert stepped <= kept
    for seen, kept, stepped in run_ranks(4, _traffic, {"parameters": 2, "gradients": 2, "optimizer": 4}):
        assert seen["gather"] == {2} and seen["scatter"] == {2}
        assert stepped < 0.7 * kept


def _save(rank: int, layout: dict[str, Any], path: str) -> list[float]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout), optimizer=ADAM)
    for step in range(2):
        program.step(program.shard_batch(make_batch(8, seed=step)))
    program.save(path)
    return [float(program.step(program.shard_batch(make_batch(8, seed=s)))) for s in (2, 3)]


def _load(rank: int, layout: dict[str, Any], path: str) -> list[float]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout), optimizer=ADAM)
    program.load(path)
    return [float(program.step(program.shard_batch(make_batch(8, seed=s)))) for s in (2, 3)]


def test_checkpoints_travel_to_and_from_other_layouts(tmp_path: Path) -> None:
    layout = {"dp": 4, "zero": 3, "extents": {"parameters": 2, "gradients": 2}}
    for first, second in ((layout, {"dp": 2, "zero": 1}), ({"tp": 2}, layout)):
        sizes = [row.get("dp", 1) * row.get("tp", 1) for row in (first, second)]
        path = str(tmp_path / f"checkpoint-{sizes[0]}")
        expected = run_ranks(sizes[0], _save, first, path)[0]
        for losses in run_ranks(sizes[1], _load, second, path):
            assert losses == pytest.approx(expected, rel=1e-9)


def test_extents_of_a_level() -> None:
    assert DataCut.of(1, {}, 8).extents == (1, 1, 8)
    assert DataCut.of(3, {"parameters": 2}, 8).extents == (2, 8, 8)
    assert DataCut.of(3, {"parameters": 2, "gradients": 4}, 8).levels == ((2, 1), (2, 2), (2, 4))
    assert DataCut.of(2, {"gradients": 2, "optimizer": 4}, 8).copies == (2, 4)


@pytest.mark.parametrize(
    ("zero", "given", "says"),
    [
        (1, {"parameters": 2}, "does not cut parameters"),
        (3, {"parameters": 4, "gradients": 2, "optimizer": 4}, "divide"),
        (1, {"optimizer": 3}, "divide"),
        (1, {"optimizer": 0}, "divide"),
    ],
)
def test_extents_that_do_not_nest_are_refused(zero: int, given: dict[str, int], says: str) -> None:
    with pytest.raises(ShardwrightError, match=says):
        DataCut.of(zero, given, 4)
