"""shardwright::expert_mlp: the experts of a mixture-of-experts layer as one operator, forward and backward.

Letters: N tokens, K experts chosen for each, E experts, H hidden size, I intermediate size.

    hidden [N, H]   index [N, K] int64   weight [N, K]   gate_up [E, 2 I, H]   down [E, H, I]
    out [N, H] = sum over k of weight * down(activation(gate) * up)     pre [N, K, 2 I] = gate and up, for the backward,
                                                                        which without it computes them again

A choice outside 0..E-1 adds nothing. So a rank that holds some of the experts shifts `index` by its first one, and the
sum over ranks is the whole; and tokens are independent of each other, so they split freely.

Written out in torch ops this would be a sort, gathers and matmuls whose shapes depend on the data, or, with static
shapes, every expert applied to every token. As one operator its cost is what the chosen experts cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")
_INPUTS = "Tensor hidden, Tensor index, Tensor weight, Tensor gate_up, Tensor down"

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, gate, 0)
    return torch.ops.aten.gelu_backward(grad, gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _groups(index: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, positions in the flattened [N * K] choices that chose it), for the experts that any chose."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    flat = flat[order]
    edges = torch.searchsorted(flat, torch.arange(num_experts + 1, device=flat.device)).tolist()
    for expert in range(num_experts):
        if edges[expert] < edges[expert + 1]:
            yield expert, order[edges[expert] : edges[expert + 1]]


def _forward(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_choices = index.shape[1]
    pre = hidden.new_zeros(index.numel(), gate_up.shape[1])
    out = hidden.new_zeros(index.numel(), hidden.shape[1])
    for expert, at in _groups(index, gate_up.shape[0]):
        both = hidden[at // num_choices] @ gate_up[expert].T
        gate, up = both.chunk(2, dim=-1)
        pre[at] = both
        out[at] = (_activate(gate, activation) * up) @ down[expert].T
    weighted = out.view(*index.shape, -1) * weight.unsqueeze(-1)
    return weighted.sum(1).to(hidden.dtype), pre.view(*index.shape, -1)


def _backward(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_choices = index.shape[1]
    flat_weight = weight.reshape(-1, 1)
    flat_pre = None if pre is None else pre.reshape(-1, pre.shape[-1])
    grad_choice = hidden.new_zeros(index.numel(), hidden.shape[1])
    grad_weight = weight.new_zeros(index.numel())
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert, at in _groups(index, gate_up.shape[0]):
        tokens = at // num_choices
        both = hidden[tokens] @ gate_up[expert].T if flat_pre is None else flat_pre[at]
        gate, up = both.chunk(2, dim=-1)
        grad, scale = grad_out[tokens], flat_weight[at].to(grad_out.dtype)
        activated = _activate(gate, activation)
        product = activated * up
        grad_product = grad @ down[expert]
        grad_weight[at] = (grad_product * product).sum(-1).to(weight.dtype)
        grad_product = grad_product * scale
        grad_down[expert] = (grad * scale).T @ product
        grad_gate = _activate_backward(grad_product * up, gate, activation)
        grad_both = torch.cat([grad_gate, grad_product * activated], dim=-1)
        grad_gate_up[expert] = grad_both.T @ hidden[tokens]
        grad_choice[at] = grad_both @ gate_up[expert]
    grad_hidden = grad_choice.view(*index.shape, -1).sum(1)
    return grad_hidden, grad_weight.view_as(weight), grad_gate_up, grad_down


def _forward_fake(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(hidden.dim() == 2 and index.dim() == 2 and hidden.shape[0] == index.shape[0])
    return hidden.new_empty(hidden.shape), hidden.new_empty(*index.shape, gate_up.shape[1])


def _backward_fake(
    grad_out: torch.Tensor,
    hidden: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    pre: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    like = (hidden, weight, gate_up, down)
    return tuple(t.new_empty(t.shape) for t in like)  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.activation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad_out: torch.Tensor, _grad_pre: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.shardwright.expert_mlp_backward(grad_out, *ctx.saved_tensors, ctx.activation)
    grad_hidden, grad_weight, grad_gate_up, grad_down = grads
    return grad_hidden, None, grad_weight, grad_gate_up, grad_down, None


_LIBRARY.define(f"expert_mlp({_INPUTS}, str activation) -> (Tensor out, Tensor pre)")
_LIBRARY.define(
    f"expert_mlp_backward(Tensor grad_out, {_INPUTS}, Tensor? pre, str activation) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_gate_up, Tensor grad_down)"
)
_LIBRARY.impl("expert_mlp", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("expert_mlp_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("shardwright::expert_mlp", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("shardwright::expert_mlp_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("shardwright::expert_mlp", _gradients, setup_context=_setup_context, lib=_LIBRARY)


@register_flop_formula(torch.ops.shardwright.expert_mlp)
def expert_mlp_flops(hidden: Any, index: Any, weight: Any, gate_up: Any, down: Any, *_: Any, **__: Any) -> int:
    """Two matmuls for each chosen expert of each token; a multiply and an add count as two."""
    choices = index[0] * index[1]
    return 2 * choices * (gate_up[1] * gate_up[2] + down[1] * down[2])


@register_flop_formula(torch.ops.shardwright.expert_mlp_backward)
def expert_mlp_backward_flops(grad_out: Any, *inputs: Any, **__: Any) -> int:
    """Twice the forward: each matmul's two gradients."""
    return 2 * expert_mlp_flops(*inputs)
