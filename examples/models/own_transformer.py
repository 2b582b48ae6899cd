"""A model of your own for the command line: a file with a function that returns a Workload.

    shardwright plan examples/models/own_transformer.py:small --hardware 2x8xH100-80GB
    shardwright check examples/models/own_transformer.py:small --hardware 4xCPU --force dp=2 --force tp=2

The function takes no arguments. It may build the model on the meta device, where it takes no memory, whatever its size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from shardwright.profiler.workload import OptimizerSpec, Precision, Workload

VOCABULARY, SEQUENCE, BATCH = 1000, 64, 4


class Block(nn.Module):
    """Pre-norm attention and MLP. [batch, sequence, width] -> the same."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """tokens [batch, sequence] -> logits [batch, sequence, vocabulary]. Input and output share their embedding."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(SEQUENCE, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def next_token_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


def small() -> Workload:
    """1.7 million parameters with real values."""
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE + 1))
    return Workload(
        model=LanguageModel(width=160, num_layers=5, num_heads=8),
        example_batch={"tokens": tokens[:, :-1].clone(), "targets": tokens[:, 1:].clone()},
        global_batch=16,
        loss=next_token_loss,
        optimizer=OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-3}),
        precision=Precision(compute=torch.float32, master=torch.float32, grad_reduce=torch.float32),
        batch_size=BATCH,
        tokens_per_sample=SEQUENCE,
        name="own-transformer",
    )


def large() -> Workload:
    """13 billion parameters on the meta device, in bfloat16: to be planned, not run here."""
    with torch.device("meta"):
        model = LanguageModel(width=5120, num_layers=40, num_heads=40).to(torch.bfloat16)
        tokens = torch.empty(BATCH, SEQUENCE, dtype=torch.int64)
        targets = torch.empty(BATCH, SEQUENCE, dtype=torch.int64)
    return Workload(
        model=model,
        example_batch={"tokens": tokens, "targets": targets},
        global_batch=64,
        loss=next_token_loss,
        batch_size=BATCH,
        tokens_per_sample=SEQUENCE,
        name="own-transformer-large",
    )
