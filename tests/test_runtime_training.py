"""Whole training steps: optimizer, clipping, precision, frozen and unused parameters, evaluation."""

from __future__ import annotations

import copy

import pytest
import torch
from distributed import run_ranks
from matrix import cells
from runtime_toy import make_batch, make_plan, make_program, make_toy, reference

from shardwright.profiler.workload import OptimizerSpec, Precision

ADAM = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}, 2)
CLIPPED = OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2, max_grad_norm=0.05)


def _reference_run(steps: int, spec: OptimizerSpec, microbatch: int, size: int) -> tuple[list[float], dict]:
    """Losses and final parameters of plain training on one process."""
    toy = make_toy()
    model = toy.model
    optimizer = spec.factory([p for p in model.parameters() if p.requires_grad], **spec.options)
    losses = []
    for step in range(steps):
        total, grads, buffers = reference(toy, make_batch(size, seed=step), microbatch, step=step)
        for name, parameter in model.named_parameters():
            parameter.grad = grads.get(name)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if spec.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.max_grad_norm)
        optimizer.step()
        losses.append(float(total))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def _train(rank: int, layout: dict, spec: OptimizerSpec, steps: int, size: int) -> tuple[float, float]:
    """Largest relative error of a loss, largest absolute error of a parameter shard after the steps."""
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout), optimizer=spec)
    losses = [float(program.step(program.shard_batch(make_batch(size, seed=step)))) for step in range(steps)]
    expected_losses, expected = _reference_run(steps, spec, 4, size)
    loss_error = max(abs(a - b) / b for a, b in zip(losses, expected_losses, strict=True))
    param_error = 0.0
    for name, parameter in program.named_parameters():
        assert parameter.grad is None
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        part = expected[name][program.store.local_index(name)]
        if part.numel():
            param_error = max(param_error, float((local.detach() - part).abs().max()))
    return loss_error, param_error


LAYOUTS = [
    (1, {}),
    (2, {"dp": 2, "zero": 1}),
    (2, {"dp": 2, "zero": 3}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "schedule": "chimera"}),
    (4, {"pp": 2, "dp": 2, "zero": 2}),
    (4, {"pp": 2, "dp": 2, "schedule": "bitpipe", "chunks": 2, "zero": 1}),
    (4, {"dp": 2, "tp": 2, "zero": 3}),
    (4, {"pp": 2, "tp": 2, "zero": 0}),
]
EVERY = [(*layout, clips) for layout in LAYOUTS for clips in (False, True)]


@pytest.mark.parametrize(("size", "layout", "clips"), cells(EVERY, EVERY[::2] + EVERY[3::4]), ids=str)
def test_steps_equal_those_of_the_single_device_model(size: int, layout: dict, clips: bool) -> None:
    spec = CLIPPED if clips else ADAM
    for loss_error, param_error in run_ranks(size, _train, layout, spec, 3, 8):
        assert loss_error < 1e-9
        assert param_error < 1e-9


def test_one_process_steps_over_plain_tensors_and_leaves_the_users_model_alone() -> None:
    toy = make_toy()
    before = copy.deepcopy(toy.model.state_dict())
    program = make_program(toy, make_plan(toy))
    program.step(make_batch(16))
    assert all(type(p) is torch.nn.Parameter for p in program.parameters())
    assert all(torch.equal(before[name], value) for name, value in toy.model.state_dict().items())


def test_adopted_model_is_trained_in_place() -> None:
    toy = make_toy()
    before = toy.model.emb.weight.detach().clone()
    program = make_program(toy, make_plan(toy), adopt=True)
    program.step(make_batch(16))
    assert dict(program.named_parameters())["emb.weight"].data_ptr() == toy.model.emb.weight.data_ptr()
    assert not torch.equal(before, toy.model.emb.weight)


def test_frozen_and_unused_parameters_stay_as_they_are() -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy), optimizer=ADAM)
    before = {name: p.detach().clone() for name, p in program.named_parameters()}
    program.forward_backward(make_batch(16))
    assert "unused" not in program.gradients() and "blocks.0.shift" not in program.gradients()
    program.optimizer_step()
    after = dict(program.named_parameters())
    assert torch.equal(before["unused"], after["unused"]) and torch.equal(
        before["blocks.0.shift"], after["blocks.0.shift"]
    )
    assert not torch.equal(before["blocks.0.up"], after["blocks.0.up"])


def test_users_own_optimizer_over_the_programs_parameters() -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy))
    program.optimizer = torch.optim.Adam(list(program.parameters()), lr=1e-2)
    first = float(program.step(make_batch(16)))
    for _ in range(5):
        last = float(program.step(make_batch(16)))
    assert last < first


def _bf16_run(rank: int, layout: dict) -> dict[str, torch.Tensor]:
    toy = make_toy(dtype=torch.bfloat16)
    precision = Precision(torch.bfloat16, torch.float32, torch.float32)
    program = make_program(toy, make_plan(toy, **layout), precision=precision)
    program.forward_backward(program.shard_batch(make_batch(16)))
    grads = program.gradients()
    assert {p.dtype for p in program.parameters() if p.requires_grad} == {torch.float32}
    assert {g.dtype for g in grads.values()} == {torch.float32}
    program.optimizer_step()
    params = program.store.acquire(
        2,
        program.microbatches.variants(program.microbatches.split(make_batch(4))[0], program._runners)[0].steps[2].uses,
    )
    assert {p.dtype for p in params} == {torch.bfloat16}
    program.store.release(2)
    return grads


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "zero": 0}, {"dp": 2, "zero": 1}, {"dp": 2, "zero": 3}], ids=str)
def test_bf16_segments_keep_fp32_masters_and_reduce_in_fp32(layout: dict) -> None:
    toy = make_toy(dtype=torch.bfloat16)
    _, expected, _ = reference(toy, make_batch(16), 4)
    for grads in run_ranks(layout.get("dp", 1), _bf16_run, layout):
        assert set(grads) == set(expected)
        for name, grad in grads.items():
            assert float((grad - expected[name]).abs().max()) < 0.1 * max(float(expected[name].abs().max()), 1e-2), name


def _evaluate(rank: int, layout: dict) -> tuple[float, list[tuple[int, ...]], bool]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, **layout))
    batch = program.shard_batch(make_batch(16))
    mean_before = dict(program.named_buffers()).get("mean")
    loss = float(program.evaluate(batch))
    logits = [tuple(entry["head.0/logits"].shape) for entry in program.outputs(batch)]
    same = mean_before is None or torch.equal(mean_before, dict(program.named_buffers())["mean"])
    assert abs(loss - float(program.step(batch))) < 1e-12
    return loss, logits, same


def test_evaluation_gives_loss_and_outputs_and_writes_nothing() -> None:
    toy = make_toy()
    program = make_program(toy, make_plan(toy))
    expected = float(program.evaluate(make_batch(16)))
    results = run_ranks(4, _evaluate, {"pp": 2, "dp": 2})
    for loss, _, same in results:
        assert abs(loss - expected) < 1e-9 and same
    assert [logits for _, logits, _ in results] == [[], [], [(2, 3, 7)] * 4, [(2, 3, 7)] * 4]


def _trace(rank: int) -> list[tuple[str, int, int]]:
    toy = make_toy()
    program = make_program(toy, make_plan(toy, pp=2))
    program.step(program.shard_batch(make_batch(16)))
    events = program.trace.of_rank(rank)
    assert all(event.end_s >= event.start_s >= 0 for event in events)
    assert program.memory.peak_bytes > program.store.param_bytes()
    return [(event.kind, event.stage, event.microbatch) for event in events if event.stage >= 0]


def test_trace_holds_the_actions_of_the_schedule_in_order() -> None:
    first, second = run_ranks(2, _trace)
    assert first == [
        ("F", 0, 0),
        ("F", 0, 1),
        ("B", 0, 0),
        ("F", 0, 2),
        ("B", 0, 1),
        ("F", 0, 3),
        ("B", 0, 2),
        ("B", 0, 3),
    ]
    assert second[:4] == [("F", 1, 0), ("B", 1, 0), ("F", 1, 1), ("B", 1, 1)]
