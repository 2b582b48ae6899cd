"""Lightning Fabric with a model that the shardwright backend compiles.

    python examples/ecosystem/fabric.py
    torchrun --nproc-per-node 2 examples/ecosystem/fabric.py

Fabric wraps the model in DistributedDataParallel, which averages the gradients: data_parallel=False leaves that to it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).double()


def train(plain: bool = False, steps: int = 5) -> list[float]:
    """The loss of each step on this process's part of the batch."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(accelerator="cpu", devices=num_processes, strategy="ddp" if num_processes > 1 else "auto")
    fabric.launch()
    model = make_model()
    if not plain:
        model = torch.compile(model, backend="shardwright", options={"data_parallel": False})
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        target = x.argmax(1) % 4
        mine = slice(fabric.global_rank, None, num_processes)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[mine]), target[mine])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="without Shardwright")
    for step, loss in enumerate(train(parser.parse_args().plain)):
        print(f"step {step}  loss {loss:.12f}")
