"""Every rank starts from rank 0's values, as under DistributedDataParallel.

A script that draws its weights without a seed has others on every rank: replicas would then differ without end. What
differs is sent by rank 0; where nothing does, as after the same seed, a few numbers for each tensor travel.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from .together import num_ranks, of_all_ranks

_COLUMNS = 61  # a prime: no dimension of a model
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def take_rank_0s(model: nn.Module, device: torch.device) -> None:
    """In place, of parameters and buffers that have values. Every rank calls it. device: whose tensors can be sent.

    Sparse tensors and those of other layouts without strides are left as they are."""
    if num_ranks() == 1:
        return
    named = (*model.named_parameters(), *model.named_buffers())
    tensors = {name: t for name, t in named if not t.is_meta and t.layout == torch.strided}
    everyone = of_all_ranks({name: _digest(tensor) for name, tensor in tensors.items()})
    for name, (kind, bits) in everyone[0].items():
        found = [other.get(name) for other in everyone]
        if any(entry is None or entry[0] != kind for entry in found):
            continue  # it has no values on some, and is drawn there by its seed; or another model, refused elsewhere
        if any(entry[1] != bits for entry in found):
            sent = tensors[name].detach().to(device).contiguous()
            dist.broadcast(sent, src=0)
            _write(tensors[name], sent)


def _write(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """In place; an expanded tensor, whose entries share memory, gets memory of its own."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        tensor.data = value.to(tensor.device, copy=True)
    else:
        tensor.copy_(value)


def _digest(tensor: torch.Tensor) -> tuple[tuple[tuple[int, ...], str], tuple[int, ...]]:
    """((shape, dtype), numbers that another tensor of its kind would hardly give): sums of bits, so that NaN equals
    itself, each of every _COLUMNS-th entry, so that their order counts."""
    plain = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    bits = plain.contiguous().view(_INTEGERS[plain.element_size()]).flatten()
    even = bits.numel() // _COLUMNS * _COLUMNS
    sums = [*bits[:even].view(-1, _COLUMNS).sum(0, dtype=torch.int64).tolist(), *bits[even:].tolist()]
    return (tuple(tensor.shape), str(tensor.dtype)), tuple(sums)
