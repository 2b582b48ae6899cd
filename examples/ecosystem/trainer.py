"""transformers' Trainer with a model that the shardwright backend compiles.

    python examples/ecosystem/trainer.py
    torchrun --nproc-per-node 2 examples/ecosystem/trainer.py

TrainingArguments(torch_compile_backend=...) takes a closed list of names, so the model is compiled in place before the
Trainer gets it. The Trainer averages gradients over its processes itself: data_parallel=False leaves that to it.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def train(plain: bool = False, steps: int = 4) -> list[float]:
    """The loss of each step, as the Trainer logs it."""
    model = make_model()
    if not plain:
        model.compile(backend="shardwright", options={"data_parallel": False})
    tokens = torch.randint(3, 64, (32, 16), generator=torch.Generator().manual_seed(1))
    losses = Losses()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, max_grad_norm=0.5, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[losses])
        trainer.train()
    return losses.values


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", action="store_true", help="without Shardwright")
    for step, loss in enumerate(train(parser.parse_args().plain)):
        print(f"step {step}  loss {loss:.12f}")
