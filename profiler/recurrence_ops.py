"""shardwright::recurrence: one direction of one layer of nn.LSTM, nn.GRU or nn.RNN over a sequence, as one operator.

Letters: B samples, T steps, H hidden size, P size of an output (H, or proj_size), G gates (LSTM 4, GRU 3, RNN 1).

    gates [B, T, G H] = W_ih x + b_ih        state [B, S]: what is carried from step to step, h, for LSTM h and c
    weight [G H, P]   bias [G H] of the hidden side   projection [P, H] of LSTM   lengths [B], of padded sequences
    out [B, T, P]     last [B, S], the state after the last step     kept [B, T, ...], what the backward reads

Steps at and beyond a sample's length leave its state, and their outputs are zero. reverse: from the last step to the
first. Written out in torch ops a layer would be some ten nodes for each step. What depends on the input alone is one
matmul before it, and the gradients of the weights are one matmul after the backward, from the gradients of the gates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_NUM_KEPT = {"lstm": 5, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}  # tensors [B, H] for each step
_LIBRARY = torch.library.Library("shardwright", "FRAGMENT")

Step = tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]


@dataclass(frozen=True)
class _Weights:
    """Of the hidden side."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    projection: torch.Tensor | None

    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)


def _carried(state: torch.Tensor, weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, ...]:
    size = weight.shape[1]
    return (state[:, :size], state[:, size:]) if kind == "lstm" else (state,)


def _steps(length: int, reverse: bool) -> list[int]:
    return list(range(length - 1, -1, -1) if reverse else range(length))


def _active(lengths: torch.Tensor | None, step: int) -> torch.Tensor | None:
    """[B, 1]: which samples have this step; None where all have it."""
    return None if lengths is None else (lengths > step).unsqueeze(1)


def _chosen(active: torch.Tensor | None, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    if active is None:
        return new
    return torch.where(active, new, 0 if old is None else old)


# --------------------------------------------------------------------------- one step


def _step(kind: str, gates: torch.Tensor, carried: tuple[torch.Tensor, ...], weights: _Weights) -> Step:
    """output, what is carried on, what is kept [B, n H]. The gates stand as torch has them: i f g o, and r z n."""
    if kind == "lstm":
        hidden, cell = carried
        i, f, g, o = (gates + weights.gates(hidden)).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * cell + i * g
        hidden = o * cell.tanh()
        if weights.projection is not None:
            hidden = hidden @ weights.projection.t()
        return hidden, (hidden, cell), torch.cat([i, f, g, o, cell], 1)
    if kind == "gru":
        (hidden,) = carried
        r, z, n = gates.chunk(3, 1)
        hidden_r, hidden_z, hidden_n = weights.gates(hidden).chunk(3, 1)
        r, z = (r + hidden_r).sigmoid(), (z + hidden_z).sigmoid()
        n = (n + r * hidden_n).tanh()
        hidden = (1 - z) * n + z * hidden
        return hidden, (hidden,), torch.cat([r, z, n, hidden_n], 1)
    hidden = gates + weights.gates(carried[0])
    hidden = hidden.tanh() if kind == "rnn_tanh" else hidden.relu()
    return hidden, (hidden,), hidden


def _step_backward(
    kind: str,
    grad: torch.Tensor,
    grad_cell: torch.Tensor | None,
    kept: torch.Tensor,
    before: tuple[torch.Tensor, ...],
    weights: _Weights,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Gradients of the gates, of what was carried in, and of the projection. before: what was carried in."""
    if kind == "lstm":
        i, f, g, o, cell = kept.chunk(5, 1)
        tanh_cell, grad_projection = cell.tanh(), None
        if weights.projection is not None:
            grad_projection = grad.t() @ (o * tanh_cell)
            grad = grad @ weights.projection
        assert grad_cell is not None
        grad_cell = grad_cell + grad * o * (1 - tanh_cell * tanh_cell)
        grad_i, grad_f, grad_g, grad_o = grad_cell * g, grad_cell * before[1], grad_cell * i, grad * tanh_cell
        grads = [grad_i * i * (1 - i), grad_f * f * (1 - f), grad_g * (1 - g * g), grad_o * o * (1 - o)]
        grad_gates = torch.cat(grads, 1)
        return grad_gates, (grad_gates @ weights.weight, grad_cell * f), grad_projection
    if kind == "gru":
        r, z, n, hidden_n = kept.chunk(4, 1)
        grad_n = grad * (1 - z) * (1 - n * n)
        grad_r = grad_n * hidden_n * r * (1 - r)
        grad_z = grad * (before[0] - n) * z * (1 - z)
        hidden_side = torch.cat([grad_r, grad_z, grad_n * r], 1)
        return torch.cat([grad_r, grad_z, grad_n], 1), (grad * z + hidden_side @ weights.weight,), None
    grad_gates = grad * (1 - kept * kept) if kind == "rnn_tanh" else grad * (kept > 0)
    return grad_gates, (grad_gates @ weights.weight,), None


# --------------------------------------------------------------------------- the whole sequence


def _forward(
    gates: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor | None,
    lengths: torch.Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights, carried = _Weights(weight, bias, projection), _carried(state, weight, kind)
    length = gates.shape[1]
    by_step = gates.transpose(0, 1).contiguous()
    outs: list[Any] = [None] * length
    kepts: list[Any] = [None] * length
    for step in _steps(length, reverse):
        active = _active(lengths, step)
        out, after, kept = _step(kind, by_step[step], carried, weights)
        carried = tuple(_chosen(active, new, old) for new, old in zip(after, carried, strict=True))
        if kind == "lstm" and active is not None:  # the cell that is kept is the one that is carried on
            kept = torch.cat([kept[:, : 4 * carried[1].shape[1]], carried[1]], 1)
        outs[step], kepts[step] = _chosen(active, out, None), kept
    return torch.stack(outs, 1), torch.cat(carried, 1), torch.stack(kepts, 1)


def _before(
    kind: str,
    out: torch.Tensor,
    kept: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    lengths: torch.Tensor | None,
    reverse: bool,
) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
    """Steps from the last that ran to the first, each with what was carried into it."""
    initial = _carried(state, weight, kind)
    order = _steps(out.shape[1], reverse)
    for position in range(len(order) - 1, -1, -1):
        if position == 0:
            yield order[0], initial
            continue
        previous = order[position - 1]
        hidden = _chosen(_active(lengths, previous), out[:, previous], initial[0])
        yield order[position], (hidden, kept[:, previous].chunk(5, 1)[4]) if kind == "lstm" else (hidden,)


def _backward(
    grad_out: torch.Tensor,
    grad_last: torch.Tensor,
    out: torch.Tensor,
    kept: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    projection: torch.Tensor | None,
    lengths: torch.Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    weights = _Weights(weight, None, projection)
    carried = _carried(grad_last, weight, kind)
    grads: list[Any] = [None] * out.shape[1]
    grad_projection = None if projection is None else torch.zeros_like(projection)
    for step, before in _before(kind, out, kept, state, weight, lengths, reverse):
        active = _active(lengths, step)
        grad = carried[0] + _chosen(active, grad_out[:, step], None)
        if active is not None:
            grad = torch.where(active, grad, 0)
        cell = carried[1] if kind == "lstm" else None
        grads_step, into, of_projection = _step_backward(kind, grad, cell, kept[:, step], before, weights)
        grads[step] = _chosen(active, grads_step, None)
        carried = tuple(_chosen(active, new, old) for new, old in zip(into, carried, strict=True))
        if grad_projection is not None and of_projection is not None:
            grad_projection += of_projection
    return torch.stack(grads, 1), torch.cat(carried, 1), grad_projection


def _forward_fake(
    gates: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor | None,
    lengths: torch.Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    samples, length, size = gates.shape
    hidden = size // {"lstm": 4, "gru": 3}.get(kind, 1)
    out = gates.new_empty(samples, length, weight.shape[1])
    return out, gates.new_empty(state.shape), gates.new_empty(samples, length, _NUM_KEPT[kind] * hidden)


def _backward_fake(
    grad_out: torch.Tensor,
    grad_last: torch.Tensor,
    out: torch.Tensor,
    kept: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    projection: torch.Tensor | None,
    lengths: torch.Tensor | None,
    kind: str,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    grad_projection = None if projection is None else projection.new_empty(projection.shape)
    return out.new_empty(*out.shape[:2], weight.shape[0]), state.new_empty(state.shape), grad_projection


# --------------------------------------------------------------------------- gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, state, weight, bias, projection, lengths, ctx.kind, ctx.reverse = inputs
    out, _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(out, kept, state, weight, projection, lengths)


def _gradients(ctx: Any, grad_out: torch.Tensor, grad_last: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    out, kept, state, weight, projection, lengths = ctx.saved_tensors
    grad_gates, grad_state, grad_projection = torch.ops.shardwright.recurrence_backward(
        grad_out, grad_last, out, kept, state, weight, projection, lengths, ctx.kind, ctx.reverse
    )
    hidden_side = grad_gates
    if ctx.kind == "gru":  # the third gate's hidden part is multiplied by the first gate
        size = weight.shape[0] // 3
        own, third = grad_gates.split([2 * size, size], -1)
        hidden_side = torch.cat([own, third * kept[..., :size]], -1)
    before = _hidden_before(out, state[:, : weight.shape[1]], lengths, ctx.reverse)
    grad_weight = hidden_side.flatten(0, 1).t() @ before.flatten(0, 1)
    grad_bias = hidden_side.sum([0, 1]) if ctx.has_bias else None
    return grad_gates, grad_state, grad_weight, grad_bias, grad_projection, None, None, None


def _hidden_before(
    out: torch.Tensor, initial: torch.Tensor, lengths: torch.Tensor | None, reverse: bool
) -> torch.Tensor:
    """[B, T, P]: the hidden state that each step began with. Where a sample has no such step it does not matter."""
    if not reverse:
        return torch.cat([initial.unsqueeze(1), out[:, :-1]], 1)
    before = torch.cat([out[:, 1:], initial.unsqueeze(1)], 1)
    if lengths is None:
        return before
    first = torch.arange(out.shape[1], device=out.device) == (lengths - 1).unsqueeze(1)
    return torch.where(first.unsqueeze(-1), initial.unsqueeze(1), before)


_LIBRARY.define(
    "recurrence(Tensor gates, Tensor state, Tensor weight, Tensor? bias, Tensor? projection, Tensor? lengths, "
    "str kind, bool reverse) -> (Tensor out, Tensor last, Tensor kept)"
)
_LIBRARY.define(
    "recurrence_backward(Tensor grad_out, Tensor grad_last, Tensor out, Tensor kept, Tensor state, Tensor weight, "
    "Tensor? projection, Tensor? lengths, str kind, bool reverse) "
    "-> (Tensor grad_gates, Tensor grad_state, Tensor? grad_projection)"
)
_LIBRARY.impl("recurrence", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("recurrence_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("shardwright::recurrence", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("shardwright::recurrence_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("shardwright::recurrence", _gradients, setup_context=_setup_context, lib=_LIBRARY)


@register_flop_formula(torch.ops.shardwright.recurrence)
def recurrence_flops(gates: Any, state: Any, weight: Any, bias: Any, projection: Any, *_: Any, **__: Any) -> int:
    """The hidden side's matmul, and the projection's, at every step; a multiply and an add count as two."""
    steps = gates[0] * gates[1]
    return 2 * steps * (weight[0] * weight[1] + (projection[0] * projection[1] if projection is not None else 0))


@register_flop_formula(torch.ops.shardwright.recurrence_backward)
def recurrence_backward_flops(
    grad_out: Any, grad_last: Any, out: Any, kept: Any, state: Any, weight: Any, projection: Any, *_: Any, **__: Any
) -> int:
    """The gradient of the hidden side's operand; of the projection, both."""
    steps = out[0] * out[1]
    return 2 * steps * (weight[0] * weight[1] + (2 * projection[0] * projection[1] if projection is not None else 0))
