"""One process, no sharding: a program's step beside an eager PyTorch step of the same model, in turn, in one run.

    python benchmarks/step.py [MODEL ...] [--steps N] [--write]

Both train in float32 on one thread with the same batch and optimizer. The ratio is taken pair by pair and its median
printed, so that a machine whose speed drifts does not matter. Seconds are the process's own (CPU time). --write puts
the table in benchmarks/results/step.md. Dropout, where a model has it, is counter-based in the program and torch's own
in the eager step.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from shardwright import api
from shardwright.profiler.batches import make_batch
from shardwright.profiler.capture import compute_loss
from shardwright.profiler.initial_values import materialize
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Workload

# name -> (preset, sequence length, settings that make a step about a second long here)
MODELS: dict[str, tuple[str, int | None, dict[str, int]]] = {
    "llama": ("preset:demo-llama", 256, {}),
    "gpt2": ("preset:gpt2", 256, {"num_layers": 2}),
    "vit": ("preset:vit-l", None, {"num_layers": 2}),
    "mlp": ("preset:mlp", None, {}),
}
BATCH = 4


def eager_step(workload: Workload, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    reference = materialize(workload)
    optimizer = workload.optimizer.factory(list(reference.model.parameters()), **workload.optimizer.options)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = compute_loss(reference.model, workload.loss, batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def program_step(workload: Workload, batch: dict[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    plan = api.plan(workload, "1xCPU", force={"microbatch": BATCH, "recompute": "none"})
    program = api.build(plan, workload)
    return lambda: program.step(batch)


def measure(name: str, steps: int) -> tuple[float, float, float]:
    """Median seconds of an eager step and of a program's, and the median ratio of the second to the first."""
    preset, seq_len, settings = MODELS[name]
    workload = load_workload(preset, global_batch=BATCH, seq_len=seq_len, precision="float32", overrides=settings)
    batch = dict(make_batch(workload, BATCH, seed=1))
    eager, program = eager_step(workload, batch), program_step(workload, batch)
    seconds: list[tuple[float, float]] = []
    for index in range(steps + 2):
        pair = []
        for run in (eager, program):
            started = time.process_time()
            run()
            pair.append(time.process_time() - started)
        if index >= 2:
            seconds.append((pair[0], pair[1]))
    ratio = statistics.median(b / a for a, b in seconds)
    return statistics.median(a for a, _ in seconds), statistics.median(b for _, b in seconds), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"One process beside eager PyTorch, {datetime.date.today()}, torch {torch.__version__}, {platform.machine()}, "
        f"one thread, float32, batch {BATCH}. Medians of {arguments.steps} pairs.",
        "",
        "| model | eager step | program step | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name in arguments.models or MODELS:
        eager, program, ratio = measure(name, arguments.steps)
        lines.append(f"| {name} | {eager * 1e3:.1f} ms | {program * 1e3:.1f} ms | {ratio:.3f} |")
        print(lines[-1], flush=True)
    if arguments.write:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "step.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
