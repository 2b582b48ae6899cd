"""Models that tools like this one have choked on, by name, for factories that worker processes import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 24  # six heads of four: uneven on four ranks


@dataclass
class Output:
    loss: torch.Tensor
    hidden: torch.Tensor | None = None
    extras: dict[str, torch.Tensor] | None = None


class Block(nn.Module):
    """Six heads; a keyword argument that may be None; a dictionary as result."""

    def __init__(self, heads: int = 6) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(
        self, x: torch.Tensor, *, bias: torch.Tensor | None = None, scale: float | None = None
    ) -> dict[str, Any]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        return {"x": x + self.out(mixed.transpose(1, 2).flatten(-2)), "nothing": None}


class Stack(nn.Module):
    """Blocks over tokens; how the blocks are made and called is the subclass's matter."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(37, WIDTH), nn.Linear(WIDTH, 37)
        self.blocks = nn.ModuleList(blocks)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, bias=bias)["x"]
        return x

    def forward(self, input_ids: torch.Tensor, bias: torch.Tensor | None = None) -> Output:
        x = self.run(self.embed(input_ids), bias)
        loss = F.cross_entropy(self.head(x).flatten(0, 1), input_ids.flatten())
        return Output(loss, hidden=x, extras={"first": x[:, 0]})


class CalledTwice(Stack):
    """Each block stands twice in the order of execution: its gradients add up."""

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return super().run(super().run(x, bias), None)


class Adapter(nn.Module):
    """A frozen linear layer with a trainable correction of rank two (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def _adapted() -> nn.Module:
    model = Stack([Block() for _ in range(2)]).requires_grad_(False)
    for block in model.blocks:
        block.qkv, block.out = Adapter(block.qkv), Adapter(block.out)
    return model


class Unused(Stack):
    """Parameters and outputs that the loss does not depend on."""

    def __init__(self) -> None:
        super().__init__([Block() for _ in range(2)])
        self.aside = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: torch.Tensor, bias: torch.Tensor | None = None) -> Output:
        found = super().forward(input_ids, bias)
        assert found.hidden is not None and found.extras is not None
        found.extras["aside"] = self.aside(found.hidden.detach())
        return found


class TiedAndFrozen(Stack):
    """Embedding and head share their weight; one block is frozen, and gradients pass through it."""

    def __init__(self) -> None:
        super().__init__([Block() for _ in range(3)])
        self.head.weight = self.embed.weight
        self.blocks[1].requires_grad_(False)


class Branches(nn.Module):
    """Control flow that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if y.sum() > 0:  # the line that the error must name
            y = -y
        return y.mean()


class Sizes(Branches):
    """A size that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = (x > 0).sum().item()
        return sum(part.sum() for part in self.linear(x).flatten().split([count, x.numel() - count]))


MODELS: dict[str, Any] = {
    "called_twice": lambda: CalledTwice([Block() for _ in range(2)]),
    "adapters": _adapted,
    "unused": Unused,
    "tied_and_frozen": TiedAndFrozen,
    "uneven_heads": lambda: Stack([Block() for _ in range(4)]),
}


def _factory(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    if name in ("branches", "sizes"):
        return (Branches if name == "branches" else Sizes)(), {"x": torch.randn(8, 4)}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(37, (8, 6), generator=generator)
    batch = {"input_ids": ids}
    if name in ("called_twice", "uneven_heads"):
        batch["bias"] = torch.randn(8, 1, 6, 6, generator=generator)
    return MODELS[name](), batch


def __getattr__(name: str) -> Any:
    if name in MODELS or name in ("branches", "sizes"):
        return lambda: _factory(name)
    raise AttributeError(name)
