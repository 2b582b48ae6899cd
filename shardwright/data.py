"""Batches for `shardwright run` and the demo: a text file's bytes, or random data that the model accepts.

Batch number k is the same whoever asks for it and however many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .errors import ShardwrightError
from .profiler.batches import make_batch
from .profiler.workload import Workload

BatchSource = Callable[[int], dict[str, torch.Tensor]]
NUM_BYTE_VALUES = 256


def batch_source(workload: Workload, text: str | Path | None = None) -> BatchSource:
    """step number -> the global batch of that step, on the CPU."""
    if text is None:
        return lambda step: make_batch(workload, workload.global_batch, seed=workload.seed + step)
    return _text_source(workload, Path(text))


def _text_source(workload: Workload, path: Path) -> BatchSource:
    """Windows of seq_len bytes, their starts drawn anew for each step. Byte values are the tokens."""
    if set(workload.example_batch) != {"input_ids", "labels"}:
        raise ShardwrightError(
            f"{workload.name} takes {', '.join(workload.example_batch)}; text gives input_ids and labels",
            means="only causal language models train on a text",
            change="leave --text out",
            works="random batches",
        )
    try:
        tokens = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    except OSError as error:
        raise ShardwrightError(f"cannot read {path}: {error.strerror}", change="--text") from None
    seq_len = workload.example_batch["input_ids"].shape[1]
    if len(tokens) < seq_len + 1:
        raise ShardwrightError(
            f"{path} has {len(tokens)} bytes; one sequence takes {seq_len}", change="--text", works="a longer text"
        )
    vocab = getattr(getattr(workload.model, "config", None), "vocab_size", NUM_BYTE_VALUES)
    if int(tokens.max()) >= vocab:
        raise ShardwrightError(
            f"{path} has byte {int(tokens.max())}; the model knows {vocab} tokens",
            means="a text's bytes are its tokens",
            change="--text",
            works="plain ASCII, or a model with 256 tokens such as preset:demo-llama",
        )

    def batch(step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(workload.seed * 1_000_003 + step)
        starts = torch.randint(0, len(tokens) - seq_len, (workload.global_batch, 1), generator=generator)
        window = tokens[starts + torch.arange(seq_len)]
        return {"input_ids": window, "labels": window.clone()}

    return batch
