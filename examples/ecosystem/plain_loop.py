"""A training loop of one's own: accumulation, clipping, a scheduler, saving and resuming, over a planned program.

    python examples/ecosystem/plain_loop.py
    torchrun --nproc-per-node 2 examples/ecosystem/plain_loop.py

Accumulation is part of the plan (microbatches of the global batch), clipping of the optimizer's description. The
scheduler is torch's own, over program.optimizer. Half-way the program is saved, made anew and loaded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

import shardwright
from shardwright.runtime.program import Program

BATCH, ACCUMULATED, MAX_NORM, LR = 8, 4, 0.5, 2e-2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 32)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def make_batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(32, (BATCH, 6), generator=torch.Generator().manual_seed(step))
    return {"ids": ids, "labels": ids.roll(-1, 1)}


def train_plain(steps: int) -> list[float]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for part in range(ACCUMULATED):
            rows = slice(part * BATCH // ACCUMULATED, (part + 1) * BATCH // ACCUMULATED)
            loss = model(**{name: tensor[rows] for name, tensor in make_batch(step).items()}) / ACCUMULATED
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step()
        losses.append(total)
    return losses


def make_program() -> Program:
    workload = shardwright.Workload(
        model=make_model(),
        example_batch=make_batch(0),
        global_batch=BATCH,
        optimizer=shardwright.OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": LR}, max_grad_norm=MAX_NORM),
        precision=shardwright.Precision(torch.float64, torch.float64, torch.float64),
    )
    hardware = f"{os.environ.get('WORLD_SIZE', '1')}xCPU"
    plan = shardwright.plan(workload, hardware, force={"microbatch": BATCH // ACCUMULATED})
    return shardwright.build(plan, workload)


def train(plain: bool = False, steps: int = 6) -> list[float]:
    """The loss of each step, over the whole batch."""
    if plain:
        return train_plain(steps)
    shardwright.join_torchrun(f"{os.environ.get('WORLD_SIZE', '1')}xCPU")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        if dist.is_initialized():
            dist.broadcast_object_list(folder, src=0)  # one folder for all
        first = _steps(make_program(), 0, steps // 2, steps, lambda program: program.save(Path(folder[0]) / "half"))
        again = make_program()
        again.load(Path(folder[0]) / "half")
        if dist.is_initialized():
            dist.barrier()  # nobody's folder goes before all have read
        return first + _steps(again, steps // 2, steps, steps)


def _steps(
    program: Program,
    start: int,
    end: int,
    steps: int,
    at_end: Callable[[Program], None] = lambda program: None,
) -> list[float]:
    for group in program.optimizer.param_groups:
        group["initial_lr"] = LR  # where the schedule began: a resumed group has the rate it was saved with
    scheduler = CosineAnnealingLR(program.optimizer, T_max=steps, last_epoch=start - 1)
    losses = []
    for step in range(start, end):
        losses.append(program.step(program.shard_batch(make_batch(step))).item())
        scheduler.step()
    at_end(program)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="without Shardwright, on one process")
    for step, loss in enumerate(train(parser.parse_args().plain)):
        print(f"step {step}  loss {loss:.12f}")
