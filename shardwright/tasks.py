"""What the workers of shardwright/launch.py do: train for `run`, compare for `check`, measure for `profile`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from . import api, reference, trust
from .costmodel.trace import Trace, merge
from .data import batch_source
from .plans.document import Plan
from .profiler.batches import make_batch
from .profiler.initial_values import materialize
from .profiler.models import make_reference_dtype, reload_workload
from .profiler.workload import OptimizerSpec, Workload
from .profiling import measured
from .rounding import dense, largest, roundings
from .runtime.program import Program

TOLERANCE = 1e-9  # relative, as promised for float64
# Of the largest gradient: TOLERANCE of it is 64 roundings of float64
CANCELLED = 64 * torch.finfo(torch.float64).eps / TOLERANCE

Report = Callable[..., None]


def whole_trace(program: Program) -> Trace:
    """Of the last step, on all ranks. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, program.trace.to_json())
    return merge(Trace.from_json(part) for part in everyone)


def run(task: Mapping[str, Any], device: torch.device, report: Report) -> None:
    """Train for some steps. Reports {"event": "step", step, loss, step_s, peak_bytes (of each rank)} for each."""
    plan = Plan.load(task["plan"])
    workload = trust.workload_of(plan, bool(task.get("trust_model")))
    started = time.perf_counter()
    program = api.build(plan, workload, device=device)
    batches = batch_source(workload, task.get("text"))
    report(event="built", seconds=time.perf_counter() - started)
    for step in range(task["steps"]):
        if task.get("memory") and step == task["steps"] - 1:
            program.record_memory()
        part = program.shard_batch(workload.call.batch_of(batches(step)))
        _synchronize(device)
        started = time.perf_counter()
        loss = program.step(part)
        _synchronize(device)
        step_s = time.perf_counter() - started
        if task.get("trace") and step == task["steps"] - 1:
            report(event="trace", trace=whole_trace(program).to_json())
        peaks = gather_numbers(peak_bytes(program), device)
        report(
            event="step",
            step=step,
            loss=loss.item(),
            step_s=step_s,
            peak_bytes=[int(peak) for peak in peaks],
        )


def check(task: Mapping[str, Any], device: torch.device, report: Report) -> None:
    """Two steps in float64, with an optimizer step between them. Rank 0 runs the model as written and compares.

    Reports {"event": "compared", losses, reference_losses, gradients: {name: relative error}}: the worse of both steps.
    """
    plan = Plan.load(task["plan"])
    workload = check_workload(plan.workload)
    program = api.build(plan, workload, device=device)
    model = materialize(workload) if dist.get_rank() == 0 else None
    optimizer = (
        workload.optimizer.factory(trainable(model), **workload.optimizer.options) if model is not None else None
    )
    losses: list[float] = []
    expected: list[float] = []
    errors: dict[str, float] = {}
    for step in range(2):
        batch = make_batch(workload, workload.global_batch, seed=workload.seed + 1 + step)
        part = program.shard_batch(workload.call.batch_of(batch))
        losses.append(program.forward_backward(part).item())
        found = whole_gradients(program)
        program.optimizer_step()
        if model is None or optimizer is None:
            continue
        given = dataclasses.replace(model, example_batch=batch)
        run = functools.partial(_reference, plan=plan, step=step)
        expected.append(run(given))
        for name, error in beyond_rounding(compare(found, model, plan), found, given, run).items():
            errors[name] = max(error, errors.get(name, 0.0))
        optimizer.step()
    report(event="compared", losses=losses, reference_losses=expected, gradients=errors)


def _reference(model: Workload, plan: Plan, step: int) -> float:
    """Over the workload's example batch."""
    batch, size, over = model.example_batch, plan.microbatch.size, plan.loss_over
    return reference.forward_backward(model, batch, microbatch_size=size, step=step, loss_over=over).item()


def check_workload(spec: Mapping[str, Any]) -> Workload:
    """In float64 throughout. SGD, because Adam divides by gradients that may be zero but for rounding."""
    workload = make_reference_dtype(reload_workload({**spec, "optimizer": "sgd"}))
    sgd = OptimizerSpec("SGD", torch.optim.SGD, {"lr": 0.05}, 0)
    return dataclasses.replace(workload, optimizer=sgd)


def trainable(workload: Workload) -> list[torch.nn.Parameter]:
    return [parameter for parameter in workload.model.parameters() if parameter.requires_grad]


def compare(found: Mapping[str, torch.Tensor], workload: Workload, plan: Plan) -> dict[str, float]:
    """Largest difference of each gradient, relative to its largest entry.

    A gradient below a millionth of the model's largest is taken for a sum that cancels, as of a bias before a
    normalization: it has no digits of its own to agree on, and is compared at CANCELLED of the largest. A gradient that
    one side lacks counts as infinitely wrong.
    """
    given = {name: p.grad for name, p in workload.model.named_parameters() if p.grad is not None}
    expected = {name: dense(g) for name, g in given.items()}
    most = max(map(largest, expected.values()), default=0.0)
    errors = {}
    for name in {*found, *expected}:
        if name not in found or name not in expected:
            present = found.get(name, expected.get(name))
            errors[name] = float("inf") if present is not None and largest(present) > 0 else 0.0
            continue
        scale = max(largest(expected[name]), 1e-300)
        if scale < 1e-6 * most:
            scale = CANCELLED * most
        errors[name] = largest(found[name] - expected[name]) / scale
    return errors


def beyond_rounding(
    errors: Mapping[str, float],
    found: Mapping[str, torch.Tensor],
    workload: Workload,
    run: Callable[[Workload], object],
) -> dict[str, float]:
    """The errors, those of gradients that are rounding alone measured by how far rounding moves them. run: computes
    the gradients of a copy of the workload, in the dtype of its example batch."""
    wrong = [name for name, error in errors.items() if TOLERANCE < error < float("inf")]
    if not wrong:
        return dict(errors)
    given = {name: dense(p.grad) for name, p in workload.model.named_parameters() if p.grad is not None}
    may_differ = roundings(workload, run)
    by = {name: largest(found[name] - given[name]) for name in wrong if name in may_differ}
    return {**errors, **{n: TOLERANCE * d / may_differ[n] for n, d in by.items() if d <= may_differ[n]}}


def whole_gradients(program: Program) -> dict[str, torch.Tensor]:
    """Every gradient, whole, on rank 0; on the others only collectives happen."""
    own: dict[str, torch.Tensor] = {}
    for name, parameter in program.named_parameters():
        grad = parameter.grad
        if grad is not None:
            # a view would be sent with all of the buffer that it looks into
            own[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).cpu().clone()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return {name: grad for grads in reversed(everyone) for name, grad in grads.items()}


def peak_bytes(program: Program) -> int:
    return int(program.memory.peak_bytes)


def gather_numbers(value: float, device: torch.device) -> list[float]:
    """One number of each rank, by rank."""
    own = torch.tensor([value], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return [one.item() for one in everyone]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile(task: Mapping[str, Any], device: torch.device, report: Report) -> None:
    """Measure ops and links. Reports what is being measured, then {"event": "profiled", document}."""
    document = measured(device, task["options"], lambda event: report(event="measuring", **event))
    report(event="profiled", document=document)


TASKS: dict[str, Callable[[Mapping[str, Any], torch.device, Report], None]] = {
    "run": run,
    "check": check,
    "profile": profile,
}
