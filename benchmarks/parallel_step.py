"""A planned program's step beside torch's own parallel training by hand, in turn, on the same processes.

    python benchmarks/parallel_step.py [MODEL ...] [--processes 2,4] [--steps N] [--only TEXT,...] [--write]

Contestants: the planner's choice and plans forced to the layouts of the peers; DDP, FSDP2 and parallelize_module
(benchmarks/by_hand.py). All have the same model and first values, the same global batch, float32 and AdamW. One
process per rank, gloo over the loopback interface, one thread each. Steps are interleaved (A B C A B C ...), so that a
machine whose speed drifts treats all alike; a step lasts as long as on its slowest rank. The ratio is ours / the best
of the peers, of medians and of the fastest steps. --write puts the table in benchmarks/results/parallel_step.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

MODELS: dict[str, tuple[str, int | None, dict[str, Any], int]] = {
    # name -> preset, sequence length, settings, global batch
    "gpt2": (
        "preset:gpt2", 128,
        {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "vocab_size": 8192, "n_positions": 128,
         "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        8,
    ),
    "llama": (
        "preset:demo-llama", 128,
        {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 704,
         "vocab_size": 8192},
        8,
    ),
    "vit": ("preset:vit-l", None, {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "intermediate_size": 1024}, 8),
}  # fmt: skip
OURS = "planned"
RESULTS = Path(__file__).parent / "results" / "parallel_step.md"
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Contestant:
    name: str
    step: Step
    note: str = ""  # what the plan is, or why it is not here


def load(name: str) -> Any:
    from shardwright.profiler.models import load_workload

    preset, seq_len, settings, batch = MODELS[name]
    workload = load_workload(preset, global_batch=batch, seq_len=seq_len, precision="float32", overrides=settings)
    fused = dataclasses.replace(workload.optimizer, options={"fused": True})  # the fastest update, for all
    return dataclasses.replace(workload, optimizer=fused)


def forced(num_processes: int) -> dict[str, dict[str, str]]:
    """What is forced on a plan so that it is laid out as one of the peers is."""
    n = num_processes
    layouts = {
        f"{OURS}: planner's choice": {},
        f"{OURS}: dp={n}": {"pp": 1, "dp": n, "tp": 1, "zero": 0},
        f"{OURS}: dp={n} zero=3": {"pp": 1, "dp": n, "tp": 1, "zero": 3},
        f"{OURS}: tp={n}": {"pp": 1, "dp": 1, "tp": n, "zero": 0},
    }
    if n == 4:
        layouts[f"{OURS}: dp=2 tp=2"] = {"pp": 1, "dp": 2, "tp": 2, "zero": 0}
    return {name: {key: str(value) for key, value in force.items()} for name, force in layouts.items()}


def program_contestant(
    name: str, workload: Any, batch: Mapping[str, torch.Tensor], force: dict[str, str]
) -> Contestant:
    from shardwright import api

    plan = api.plan(workload, f"{dist.get_world_size()}xCPU", force=force)
    program = api.build(plan, workload)
    part = program.shard_batch(batch)
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.model_dump().items() if size > 1)
    note = f"{mesh} zero={plan.zero}, {plan.microbatch.count} x {plan.microbatch.size}"
    return Contestant(name, lambda: program.step(part), note)


def peer_contestant(name: str, workload: Any, batch: Mapping[str, torch.Tensor], make: Any) -> Contestant:
    from shardwright.profiler.capture import compute_loss
    from shardwright.profiler.initial_values import materialize

    peer = make(materialize(workload).model)
    parts = dist.get_world_size() // peer.shares
    rows = workload.global_batch // parts
    start = dist.get_rank() // peer.shares * rows
    part = {key: tensor[start : start + rows] for key, tensor in batch.items()}
    optimizer = workload.optimizer.factory(_groups(peer.model), **workload.optimizer.options)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with peer.around():
            loss = compute_loss(peer.model, workload.loss, part)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return Contestant(name, step)


def _groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """DTensors and plain tensors apart: the fused update takes no mixture."""
    kinds: dict[bool, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return [{"params": row} for row in kinds.values()]


def contestants(model: str, only: list[str]) -> list[Contestant]:
    import by_hand

    from shardwright.profiler.batches import make_batch

    workload = load(model)
    batch = dict(make_batch(workload, workload.global_batch, seed=1))
    found = []
    size = dist.get_world_size()
    makers: dict[str, Callable[[str], Contestant]] = {}
    for name, force in forced(size).items():
        makers[name] = lambda name, force=force: program_contestant(name, workload, batch, force)
    for name, make in by_hand.makers(size).items():
        makers[name] = lambda name, make=make: peer_contestant(name, workload, batch, make)
    for name, maker in makers.items():
        if only and not any(text in name for text in only):
            continue
        try:
            made = maker(name)
            made.step()
            found.append(made)
        except NotImplementedError as error:
            if dist.get_rank() == 0:
                print(f"  {name}: {error}", flush=True)
    return found


def measure(model: str, steps: int, only: list[str]) -> dict[str, Any]:
    """Seconds of each contestant's steps, of the slowest rank; first losses."""
    rows = contestants(model, only)
    losses = {row.name: _mean_loss(row.step()) for row in rows}
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    gc.collect()
    gc.disable()
    for index in range(steps + 1):
        order = rows[index % len(rows) :] + rows[: index % len(rows)]  # no one always follows the same one
        for row in order:
            dist.barrier()
            started = time.perf_counter()
            row.step()
            mine = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            if index:
                seconds[row.name].append(mine.item())
        gc.collect()
    gc.enable()
    return {"seconds": seconds, "losses": losses, "notes": {row.name: row.note for row in rows}}


def _mean_loss(loss: Any) -> float:
    loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
    total = loss.detach().double().reshape(1).clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _worker(rank: int, size: int, folder: str, models: list[str], steps: int, only: list[str], results: Any) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        for model in models:
            found = measure(model, steps, only)
            if rank == 0:
                results.put((model, found))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    dist.destroy_process_group()


def run(size: int, models: list[str], steps: int, only: list[str]) -> dict[str, dict[str, Any]]:
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(target=_worker, args=(rank, size, folder, models, steps, only, results))
            for rank in range(size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed; its traceback is above")
    found = {}
    while not results.empty():
        model, row = results.get()
        found[model] = row
    return found


def table(model: str, size: int, found: dict[str, Any]) -> list[str]:
    medians = {name: statistics.median(row) for name, row in found["seconds"].items()}
    least = {name: min(row) for name, row in found["seconds"].items()}
    lines = [
        f"## {model}, {size} processes",
        "",
        "| contestant | median | fastest | loss after one step | as run |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {medians[name] * 1e3:.0f} ms | {least[name] * 1e3:.0f} ms | {found['losses'][name]:.6f} | "
        f"{found['notes'][name]} |"
        for name in sorted(medians, key=medians.__getitem__)
    ]
    peers = [name for name in medians if not name.startswith(OURS)]
    ours = [name for name in medians if name.startswith(OURS)]
    for name in ours:
        if peers:
            ratio = medians[name] / min(medians[p] for p in peers)
            fastest = least[name] / min(least[p] for p in peers)
            lines += ["", f"{name} / best peer: {ratio:.3f} of medians, {fastest:.3f} of fastest steps"]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--processes", default="2,4")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--only", default="", help="contestants whose name holds one of these texts")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    models = arguments.models or list(MODELS)
    only = [text for text in arguments.only.split(",") if text]
    lines: list[str] = []
    for size in map(int, arguments.processes.split(",")):
        found = run(size, models, arguments.steps, only)
        for model, row in found.items():
            lines += table(model, size, row)
            print("\n".join(table(model, size, row)), flush=True)
    if arguments.write:
        head = [
            "# A planned step beside DDP, FSDP2 and parallelize_module",
            "",
            f"Made by `python benchmarks/parallel_step.py` on {datetime.date.today()}: torch {torch.__version__}, "
            f"{platform.machine()}, {os.cpu_count()} cores, gloo over loopback, one thread a process, float32, AdamW. "
            f"{arguments.steps} interleaved steps; a step lasts as long as on its slowest rank.",
            "",
        ]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text("\n".join([*head, *lines]))


if __name__ == "__main__":
    main()
