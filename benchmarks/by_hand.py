"""Torch's own parallel training of a transformers model, written out by hand: what parallel_step.py measures against.

Each maker takes a model with real values (equal on every rank) and the process mesh, and returns the wrapped model and
the number of ranks that share one part of the batch. GPT-2's Conv1D becomes Linear, with the rows of its fused
projection put in such an order that a rank's part holds its own heads: parallelize_module knows no Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Peer:
    """A parallel model. shares: ranks that work on the same part of the batch. around: entered for each step."""

    model: nn.Module
    shares: int = 1
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


def ddp(model: nn.Module) -> Peer:
    return Peer(DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True))


def fsdp2(model: nn.Module) -> Peer:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    _fully_shard(model, mesh)
    return Peer(model)


def tensor_parallel(model: nn.Module, *, sequence: bool = False) -> Peer:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layout = _layout(model, mesh.size(), sequence)
    parallelize_module(model, mesh, layout)
    _tie(model)
    if sequence:
        _blocks(model)[0].register_forward_pre_hook(lambda _, args: (_scatter_sequence(args[0], mesh), *args[1:]))
    return Peer(model, mesh.size(), loss_parallel if layout.get("lm_head") else nullcontext)


def fsdp2_and_tensor_parallel(model: nn.Module) -> Peer:
    """Two dimensions: FSDP2 over half of the ranks, tensor parallelism over pairs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    layout = _layout(model, 2, False)
    parallelize_module(model, mesh["tp"], layout)
    _tie(model)
    _fully_shard(model, mesh["dp"])
    return Peer(model, 2, loss_parallel if layout.get("lm_head") else nullcontext)


def makers(num_processes: int) -> dict[str, Callable[[nn.Module], Peer]]:
    found: dict[str, Callable[[nn.Module], Peer]] = {
        "DDP": ddp,
        "FSDP2": fsdp2,
        f"parallelize_module tp={num_processes}": tensor_parallel,
        f"parallelize_module tp={num_processes}, sequence parallel": lambda model: tensor_parallel(
            model, sequence=True
        ),
    }
    if num_processes == 4:
        found["FSDP2 dp=2, parallelize_module tp=2"] = fsdp2_and_tensor_parallel
    return found


def _fully_shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _blocks(model: Any) -> nn.ModuleList:
    kind = model.config.model_type
    return {"llama": lambda: model.model.layers, "gpt2": lambda: model.transformer.h, "vit": lambda: model.vit.layers}[
        kind
    ]()


def _layout(model: Any, parts: int, sequence: bool) -> dict[str, ParallelStyle]:
    """Megatron's: columns, then rows, in attention and in the feed-forward; vocabulary and loss split."""
    kind = model.config.model_type
    if kind == "gpt2":
        _linear_gpt2(model, parts)
    return {"llama": _llama, "gpt2": _gpt2, "vit": _vit}[kind](sequence)


def _row(sequence: bool) -> RowwiseParallel:
    return RowwiseParallel(output_layouts=Shard(1)) if sequence else RowwiseParallel()


def _head(sequence: bool) -> ColwiseParallel:
    return ColwiseParallel(
        input_layouts=Shard(1) if sequence else Replicate(), output_layouts=Shard(-1), use_local_output=False
    )


def _llama(sequence: bool) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": _head(sequence),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = _row(sequence)
    if sequence:
        plan |= {
            "model.layers.*.input_layernorm": SequenceParallel(use_local_output=True),
            "model.layers.*.post_attention_layernorm": SequenceParallel(use_local_output=True),
            "model.norm": SequenceParallel(use_local_output=True),
            "model.layers.*.self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                use_local_output=True,
            ),
            "model.layers.*.mlp": _gather_sequence(),
        }  # fmt: skip
    return plan


def _scatter_sequence(hidden: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    return DTensor.from_local(hidden, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(1)]).to_local()


def _gather_sequence() -> PrepareModuleInput:
    return PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True)


def _gpt2(sequence: bool) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "transformer.wte": RowwiseParallel(input_layouts=Replicate()),
        "transformer.h.*.attn.c_attn": ColwiseParallel(),
        "transformer.h.*.attn.c_proj": _row(sequence),
        "transformer.h.*.mlp.c_fc": ColwiseParallel(),
        "transformer.h.*.mlp.c_proj": _row(sequence),
        "lm_head": _head(sequence),
    }
    if sequence:
        plan |= {
            "transformer.h.*.ln_1": SequenceParallel(use_local_output=True),
            "transformer.h.*.ln_2": SequenceParallel(use_local_output=True),
            "transformer.ln_f": SequenceParallel(use_local_output=True),
            "transformer.h.*.attn.c_attn": ColwiseParallel(input_layouts=Shard(1)),
            "transformer.h.*.mlp": _gather_sequence(),
        }
    return plan


def _vit(sequence: bool) -> dict[str, ParallelStyle]:
    if sequence:
        raise NotImplementedError("197 patches do not divide over the ranks")
    plan: dict[str, ParallelStyle] = {}
    for name in ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.fc1"):
        plan[f"vit.layers.*.{name}"] = ColwiseParallel()
    for name in ("attention.o_proj", "mlp.fc2"):
        plan[f"vit.layers.*.{name}"] = RowwiseParallel()
    return plan


def _tie(model: Any) -> None:
    """parallelize_module has made two parameters of a tied one."""
    if model.config.model_type == "gpt2":
        model.lm_head.weight = model.transformer.wte.weight


def _linear_gpt2(model: Any, parts: int) -> None:
    for block in model.transformer.h:
        attention, hidden = block.attn, block.attn.embed_dim
        order = torch.arange(3 * hidden).view(3, parts, -1).transpose(0, 1).flatten()
        attention.c_attn = _linear(attention.c_attn, order)
        attention.split_size = hidden // parts
        attention.c_proj, block.mlp.c_fc = _linear(attention.c_proj), _linear(block.mlp.c_fc)
        block.mlp.c_proj = _linear(block.mlp.c_proj)


def _linear(conv: Any, order: torch.Tensor | None = None) -> nn.Linear:
    weight, bias = conv.weight.detach().t(), conv.bias.detach()
    if order is not None:
        weight, bias = weight[order], bias[order]
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight, made.bias = nn.Parameter(weight.contiguous().clone()), nn.Parameter(bias.clone())
    return made
