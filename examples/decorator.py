"""A model class that plans, builds and trains itself: `python examples/decorator.py`, or under torchrun.

torchrun --nproc-per-node 2 examples/decorator.py
"""

from __future__ import annotations

import os

import torch
from torch import nn

import shardwright


def mean_squared_error(output: torch.Tensor, batch) -> torch.Tensor:
    return (output - batch["y"]).square().mean()


@shardwright.parallelize(hardware=f"{os.environ.get('WORLD_SIZE', '1')}xCPU", loss=mean_squared_error, optimizer="Adam")
class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def main() -> None:
    torch.manual_seed(0)
    model = Net(width=64)
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        x = torch.rand(32, 4, generator=generator)
        loss = model.step({"x": x, "y": x.square().sum(1, keepdim=True)})
        if step % 25 == 24 and int(os.environ.get("RANK", "0")) == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
