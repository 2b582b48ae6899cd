"""torch.compile with the shardwright backend, which PyTorch finds by itself: nothing of Shardwright is imported.

    python examples/compile_backend.py
    torchrun --nproc-per-node 2 examples/compile_backend.py

Under torchrun each process passes its own part of the batch, as with DistributedDataParallel.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn


def main() -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    compiled = torch.compile(model, backend="shardwright")
    optimizer = torch.optim.Adam(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        x = torch.rand(32, 4, generator=generator)[rank::world_size]
        loss = (compiled(x) - x.square().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24 and rank == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
