"""What `make demo` runs: plan a small Llama for four CPU processes, train it on real text, compare with one process.

    python examples/demo.py [--steps 30] [--memory-limit 48MiB]

1. Measure this machine's CPU, so that predicted times mean something.
2. Plan for 4xCPU under a memory limit per process. The whole training state of the model is several times that.
3. Train over 4 processes on the text in examples/text, with `shardwright run`'s machinery.
4. Train the model as written, in one process, with plain PyTorch. The losses must be the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import shardwright
from shardwright.commands.run import StepPrinter
from shardwright.data import batch_source
from shardwright.launch import launch
from shardwright.profiler.capture import compute_loss
from shardwright.profiler.cpu_calibration import calibrate_cpu
from shardwright.profiler.initial_values import materialize
from shardwright.render import make_console, print_plan
from shardwright.units import MIB, format_bytes, format_seconds, parse_bytes

TEXT = Path(__file__).parent / "text" / "founding.txt"
HARDWARE = "4xCPU"
GLOBAL_BATCH = 16
# Losses are in float32, where sums in another order differ in the last bits, and training amplifies such differences.
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--memory-limit", type=parse_bytes, default=48 * MIB)
    args = parser.parse_args()
    console = make_console()

    console.rule("1. this machine", align="left")
    calibrate_cpu()
    workload = shardwright.load_workload("preset:demo-llama", global_batch=GLOBAL_BATCH, precision="float32")
    num_params = sum(parameter.numel() for parameter in workload.model.parameters())
    state_bytes = num_params * 4 * (2 + workload.optimizer.state_tensors)
    console.print(f"{num_params:,} parameters; with gradients and optimizer state {format_bytes(state_bytes)}.")

    console.rule(f"2. plan for {HARDWARE}, {format_bytes(args.memory_limit)} for each process", align="left")
    plan = shardwright.plan(workload, HARDWARE, memory_limit_bytes=args.memory_limit)
    print_plan(plan, top=4, console=console)
    show_single_axes(console, workload, plan, args.memory_limit)

    console.rule(f"3. train {args.steps} steps over {plan.mesh.num_devices} processes on {TEXT.name}", align="left")
    events: list[dict[str, Any]] = []
    printer = StepPrinter(plan, as_json=False)

    def on_event(event: dict[str, Any]) -> None:
        events.append(event)
        printer(event)

    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        task = {"task": "run", "plan": f"{folder}/plan.json", "steps": args.steps, "text": str(TEXT)}
        launch(task, plan.mesh.num_devices, on_event)
    losses = [event["loss"] for event in events if event["event"] == "step"]

    console.rule("4. the same in one process, with plain PyTorch", align="left")
    started = time.perf_counter()
    expected = train_alone(workload, args.steps, plan.microbatch.size)
    console.print(f"{args.steps} steps in {format_seconds(time.perf_counter() - started)}")
    worst = 0.0
    for step, (found, reference) in enumerate(zip(losses, expected, strict=True)):
        worst = max(worst, abs(found - reference) / abs(reference))
        if step % 5 == 0 or step == len(losses) - 1:
            console.print(f"step {step:>3}   4 processes {found:.6f}   1 process {reference:.6f}")
    same = worst <= TOLERANCE
    verdict = "[bold green]the losses are equal[/]" if same else "[bold red]the losses differ[/]"
    console.print(f"{verdict}: largest relative difference {worst:.1e}, the rounding of float32")

    console.rule("predicted and measured", align="left")
    predicted, measured_s = plan.predicted, printer.median_step_s()
    console.print(
        f"step    predicted {format_seconds(predicted.step_s):>10}   measured {format_seconds(measured_s):>10}"
    )
    memory = [format_bytes(size) for size in (max(predicted.peak_bytes), printer.peak_bytes, args.memory_limit)]
    console.print(f"memory  predicted {memory[0]:>10}   measured {memory[1]:>10}   limit {memory[2]} (worst process)")
    raise SystemExit(0 if same else 1)


def show_single_axes(
    console: Console, workload: shardwright.Workload, plan: shardwright.Plan, limit_bytes: int
) -> None:
    """What one axis alone would give under the same limit."""
    console.print("One axis alone, under the same limit:")
    for axis in ("dp", "pp", "tp"):
        try:
            other = shardwright.plan(workload, HARDWARE, memory_limit_bytes=limit_bytes, force={axis: 4})
        except shardwright.ShardwrightError as error:
            console.print(f"  {axis}=4  does not fit: {error.what}")
            continue
        slower = other.predicted.step_s / plan.predicted.step_s - 1
        console.print(f"  {axis}=4  fits, slower by {slower:.0%} ({format_seconds(other.predicted.step_s)})")


def train_alone(workload: shardwright.Workload, num_steps: int, microbatch_size: int) -> list[float]:
    """The training loop that a user would write. Same first values, same batches."""
    job = materialize(workload)
    job.model.train()
    optimizer = workload.optimizer.factory(job.model.parameters(), **workload.optimizer.options)
    batches = batch_source(workload, TEXT)
    torch.set_num_threads(max(1, torch.get_num_threads()))
    losses = []
    for step in range(num_steps):
        batch = batches(step)
        optimizer.zero_grad()
        total = 0.0
        for start in range(0, GLOBAL_BATCH, microbatch_size):
            microbatch = {name: tensor[start : start + microbatch_size] for name, tensor in batch.items()}
            loss = compute_loss(job.model, job.loss, microbatch) * (microbatch_size / GLOBAL_BATCH)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


if __name__ == "__main__":
    main()
