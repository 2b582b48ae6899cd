"""Sharding rules of ops that move, cut and join elements: views, slices, concatenation, constants."""

from __future__ import annotations

from ..profiler.op_view import OpView
from .placement import P, R
from .rules import aten, rule_for, same_everywhere, wrap
from .strategy import TOKENS, Strategy
from .views import inner_pairs, reshape_pairs


@rule_for("view", "reshape", "_unsafe_view")
def reshape(view: OpView) -> list[Strategy]:
    found = [Strategy((P,), (P,))]
    for i, j, exact in reshape_pairs(view.inputs[0].shape, view.outputs[0].shape):  # type: ignore[union-attr]
        found.append(Strategy((i,), (j,), even=not exact))
    for (i, j), outer in inner_pairs(view.inputs[0].shape, view.outputs[0].shape):  # type: ignore[union-attr]
        found.append(Strategy((i,), (j,), even=True, of_sequence=TOKENS, inside=outer))
    return found


@rule_for("permute")
def permute(view: OpView) -> list[Strategy]:
    rank = view.inputs[0].dim()
    return [Strategy((P,), (P,))] + [Strategy((wrap(d, rank),), (j,)) for j, d in enumerate(view.args[1])]


@rule_for("transpose", "t")
def transpose(view: OpView) -> list[Strategy]:
    rank = view.inputs[0].dim()
    a, b = (wrap(view.args[1], rank), wrap(view.args[2], rank)) if len(view.args) == 3 else (0, rank - 1)
    swap = {a: b, b: a}
    return [Strategy((P,), (P,))] + [Strategy((d,), (swap.get(d, d),)) for d in range(rank)]


@rule_for("unsqueeze")
def unsqueeze(view: OpView) -> list[Strategy]:
    at = wrap(view.args[1], view.inputs[0].dim() + 1)
    return [Strategy((P,), (P,))] + [Strategy((d,), (d + (d >= at),)) for d in range(view.inputs[0].dim())]


@rule_for("squeeze")
def squeeze(view: OpView) -> list[Strategy]:
    shape = view.inputs[0].shape
    dims = view.arg(1, "dim", list(range(len(shape))))
    gone = {wrap(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)}
    gone = {d for d in gone if shape[d] == 1}
    found, j = [Strategy((P,), (P,))], 0
    for d in range(len(shape)):
        if d not in gone:
            found.append(Strategy((d,), (j,)))
            j += 1
    return found


@rule_for("expand")
def expand(view: OpView) -> list[Strategy]:
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    shift = out.dim() - source.dim()
    found = [Strategy((P,), (P,))]
    for j in range(out.dim()):
        if out.shape[j] == 1:
            continue
        grown = j < shift or source.shape[j - shift] == 1
        found.append(Strategy((R if grown else j - shift,), (j,)))
    return found


@rule_for("slice", "flip", "roll", "constant_pad_nd", "narrow", "unfold")
def keep_untouched(view: OpView) -> list[Strategy]:
    """Dimensions whose size and order the op leaves alone."""
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    touched = _touched(view)
    found = [Strategy((d,), (d,)) for d in range(source.dim()) if d not in touched and source.shape[d] == out.shape[d]]
    fill = view.arg(2, "value", 0) if view.op.overloadpacket is aten.constant_pad_nd else 0
    return found + ([Strategy((P,), (P,))] if fill == 0 else [])


def _touched(view: OpView) -> set[int]:
    rank, name = view.inputs[0].dim(), view.op.overloadpacket
    if name is aten.slice or name is aten.unfold:
        dim = wrap(view.arg(1, "dim", 0), rank)
        full = name is aten.slice and view.inputs[0].shape[dim] == view.outputs[0].shape[dim]  # type: ignore[union-attr]
        return set() if full else {dim}
    if name is aten.flip:
        return {wrap(d, rank) for d in view.args[1]}
    if name is aten.roll:
        return {wrap(d, rank) for d in view.arg(2, "dims", ()) or range(rank)}
    if name is aten.constant_pad_nd:
        return {rank - 1 - i // 2 for i, amount in enumerate(view.args[1]) if amount != 0}
    return {wrap(view.args[1], rank)}


@rule_for("select")
def select(view: OpView) -> list[Strategy]:
    dim = wrap(view.arg(1, "dim", 0), view.inputs[0].dim())
    return [Strategy((P,), (P,))] + [Strategy((d,), (d - (d > dim),)) for d in range(view.inputs[0].dim()) if d != dim]


@rule_for("split", "split_with_sizes", "unbind", "chunk")
def split(view: OpView) -> list[Strategy]:
    rank, count = view.inputs[0].dim(), len(view.outputs)
    unbind = view.op.overloadpacket is aten.unbind
    dim = wrap(view.arg(1 if unbind else 2, "dim", 0), rank)
    found = [Strategy((P,), (P,) * count)]
    for d in range(rank):
        if d != dim:
            found.append(Strategy((d,), (d - (unbind and d > dim),) * count))
    return found


@rule_for("cat", "stack")
def cat(view: OpView) -> list[Strategy]:
    count, out = len(view.inputs), view.outputs[0]
    assert out is not None
    stack = view.op.overloadpacket is aten.stack
    dim = wrap(view.arg(1, "dim", 0), out.dim())
    found = [Strategy((P,) * count, (P,))]
    if any(t.dim() != out.dim() - stack for t in view.inputs):
        return []  # legacy empty tensors in a list
    for j in range(out.dim()):
        if j != dim:
            found.append(Strategy((j - (stack and j > dim),) * count, (j,)))
    return found


@rule_for("slice_backward", "select_backward")
def slice_backward(view: OpView) -> list[Strategy]:
    """Zeros with the gradient put in: (grad, input_sizes, dim, ...)."""
    sizes = view.args[1]
    rank = len(sizes)
    dim = wrap(view.args[2], rank)
    selects = view.op.overloadpacket is aten.select_backward
    found = [Strategy((P,), (P,))]
    for d in range(rank):
        if d != dim:
            found.append(Strategy((d - (selects and d > dim),), (d,)))
    return found


@rule_for("slice_scatter", "select_scatter")
def scatter_slice(view: OpView) -> list[Strategy]:
    rank = view.inputs[0].dim()
    dim = wrap(view.arg(2, "dim", 0), rank)
    selects = view.op.overloadpacket is aten.select_scatter
    found = [Strategy((P, P), (P,))]
    for d in range(rank):
        if d != dim:
            found.append(Strategy((d, d - (selects and d > dim)), (d,)))
    return found


# --------------------------------------------------------------------------- constants


@rule_for("zeros", "ones", "full", "empty")
def constant(view: OpView) -> list[Strategy]:
    out = view.outputs[0]
    assert out is not None
    return [Strategy((), (d,)) for d in range(out.dim()) if out.shape[d] > 1]


@rule_for("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")
def constant_like(view: OpView) -> list[Strategy]:
    """The value of the operand does not matter: any placement of it will do, so the result is split where it is."""
    source, out = view.inputs[0], view.outputs[0]
    assert out is not None
    if source.shape != out.shape:
        return [Strategy((s,), (R,)) for s in range(source.dim())]
    return same_everywhere(view, range(out.dim()))


@rule_for("arange", "scalar_tensor", "eye", "linspace", "tril_indices", "triu_indices")
def constant_whole(view: OpView) -> list[Strategy]:
    return []


@rule_for("tril", "triu")
def triangle(view: OpView) -> list[Strategy]:
    return [Strategy((P,), (P,)), *same_everywhere(view, range(view.inputs[0].dim() - 2))]


@rule_for("repeat")
def repeat(view: OpView) -> list[Strategy]:
    source, times = view.inputs[0], view.args[1]
    shift = len(times) - source.dim()
    return [Strategy((P,), (P,))] + [Strategy((d,), (d + shift,)) for d in range(source.dim()) if times[d + shift] == 1]
