"""A job whose model trains low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) beside frozen weights, by PEFT."""

from __future__ import annotations

import dataclasses

import torch

from .errors import ShardwrightError
from .profiler.copies import copy_workload
from .profiler.workload import Workload

RANK = 16


def why_no_lora(workload: Workload) -> str:
    """Why the model gets no adapters; '' where it can."""
    try:
        import peft  # noqa: F401
        from transformers import PreTrainedModel
    except ImportError as error:
        return f"the package {error.name or 'peft'} is not installed (pip install peft)"
    return "" if isinstance(workload.model, PreTrainedModel) else "the model is no transformers model"


def with_lora(workload: Workload, rank: int = RANK) -> Workload:
    """Adapters of this rank on every linear layer but the head, all else frozen. The given workload is untouched."""
    from peft import LoraConfig, get_peft_model

    copied = copy_workload(workload)
    device = next(copied.model.parameters()).device
    try:
        with torch.device(device):
            adapted = get_peft_model(copied.model, LoraConfig(r=rank, target_modules="all-linear"))
    except ValueError as error:
        raise ShardwrightError(
            f"PEFT cannot adapt {workload.name}: {str(error).splitlines()[0]}",
            means="it finds no linear layers that it knows",
            change="--grid",
            works="a model with linear layers, such as preset:llama-3-8b",
        ) from error
    return dataclasses.replace(copied, model=adapted.train(), name=f"{workload.name}, LoRA of rank {rank}")
