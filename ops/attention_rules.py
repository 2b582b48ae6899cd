"""How shardwright::attention splits on an axis that cuts sequences, besides the rows of the kernels' table.

tokens   each rank has some queries of every head, and all keys and values (gathered)
heads    each rank has all queries and keys of some heads (Ulysses, arXiv:2309.14509): the exchange from tokens to
         heads and back is the change of placement before and after
ring     each rank has some queries, and some keys and values, which go round (passes/attention_ring.py)
"""

from __future__ import annotations

from torch import fx

from ..kernels.attention import attention, attention_backward
from ..profiler.nodes import named_arguments
from ..profiler.op_view import OpView
from .placement import P, R
from .strategy import HEADS, TOKENS, Strategy

ROWS = 2  # dimension of queries
FORMS = ("gather", "ulysses", "ring")


def is_attention(node: fx.Node) -> bool:
    return node.target in (attention, attention_backward)


def form_of(strategy: Strategy, node: fx.Node) -> str:
    """What a strategy of attention on an axis that cuts sequences is called; '' where it is whole there."""
    if strategy.of_sequence == HEADS:
        return "ulysses"
    if strategy.lowering.startswith(("attention_ring", "attention_zigzag")):
        return "ring"
    return "gather" if strategy.inputs[node.target is attention_backward] == ROWS else ""


def of_sequence(view: OpView, listed: list[Strategy]) -> list[Strategy]:
    """listed: the op's strategies for any axis."""
    call = named_arguments(view.node)
    heads = [s._replace(of_sequence=HEADS) for s in listed if s.outputs[0] == 1]
    windowed = call["causal"] or call["window"] > 0  # else the table has rows of queries
    rows = [_tokens(view)] if windowed and not call.get("mask_needs_grad") else []
    return [*heads, *rows, *_ring(view)]


def _ring(view: OpView) -> list[Strategy]:
    """Queries, keys and values by tokens; zigzag where causal."""
    call = named_arguments(view.node)
    query, key, value = (call[name].meta["val"].shape for name in ("query", "key", "value"))
    plain = call["mask"] is None and call["rng_key"] is None and call["window"] <= 0 and call["dropout_p"] == 0
    if not plain or key != value or query[ROWS] != key[ROWS]:
        return []
    lowering = "attention_zigzag" if call["causal"] else "attention_ring"
    if "grad_out" not in call:
        return [Strategy((ROWS,) * 3, (ROWS,) * 2, True, lowering, TOKENS)]
    return [Strategy((ROWS,) * 6, (ROWS, ROWS, ROWS, R), True, f"{lowering}_backward", TOKENS)]


def _tokens(view: OpView) -> Strategy:
    """Queries by rows; each row's mask depends on its number, which the lowering knows."""
    call = named_arguments(view.node)
    mask = call["mask"].meta["val"].shape if isinstance(call["mask"], fx.Node) else None
    split = R
    if mask is not None and len(mask) >= ROWS and mask[-2] > 1:
        split = len(mask) - ROWS
    extra = [] if mask is None else [split]
    extra += [R] if isinstance(call["rng_key"], fx.Node) else []
    lowering = "attention_near_rows" if call["window"] > 0 else "attention_rows"
    if "grad_out" not in call:
        return Strategy((ROWS, R, R, *extra), (ROWS, ROWS), lowering=lowering, of_sequence=TOKENS)
    return Strategy(
        (ROWS, ROWS, R, R, *extra, ROWS, ROWS),
        (ROWS, P, P, R),
        lowering=f"{lowering}_backward",
        of_sequence=TOKENS,
    )
