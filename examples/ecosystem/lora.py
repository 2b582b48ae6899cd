"""A PEFT adapter trained by a planned program: the base model is frozen, has no gradient and no optimizer state.

python examples/ecosystem/lora.py
torchrun --nproc-per-node 2 examples/ecosystem/lora.py
"""

from __future__ import annotations

import argparse
import os

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import shardwright


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), adapter).train()


def make_batch(step: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens.clone()}


def train(plain: bool = False, steps: int = 4) -> list[float]:
    """The loss of each step, over the whole batch."""
    if plain:
        model = make_model()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            loss = model(**make_batch(step)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses
    hardware = f"{os.environ.get('WORLD_SIZE', '1')}xCPU"
    make = shardwright.parallelize(make_model, hardware=hardware, optimizer="AdamW", optimizer_options={"lr": 1e-2})
    model = make()
    return [model.step(make_batch(step)).item() for step in range(steps)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="without Shardwright, on one process")
    for step, loss in enumerate(train(parser.parse_args().plain)):
        print(f"step {step}  loss {loss:.12f}")
